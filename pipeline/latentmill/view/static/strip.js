// One channel of the mixing desk.

import { decibels, el, seconds } from "./dom.js";

const QUIETEST = -40;

export const newChannel = (key, offset = 0) => ({ key, gain_db: 0, mute: false, solo: false, pan: 0, offset });

const panText = (pan) => (pan === 0 ? "centre" : `${Math.round(100 * Math.abs(pan))} % ${pan < 0 ? "left" : "right"}`);

let strips = 0;

/** The controls of a channel; they change `channel` and call `changed`. */
export function strip(channel, number, facts, { changed, removed }) {
  strips += 1;
  const id = `strip-${strips}`;
  const gain = slider(`${id}-gain`, "Gain", { min: QUIETEST, max: 12, step: 0.5, value: channel.gain_db },
    (value) => decibels(value), (value) => { channel.gain_db = value; changed(); });
  const pan = slider(`${id}-pan`, "Pan", { min: -1, max: 1, step: 0.05, value: channel.pan, disabled: Boolean(facts.why_no_pan) },
    panText, (value) => { channel.pan = value; changed(); });
  const shown = el("output", { htmlFor: `${id}-offset`, class: "small quiet" });
  const offset = el("input", {
    id: `${id}-offset`, type: "number", step: 1, value: channel.offset, disabled: facts.chunked, "aria-describedby": `${id}-seconds`,
    oninput: () => {
      channel.offset = Math.round(Number(offset.value)) || 0;
      showOffset();
      changed();
    },
  });
  shown.id = `${id}-seconds`;
  const showOffset = () => (shown.textContent = `= ${seconds((channel.offset * facts.hop) / facts.rate)}`);
  showOffset();
  return el("li", { class: "strip", "data-key": channel.key, "data-colour": number % 8 },
    el("div", { class: "strip-name" },
      el("span", { class: "key" }, channel.key),
      el("button", { type: "button", class: "remove", "aria-label": `Remove ${channel.key} from the desk`, onclick: removed }, "×")),
    el("div", { class: "strip-controls", role: "group", "aria-label": channel.key },
      toggle("Mute", "mute", channel, changed), toggle("Solo", "solo", channel, changed),
      gain, pan,
      el("div", { class: "control" }, el("label", { htmlFor: offset.id }, "Offset (frames)"), offset, shown)));
}

function toggle(label, name, channel, changed) {
  const button = el("button", {
    type: "button", class: `toggle ${name}`, "aria-pressed": String(channel[name]), "aria-label": `${label} ${channel.key}`,
    onclick: () => {
      channel[name] = !channel[name];
      button.setAttribute("aria-pressed", String(channel[name]));
      changed();
    },
  }, label);
  return button;
}

function slider(id, label, range, text, changed) {
  const output = el("output", { htmlFor: id, class: "small quiet" }, text(range.value));
  const input = el("input", { id, type: "range", ...range });
  const show = () => {
    output.textContent = text(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.value = range.value; // after min, max and step
  input.addEventListener("input", () => {
    show();
    changed(Number(input.value));
  });
  input.addEventListener("dblclick", () => {
    input.value = 0;
    input.dispatchEvent(new Event("input"));
  });
  show();
  return el("div", { class: "control" }, el("label", { htmlFor: id }, label), input, output);
}
