// The list of records: key, filters, order, pages.

import { json, Latest, RequestError } from "./api.js";
import { byId, decibels, el, lengthText, percent, whole } from "./dom.js";

const PAGE = 50;
const OPERATIONS = {
  text: [["is", "is"], ["contains", "contains"]],
  number: [["min", "at least"], ["max", "at most"], ["is", "is"]],
  bool: [["is", "is"]],
};

export class Search {
  constructor(facts, { open, add }) {
    this.facts = facts;
    this.open = open;
    this.add = add;
    this.offset = 0;
    this.filters = [];
    this.latest = new Latest();
    this.#fillSort();
    byId("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.changed();
    });
    byId("key").addEventListener("input", () => this.changed(250));
    byId("sort").addEventListener("change", () => this.changed());
    byId("direction").addEventListener("click", (event) => {
      const button = event.currentTarget;
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      this.changed();
    });
    byId("add-filter").addEventListener("click", () => this.#addFilter());
    byId("previous").addEventListener("click", () => this.#turn(-PAGE));
    byId("next").addEventListener("click", () => this.#turn(PAGE));
  }

  #fillSort() {
    for (const field of this.facts.fields) {
      if (field.kind === "number") byId("sort").append(el("option", { value: field.name }, field.label));
    }
  }

  #turn(by) {
    this.offset = Math.max(0, this.offset + by);
    this.load().then(() => byId("records").scrollIntoView({ block: "start" }));
  }

  /** Search again from the first page, after a pause in which no more is typed. */
  changed(pause = 0) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.offset = 0;
      this.load();
    }, pause);
  }

  async load() {
    byId("found").textContent = "Searching…";
    try {
      const found = await this.latest.run((signal) =>
        json("api/search", {
          key: byId("key").value,
          where: this.filters.map((filter) => filter.condition()).filter(Boolean),
          sort: byId("sort").value,
          descending: byId("direction").getAttribute("aria-pressed") === "true" ? 1 : 0,
          offset: this.offset,
          limit: PAGE,
        }, signal));
      if (found) this.#show(found);
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      byId("found").textContent = error.message;
    }
  }

  #show({ total, offset, records }) {
    const all = this.facts.records;
    byId("found").textContent =
      total === all ? `${whole.format(all)} records` : `${whole.format(total)} of ${whole.format(all)} records`;
    byId("results").tBodies[0].replaceChildren(...records.map((one) => this.#row(one)));
    const last = Math.min(total, offset + PAGE);
    byId("page").textContent = total ? `${whole.format(offset + 1)} to ${whole.format(last)}` : "";
    byId("previous").disabled = offset === 0;
    byId("next").disabled = last >= total;
    this.mark();
  }

  #row(record) {
    const stem = [record.group, record.role].filter(Boolean).join(" · ");
    return el("tr", { "data-key": record.key },
      el("th", { scope: "row" },
        el("button", { type: "button", class: "link key", onclick: () => this.open(record.key) }, record.key),
        stem ? el("span", { class: "quiet small stem" }, stem) : null),
      el("td", { class: "number" }, lengthText(record.duration)),
      el("td", { class: "number" }, decibels(record.loudness)),
      el("td", { class: "number wide-only" }, percent(record.silence)),
      el("td", { class: "number" },
        el("button", {
          type: "button", class: "add", disabled: Boolean(this.facts.why_no_mix),
          "aria-label": `Add ${record.key} to the mixing desk`, title: "Add to the mixing desk",
          onclick: () => this.add(record.key),
        }, "+")));
  }

  /** Mark the row of the open record. */
  mark(key = this.marked) {
    this.marked = key;
    for (const row of byId("results").tBodies[0].rows) {
      row.toggleAttribute("data-open", row.dataset.key === key);
      row.querySelector("button").toggleAttribute("aria-current", row.dataset.key === key);
    }
  }

  #addFilter() {
    const filter = new Filter(this.facts.fields, () => this.changed(250), () => {
      this.filters = this.filters.filter((one) => one !== filter);
      this.changed();
      byId("add-filter").focus();
    });
    this.filters.push(filter);
    byId("filters").append(filter.element);
    filter.field.focus();
  }
}

let filters = 0;

class Filter {
  constructor(fields, changed, removed) {
    filters += 1;
    const id = `filter-${filters}`;
    this.fields = fields;
    this.changed = changed;
    const [own, stored] = [fields.filter((f) => f.own), fields.filter((f) => !f.own)];
    const options = (some) => some.map((f) => el("option", { value: f.name }, f.label));
    this.field = el("select", { id: `${id}-field`, onchange: () => this.#fieldChanged() },
      own.length ? el("optgroup", { label: "Metadata" }, ...options(own)) : null,
      el("optgroup", { label: "Stored fields" }, ...options(stored)));
    this.operation = el("select", { "aria-label": "Comparison", onchange: changed });
    this.list = el("datalist", { id: `${id}-values` });
    this.place = el("span", { class: "value" });
    this.element = el("fieldset", { class: "filter" },
      el("legend", { class: "hidden-text" }, `Filter ${filters}`),
      el("label", { class: "hidden-text", htmlFor: `${id}-field` }, "Field"),
      this.field, this.operation, this.place, this.list,
      el("button", {
        type: "button", class: "remove", "aria-label": "Remove this filter",
        onclick: () => { this.element.remove(); removed(); },
      }, "×"));
    this.#fieldChanged();
  }

  get #chosen() { return this.fields.find((field) => field.name === this.field.value); }

  #fieldChanged() {
    const field = this.#chosen;
    this.operation.replaceChildren(...OPERATIONS[field.kind].map(([value, label]) => el("option", { value }, label)));
    this.value = field.kind === "bool"
      ? el("select", { onchange: this.changed }, el("option", { value: "true" }, "true"), el("option", { value: "false" }, "false"))
      : el("input", { type: field.kind === "number" ? "number" : "text", step: "any", oninput: this.changed });
    this.value.setAttribute("aria-label", `Value of ${field.label}`);
    this.place.replaceChildren(this.value);
    this.list.replaceChildren();
    if (field.kind === "text") {
      this.value.setAttribute("list", this.list.id);
      json("api/values", { field: field.name }).then(({ values }) => {
        if (this.#chosen === field) {
          this.list.replaceChildren(...values.map(({ value, count }) => el("option", { value }, whole.format(count))));
        }
      }).catch(() => {});
    }
    this.changed();
  }

  condition() {
    const field = this.#chosen;
    const text = this.value.value;
    if (text === "") return null;
    const number = /^-?[0-9]{16,19}$/.test(text) ? text : Number(text); // large ones without rounding
    const value = { text, number, bool: text === "true" }[field.kind];
    return { field: field.name, op: this.operation.value, value };
  }
}
