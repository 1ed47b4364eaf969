// Requests to the server. Addresses are relative: the page's own address has the token.

export class RequestError extends Error {}

function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value === undefined) continue;
    query.set(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

async function request(path, parameters, signal) {
  let response;
  try {
    response = await fetch(address(path, parameters), { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server does not answer: start latentmill view again.");
  }
  if (response.ok) return response;
  let reason = `The server answered with status ${response.status}.`;
  if (response.headers.get("content-type")?.includes("json")) reason = (await response.json()).error;
  throw new RequestError(reason);
}

export async function json(path, parameters = {}, signal = undefined) {
  return (await request(path, parameters, signal)).json();
}

export async function bytes(path, parameters = {}, signal = undefined) {
  return (await request(path, parameters, signal)).arrayBuffer();
}

export { address };

/** Runs the last of several calls: each one aborts the request of the one before. */
export class Latest {
  #controller = null;

  async run(work) {
    this.#controller?.abort();
    const controller = new AbortController();
    this.#controller = controller;
    try {
      return await work(controller.signal);
    } catch (error) {
      if (error.name === "AbortError" || controller.signal.aborted) return undefined;
      throw error;
    }
  }
}
