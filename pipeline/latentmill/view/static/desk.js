// The mixing desk: channels, the part of the mix to hear, and the mix as sound, file and code.

import { address, json, Latest, RequestError } from "./api.js";
import { announce, byId, decibels, el, seconds, showError } from "./dom.js";
import { decodeSound, peakOf, peakText, Player, snr } from "./player.js";
import { newChannel, strip } from "./strip.js";

const SIDES = [["latent", "Latent mix"], ["decoded", "Decoded, then added"], ["original", "Originals, added"]];
const PAUSE = 200; // milliseconds without a change before the mix is decoded
const FIRST_SECONDS = 30;

export class Desk {
  constructor(facts) {
    this.facts = facts;
    this.start = 0;
    this.length = FIRST_SECONDS;
    this.latest = new Latest();
    this.stale = new Set(SIDES.map(([name]) => name));
    this.channels = restored(facts.url);
    this.#build();
    this.#show();
  }

  #build() {
    const { facts } = this;
    this.list = el("ol", { class: "strips" });
    this.hint = el("p", { class: "quiet" },
      "Add records with the + beside them, or a group of stems:");
    this.groups = el("select", { id: "groups", onchange: () => this.#chosenGroup() }, el("option", { value: "" }, "Choose a group"));
    this.groupRow = el("div", { class: "field inline", hidden: true }, el("label", { htmlFor: "groups" }, "Add a group"), this.groups);
    this.player = new Player({ name: "the mix", sides: SIDES, load: () => this.refresh() });
    const whole = facts.chunked;
    this.from = numberField("mix-start", "From (s)", this.start, 0, whole, (value) => { this.start = value; this.changed(); });
    this.span = numberField("mix-length", `Length (s), at most ${facts.max_seconds}`, this.length, 0.1, whole, (value) => { this.length = value; this.changed(); });
    this.total = el("span", { class: "quiet small" });
    this.download = el("a", { class: "button", href: "#", download: "" }, "Download WAV");
    this.code = el("pre", { tabIndex: 0, "aria-label": "Python lines of this mix" }, el("code"));
    this.copy = el("button", { type: "button", onclick: () => this.#copy() }, "Copy");
    this.body = el("div", {},
      this.list,
      el("div", { class: "row part" }, this.from, this.span, this.total),
      this.player.element,
      el("div", { class: "row" }, this.download, el("button", { type: "button", onclick: () => this.clear() }, "Remove all channels")),
      el("details", { open: true }, el("summary", {}, "The same mix in Python"), this.code, this.copy));
    const notes = [];
    if (facts.why_no_mix) notes.push(facts.why_no_mix);
    if (facts.why_no_pan && !facts.why_no_mix) notes.push(`Pan is off: ${facts.why_no_pan}`);
    if (facts.poor) notes.push(`Adding latents is poor for this model: relative error ${facts.additivity.toFixed(2)} on this store.`);
    byId("desk-content").replaceChildren(
      ...notes.map((note) => el("p", { class: "note small" }, note)), this.hint, this.groupRow, this.body);
    json("api/values", { field: "group" }).then(({ values }) => {
      this.groups.append(...values.filter(({ count }) => count > 1).map(({ value, count }) =>
        el("option", { value }, `${value} (${count})`)));
      this.groupRow.hidden = this.groups.options.length < 2 || Boolean(facts.why_no_mix);
    }).catch(() => {});
  }

  #chosenGroup() {
    const group = this.groups.value;
    this.groups.value = "";
    if (group) this.addGroup(group);
  }

  /** Add records; `offsets` are the frames of the mix at which they begin. */
  add(keys, offsets = []) {
    const room = this.facts.max_channels - this.channels.length;
    showError(keys.length > room ? `The desk can have at most ${this.facts.max_channels} channels: remove some first.` : "");
    this.channels.push(...keys.slice(0, room).map((key, number) => newChannel(key, offsets[number])));
    this.#show();
    announce(`The mixing desk has ${this.channels.length} channels.`);
  }

  /** Add the stems of a group; segments of a recording are placed as in the recording. */
  async addGroup(group) {
    const { rate, hop, max_channels, mix_roles } = this.facts;
    const where = [{ field: "group", op: "is", value: group }];
    try {
      const { records, total } = await json("api/search", { where, limit: max_channels });
      const there = new Set(this.channels.map((one) => one.key));
      const stems = records.filter(({ role }) => !mix_roles.includes(role));
      const added = stems.filter(({ key }) => !there.has(key));
      const first = Math.min(...stems.map(({ begin }) => begin));
      this.add(
        added.map(({ key }) => key),
        added.map(({ begin }) => Math.round(((begin - first) * rate) / hop)),
      );
      if (total > records.length) showError(`The group has ${total} records, but the desk can have at most ${max_channels} channels.`);
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      showError(error.message);
    }
  }

  clear() {
    this.channels = [];
    this.#show();
    announce("The mixing desk is empty.");
  }

  #show() {
    const { channels } = this;
    this.list.replaceChildren(...channels.map((channel, number) =>
      strip(channel, number, this.facts, {
        changed: () => this.changed(),
        removed: () => {
          this.channels = channels.filter((one) => one !== channel);
          this.#show();
          byId("desk").focus();
        },
      })));
    this.body.hidden = channels.length === 0;
    this.hint.hidden = channels.length > 0;
    byId("desk-count").textContent = channels.length ? String(channels.length) : "";
    if (channels.length) this.changed(0);
    else {
      this.player.pause();
      this.save();
    }
  }

  /** The mix as the server expects it. */
  get mix() {
    const { rate, hop, chunked } = this.facts;
    const solo = this.channels.some((one) => one.solo);
    const channels = this.channels.map(({ key, gain_db, mute, solo: alone, pan, offset }) => ({
      key, gain_db, mute: mute || (solo && !alone), pan, offset,
    }));
    if (chunked) return { channels };
    const frames = Math.max(2, Math.ceil((this.length * rate) / hop) + 1);
    return { channels, start: Math.round((this.start * rate) / hop), frames };
  }

  save() {
    sessionStorage.setItem("desk", JSON.stringify({ url: this.facts.url, channels: this.channels }));
  }

  changed(pause = PAUSE) {
    this.save();
    this.player.note.textContent = "Decoding…";
    this.download.href = address("audio", { mix: this.mix, of: "latent", name: "mix" });
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.stale = new Set(SIDES.map(([name]) => name));
      this.refresh();
    }, pause);
  }

  /** Decode the latent mix and the chosen side, if something has changed since. */
  async refresh() {
    const { player, mix } = this;
    if (!mix.channels.length) return;
    player.note.textContent = "Decoding…";
    try {
      await this.latest.run(async (signal) => {
        const { lines, seconds: heard, total } = await json("api/python", { mix }, signal);
        this.code.firstChild.textContent = lines;
        const all = (total * this.facts.hop) / this.facts.rate;
        const part = mix.start > 0 || mix.frames < total ? ` of about ${seconds(all)}` : ", the whole mix";
        this.total.textContent = this.facts.chunked ? "" : `You hear ${seconds(heard)}${part}.`;
        for (const name of new Set(["latent", player.side])) {
          if (!this.stale.has(name) && player.buffers.has(name)) continue;
          const buffer = await decodeSound(this.facts.rate, { mix, of: name }, signal);
          for (const other of this.stale) if (other !== name && other !== player.side && other !== "latent") player.set(other, null);
          player.set(name, buffer);
          this.stale.delete(name);
        }
        this.#note();
      });
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      player.note.textContent = error.message;
      announce(error.message);
    }
  }

  #note() {
    const { player } = this;
    if (!player.buffer) return;
    const parts = [peakText(player.buffer)];
    if (peakOf(player.buffer) > 0) parts.push("too loud, it clips: lower the gains");
    const [latent, other] = [player.buffers.get("latent"), player.side !== "latent" ? player.buffer : null];
    if (latent && other) {
      const ratio = snr(latent, other);
      const against = player.side === "decoded" ? "the added decoded channels" : "the added originals";
      parts.push(ratio > 200 ? `the latent mix equals ${against}` : `the latent mix has an SNR of ${decibels(ratio)} against ${against}`);
    }
    player.note.textContent = parts.join(" · ");
    announce("The mix is ready.");
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.code.textContent);
      announce("Copied.");
      this.copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.code);
      this.copy.textContent = "Selected: press Ctrl-C";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 2000);
  }
}

function numberField(id, label, value, min, disabled, changed) {
  const input = el("input", {
    id, type: "number", min, step: 0.1, value, disabled,
    oninput: () => {
      const number = Number(input.value);
      if (input.value !== "" && number >= min) changed(number);
    },
  });
  return el("div", { class: "field" }, el("label", { htmlFor: id }, label), input);
}

/** The channels of this store before the page was loaded again. */
function restored(url) {
  try {
    const saved = JSON.parse(sessionStorage.getItem("desk"));
    return saved.url === url ? saved.channels : [];
  } catch {
    return [];
  }
}
