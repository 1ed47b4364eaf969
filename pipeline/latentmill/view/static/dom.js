// Elements are made from text only: what comes from a store is never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `aria-…`, `on…` listeners) and children (nodes or text). */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

let announced = 0;

/** Tell what happened to people who use a screen reader. */
export function announce(text) {
  clearTimeout(announced);
  announced = setTimeout(() => (byId("status").textContent = text), 60);
}

export function showError(text) {
  const box = byId("message");
  box.textContent = text;
  box.hidden = !text;
}

export const whole = new Intl.NumberFormat("en");

export function clock(seconds) {
  const total = Math.max(0, seconds);
  const minutes = Math.floor(total / 60);
  const rest = (total - 60 * minutes).toFixed(1).padStart(4, "0");
  return `${minutes}:${rest}`;
}

export function lengthText(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const rounded = Math.round(seconds);
  return `${Math.floor(rounded / 60)}:${String(rounded % 60).padStart(2, "0")} min`;
}

export const decibels = (value, digits = 1) =>
  value === null || value === undefined ? "–" : `${value.toFixed(digits).replace("-", "−")} dB`;

export const percent = (share) =>
  share === null || share === undefined ? "–" : `${Math.round(100 * share)} %`;

export const seconds = (value) => `${value.toFixed(2).replace("-", "−")} s`;
