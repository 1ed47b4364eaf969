// Starts the page and connects its parts.

import { json, RequestError } from "./api.js";
import { byId, showError, whole } from "./dom.js";
import { Desk } from "./desk.js";
import { RecordView } from "./record.js";
import { Search } from "./search.js";

const narrow = matchMedia("(max-width: 899px)");

/** Show a part: beside the list on a wide page, instead of it on a narrow one. */
function go(place, { focus = true } = {}) {
  document.querySelector("main").dataset.place = place;
  for (const button of document.querySelectorAll("nav.places button")) {
    if (button.dataset.place === place) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  if (focus) byId(place).focus({ preventScroll: !narrow.matches });
  if (narrow.matches) scrollTo({ top: 0 });
}

async function begin() {
  const facts = await json("api/store");
  document.title = `${facts.name} · latentmill view`;
  byId("name").textContent = facts.name;
  const channels = facts.channels === 1 ? "mono" : facts.channels === 2 ? "stereo" : `${facts.channels} channels`;
  byId("about").replaceChildren(
    `${whole.format(facts.records)} records, ${facts.hours.toFixed(2)} hours of audio · ${facts.model}, `,
    `${(facts.rate / 1000).toString()} kHz ${channels} · latents: ${facts.values}`,
    facts.sealed ? "" : " · this store is not complete");
  const desk = new Desk(facts);
  const add = (key) => desk.add([key]);
  const addGroup = async (group) => {
    await desk.addGroup(group);
    go("desk");
  };
  const record = new RecordView(facts, { add, addGroup });
  const search = new Search(facts, {
    add,
    open: async (key) => {
      search.mark(key);
      go("record", { focus: narrow.matches });
      await record.open(key);
    },
  });
  for (const button of document.querySelectorAll("nav.places button")) {
    button.addEventListener("click", () => go(button.dataset.place));
  }
  go(narrow.matches ? "records" : "desk", { focus: false });
  narrow.addEventListener("change", () => {
    const { place } = document.querySelector("main").dataset;
    if (!narrow.matches && place === "records") go("desk", { focus: false });
  });
  await search.load();
}

begin().catch((error) => {
  showError(error instanceof RequestError ? error.message : "The page has an error: see the console.");
  throw error;
});
