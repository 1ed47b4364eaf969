// Plays several versions of one sound in step, so that switching keeps the position.

import { bytes } from "./api.js";
import { clock, decibels, el } from "./dom.js";

let context = null;

/** The audio context, at the rate of the store, so that nothing is resampled on the way. */
function audioContext(rate) {
  if (context === null) {
    try {
      context = new AudioContext({ sampleRate: rate });
    } catch {
      context = new AudioContext();
    }
  }
  return context;
}

export async function decodeSound(rate, parameters, signal) {
  const data = await bytes("audio", parameters, signal);
  const buffer = await audioContext(rate).decodeAudioData(data);
  signal?.throwIfAborted(); // decoding itself cannot be aborted
  return buffer;
}

const scheme = matchMedia("(prefers-color-scheme: dark)");

let playing = null; // the player that sounds: there is one at a time

export class Player {
  /** `sides` are [name, label] pairs; `load(name)` is called when a side is chosen. */
  constructor({ name, sides, load }) {
    this.sides = sides;
    this.load = load;
    this.side = sides[0][0];
    this.buffers = new Map();
    this.sources = new Map();
    this.offset = 0;
    this.started = null;
    this.#build(name);
    this.redraw = () => this.draw();
    scheme.addEventListener("change", this.redraw);
    this.observer = new ResizeObserver(this.redraw);
    this.observer.observe(this.canvas);
  }

  #build(name) {
    this.button = el("button", { type: "button", class: "primary play", onclick: () => this.toggle() }, "Play");
    this.canvas = el("canvas", { class: "wave-canvas", "aria-hidden": "true" });
    this.canvas.addEventListener("pointerdown", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.seek(((event.clientX - box.left) / box.width) * this.duration);
    });
    this.slider = el("input", {
      type: "range", min: 0, max: 0, step: 0.1, value: 0, "aria-label": `Position in ${name}`,
      oninput: () => this.seek(Number(this.slider.value)),
    });
    this.time = el("span", { class: "time" }, "0:00.0");
    this.repeat = el("input", { type: "checkbox", onchange: () => this.#restart() });
    this.note = el("p", { class: "small quiet side-note" });
    const group = `side-${Math.random().toString(36).slice(2)}`;
    this.choices = this.sides.map(([value, label]) =>
      el("label", { class: "choice" },
        el("input", {
          type: "radio", name: group, value, checked: value === this.side,
          onchange: () => this.choose(value),
        }),
        el("span", {}, label)));
    this.element = el("div", { class: "player", role: "group", "aria-label": name },
      el("fieldset", { class: "choices" }, el("legend", { class: "hidden-text" }, "Version"), ...this.choices),
      el("div", { class: "transport" }, this.button, el("div", { class: "wave-box" }, this.canvas, this.slider)),
      el("div", { class: "row small" }, this.time, el("label", { class: "check" }, this.repeat, " Repeat"), this.note));
    this.enable();
  }

  get buffer() { return this.buffers.get(this.side); }
  get duration() { return Math.max(0, ...[...this.buffers.values()].map((one) => one.duration)); }

  get position() {
    if (this.started === null) return this.offset;
    const now = this.offset + context.currentTime - this.started;
    return this.repeat.checked ? now % this.duration : Math.min(now, this.duration);
  }

  enable() {
    const ready = Boolean(this.buffer);
    this.button.disabled = !ready;
    this.slider.disabled = !ready;
    this.slider.max = this.duration;
    this.slider.setAttribute("aria-valuetext", `${clock(this.position)} of ${clock(this.duration)}`);
  }

  /** Set the sound of a side; null if it has to be loaded again. */
  set(name, buffer) {
    const at = this.position;
    if (buffer === null) this.buffers.delete(name);
    else this.buffers.set(name, buffer);
    if (this.started !== null && buffer !== null) this.#start(Math.min(at, this.duration));
    this.offset = Math.min(this.started === null ? at : this.offset, this.duration);
    this.enable();
    this.#show();
  }

  async choose(name) {
    this.side = name;
    for (const choice of this.choices) {
      const input = choice.querySelector("input");
      input.checked = input.value === name;
    }
    this.#balance();
    this.draw();
    this.enable();
    await this.load(name);
  }

  toggle() {
    if (this.started === null) this.play();
    else this.pause();
  }

  async play() {
    if (!this.buffer) return;
    if (playing && playing !== this) playing.pause();
    playing = this;
    await context.resume();
    this.#start(this.offset >= this.duration - 0.05 ? 0 : this.offset);
    this.button.textContent = "Pause";
    this.#tick();
  }

  pause() {
    this.offset = this.position;
    this.started = null;
    this.#stop();
    this.button.textContent = "Play";
    this.#show();
  }

  /** Stop for good: nothing that stays refers to the player any more, so its sounds are freed. */
  close() {
    this.pause();
    if (playing === this) playing = null;
    scheme.removeEventListener("change", this.redraw);
    this.observer.disconnect();
  }

  seek(to) {
    this.offset = Math.max(0, Math.min(to, this.duration));
    if (this.started !== null) this.#start(this.offset);
    this.#show();
  }

  #restart() {
    if (this.started !== null) this.#start(this.position);
  }

  #start(at) {
    this.#stop();
    this.offset = at;
    this.started = context.currentTime;
    for (const [name, buffer] of this.buffers) {
      const source = new AudioBufferSourceNode(context, { buffer, loop: this.repeat.checked });
      const gain = new GainNode(context, { gain: name === this.side ? 1 : 0 });
      source.connect(gain).connect(context.destination);
      source.start(0, Math.min(at, buffer.duration));
      this.sources.set(name, { source, gain });
    }
  }

  #stop() {
    for (const { source, gain } of this.sources.values()) {
      source.stop();
      gain.disconnect();
    }
    this.sources.clear();
  }

  #balance() {
    for (const [name, { gain }] of this.sources) {
      gain.gain.setTargetAtTime(name === this.side ? 1 : 0, context.currentTime, 0.005);
    }
  }

  #tick() {
    if (this.started === null) return;
    if (!this.repeat.checked && this.position >= this.duration) {
      this.pause();
      this.offset = 0;
    }
    this.#show();
    requestAnimationFrame(() => this.#tick());
  }

  #show() {
    const at = this.position;
    this.time.textContent = `${clock(at)} / ${clock(this.duration)}`;
    this.slider.value = at;
    this.slider.setAttribute("aria-valuetext", `${clock(at)} of ${clock(this.duration)}`);
    this.draw();
  }

  draw() {
    const canvas = this.canvas;
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    const scale = devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * scale), Math.round(box.height * scale)];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      this.peaks = null;
    }
    const style = getComputedStyle(canvas);
    const paint = canvas.getContext("2d");
    paint.clearRect(0, 0, width, height);
    const buffer = this.buffer;
    if (!buffer) return;
    if (this.peaks?.buffer !== buffer) this.peaks = { buffer, values: peaksOf(buffer, width) };
    const done = (this.position / this.duration) * width;
    const top = Math.max(0.05, ...this.peaks.values);
    for (let x = 0; x < width; x += 1) {
      const size = Math.max(scale, (this.peaks.values[x] / top) * height * 0.94);
      paint.fillStyle = style.getPropertyValue(x < done ? "--accent" : "--wave");
      paint.fillRect(x, (height - size) / 2, 1, size);
    }
    paint.fillStyle = style.getPropertyValue("--text");
    paint.fillRect(Math.min(width - scale, done), 0, Math.max(1, scale), height);
  }
}

