// One record: facts, player, pictures, metadata.

import { address, json, Latest, RequestError } from "./api.js";
import { announce, byId, decibels, el, lengthText, percent, whole } from "./dom.js";
import { decodeSound, peakText, Player, snr } from "./player.js";

const SECONDS = 60;
const SHOWN = new Set(["key", "duration", "loudness", "silence", "frames", "group", "role", "metadata"]);

export class RecordView {
  constructor(facts, { add, addGroup }) {
    this.facts = facts;
    this.add = add;
    this.addGroup = addGroup;
    this.latest = new Latest();
  }

  async open(key) {
    this.player?.pause();
    byId("record-title").textContent = key;
    stopLoading(byId("record-content"));
    try {
      await this.latest.run(async (signal) => this.#show(await json("api/record", { key }, signal), signal));
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      this.#replace(el("p", { class: "note warn" }, error.message));
      announce(error.message);
    }
  }

  /** Show a record; `signal` aborts loading its sounds. */
  #show(record, signal) {
    const { why_no_sound: why } = this.facts;
    const player = why ? null : this.#player(record, signal);
    this.#replace(
      this.#figures(record), this.#buttons(record), player?.element ?? el("p", { class: "note small" }, why),
      this.#pictures(record), ...this.#metadata(record));
    this.player = player;
    player?.choose("latent");
    announce(`${record.key} is open.`);
  }

  #replace(...children) {
    this.player?.close();
    this.player = null;
    byId("record-content").replaceChildren(...children);
  }

  #figures(record) {
    const pairs = [
      ["Length", lengthText(record.duration)],
      ["Loudness (RMS)", decibels(record.loudness)],
      ["Silent", percent(record.silence)],
      ["Latent", `${record.channels} × ${whole.format(record.frames)}`],
    ];
    if (record.group) pairs.push(["Group", record.group]);
    if (record.role) pairs.push(["Role", record.role]);
    return el("dl", { class: "facts" },
      ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  #buttons(record) {
    const disabled = Boolean(this.facts.why_no_mix);
    return el("div", { class: "row" },
      el("button", { type: "button", disabled, onclick: () => this.add(record.key) }, "Add to the mixing desk"),
      record.group
        ? el("button", { type: "button", disabled, onclick: () => this.addGroup(record.group) }, "Add its whole group")
        : null);
  }

  #player(record, signal) {
    const { rate, hop, chunked } = this.facts;
    const frames = chunked ? undefined : Math.ceil((SECONDS * rate) / hop);
    const mix = { channels: [{ key: record.key }], frames };
    const player = new Player({
      name: record.key,
      sides: [["latent", "Reconstruction"], ["original", "Original"]],
      load: async (name) => {
        if (player.buffers.has(name)) return this.#note(player);
        player.note.textContent = name === "latent" ? "Decoding…" : "Loading the source…";
        try {
          player.set(name, await decodeSound(rate, { mix, of: name }, signal));
          this.#note(player);
        } catch (error) {
          if (signal.aborted) return;
          if (!(error instanceof RequestError)) throw error;
          player.note.textContent = error.message;
        }
      },
    });
    player.limited = !chunked && record.duration > SECONDS;
    return player;
  }

  #note(player) {
    if (!player.buffer) return;
    const parts = [peakText(player.buffer)];
    const [given, target] = [player.buffers.get("latent"), player.buffers.get("original")];
    if (given && target) parts.push(`SNR against the original ${decibels(snr(given, target))}`);
    if (player.limited) parts.push(`the first ${SECONDS} s`);
    player.note.textContent = parts.join(" · ");
  }

  #pictures(record) {
    const titles = {
      waveform: "Waveform of the reconstruction",
      spectrogram: "Spectrogram of the reconstruction: low to high frequencies from bottom to top, logarithmic",
      latent: "Latent: one row for each channel; deviation from the channel's mean in the store, blue below, orange above",
    };
    const kinds = { waveform: "wave", spectrogram: "spectrogram", latent: "latent" };
    return el("div", { class: "pictures" },
      ...Object.entries(titles).filter(([of]) => of === "latent" || !this.facts.why_no_sound).map(([of, title]) =>
        el("figure", {},
          el("img", {
            class: `picture ${kinds[of]}`, src: address("picture", { key: record.key, of }),
            alt: `${title} of ${record.key}`, decoding: "async",
          }),
          el("figcaption", {}, `${title}.`))));
  }

  #metadata(record) {
    const own = parsed(record.metadata);
    const stored = Object.fromEntries(Object.entries(record).filter(([name]) => !SHOWN.has(name)));
    return [
      el("h3", {}, "Metadata"),
      Object.keys(own).length ? table("The item's own metadata", own) : el("p", { class: "quiet" }, "This item has none."),
      el("details", {}, el("summary", {}, "Source and storage"), table("Stored fields", stored)),
    ];
  }
}

/** Stop loading pictures: a browser has few connections to a server, and the next record needs one. */
function stopLoading(place) {
  for (const image of place.querySelectorAll("img")) {
    if (!image.complete) image.removeAttribute("src");
  }
}

/** The item's own metadata; JSON of Python may have NaN, which JavaScript does not read. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return { JSON: text };
  }
}

function table(title, values) {
  const text = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : String(value ?? "–"));
  return el("table", { class: "pairs" },
    el("caption", { class: "hidden-text" }, title),
    el("tbody", {}, ...Object.entries(values).map(([name, value]) =>
      el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, text(value))))));
}