function peaksOf(buffer, width) {
  const values = new Float32Array(width);
  for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
    const samples = buffer.getChannelData(channel);
    const step = samples.length / width;
    for (let x = 0; x < width; x += 1) {
      const end = Math.min(samples.length, Math.ceil((x + 1) * step));
      let most = values[x];
      for (let n = Math.floor(x * step); n < end; n += 1) {
        const size = Math.abs(samples[n]);
        if (size > most) most = size;
      }
      values[x] = most;
    }
  }
  return values;
}

/** The largest sample in dB of full scale; -Infinity for silence. */
export function peakOf(buffer) {
  return 20 * Math.log10(Math.max(...peaksOf(buffer, 1)));
}

export const peakText = (buffer) => {
  const peak = peakOf(buffer);
  return Number.isFinite(peak) ? `peak ${decibels(peak)}FS` : "silent";
};

/** Signal-to-noise ratio of a sound against another one in dB; Infinity if they are equal. */
export function snr(given, target) {
  let [signal, noise] = [0, 0];
  for (let channel = 0; channel < target.numberOfChannels; channel += 1) {
    const a = given.getChannelData(channel);
    const b = target.getChannelData(channel);
    const count = Math.min(a.length, b.length);
    for (let n = 0; n < count; n += 1) {
      signal += b[n] * b[n];
      noise += (a[n] - b[n]) ** 2;
    }
  }
  return 10 * Math.log10(signal / noise);
}
