"use strict";
// Everything works without this script except colours and keyboard of the map, and that sounds of
// one record continue at the same position.

function prepareSounds() {
  const all = Array.from(document.querySelectorAll("audio"));
  for (const audio of all) {
    const card = audio.closest("[data-sounds]");
    audio.addEventListener("play", () => {
      for (const other of all) {
        if (other === audio || other.paused) continue;
        if (card && other.closest("[data-sounds]") === card) audio.currentTime = other.currentTime;
        other.pause();
      }
      follow(audio, card);
    });
  }
  for (const figure of document.querySelectorAll("[data-sounds] .timed")) {
    const card = figure.closest("[data-sounds]");
    const head = document.createElement("div");
    head.className = "playhead";
    head.hidden = true;
    figure.append(head);
    figure.addEventListener("click", (event) => {
      const sounds = Array.from(card.querySelectorAll("audio"));
      const audio = sounds.find((one) => !one.paused) || sounds[0];
      if (!audio || !audio.duration) return;
      const box = figure.getBoundingClientRect();
      audio.currentTime = (audio.duration * (event.clientX - box.left)) / box.width;
      follow(audio, card);
    });
  }
}

function follow(audio, card) {
  if (!card) return;
  const heads = card.querySelectorAll(".playhead");
  const step = () => {
    for (const head of heads) {
      head.hidden = false;
      head.style.left = `${(100 * audio.currentTime) / (audio.duration || 1)}%`;
    }
    if (!audio.paused && !audio.ended) requestAnimationFrame(step);
  };
  step();
}

function prepareMap() {
  const table = document.getElementById("map-table");
  if (!table) return;
  const svg = document.querySelector("#map-frame svg");
  const frame = document.getElementById("map-frame");
  const select = document.getElementById("map-field");
  const circles = Array.from(svg.querySelectorAll("circle"));
  const names = Array.from(table.tHead.rows[0].cells, (cell) => cell.textContent).slice(3);
  const rows = Array.from(table.tBodies[0].rows, (row) => Array.from(row.cells, (c) => c.textContent));
  const points = circles.map((c) => [Number(c.getAttribute("cx")), Number(c.getAttribute("cy"))]);
  const record = document.getElementById("map-record");
  let chosen = -1;

  function choose(index) {
    if (index < 0 || index === chosen) return;
    if (chosen >= 0) circles[chosen].classList.remove("chosen");
    chosen = index;
    circles[index].classList.add("chosen");
    const facts = names.map((name, n) => [name, rows[index][n + 3]]).filter(([, value]) => value);
    record.textContent = `${rows[index][0]}: ${facts.map(([n, v]) => `${n} ${v}`).join(", ")}`;
  }

  function colour() {
    const field = Number(select.value);
    const numeric = select.selectedOptions[0].dataset.numeric === "yes";
    const values = rows.map((row) => row[field + 3]);
    const legend = numeric ? colourNumbers(values) : colourTexts(values);
    const list = document.getElementById("map-legend");
    list.replaceChildren(
      ...legend.map(([name, text]) => {
        const item = document.createElement("li");
        const mark = document.createElement("span");
        mark.className = `mark ${name}`;
        item.append(mark, ` ${text}`);
        return item;
      })
    );
  }

  function colourNumbers(values) {
    const numbers = values.map((value) => (value === "" ? NaN : Number(value)));
    const sorted = numbers.filter((n) => !Number.isNaN(n)).sort((a, b) => a - b);
    // Seven steps with equally many records, so that a few large values do not hide the rest.
    const ends = [1, 2, 3, 4, 5, 6].map((n) => sorted[Math.floor((n * sorted.length) / 7)]);
    circles.forEach((circle, n) => {
      const step = ends.filter((end) => numbers[n] >= end).length;
      circle.setAttribute("class", Number.isNaN(numbers[n]) ? "none" : `s${step}`);
    });
    const steps = [0, 1, 2, 3, 4, 5, 6].filter((n) => n === 0 || ends[n - 1] !== ends[n]);
    return steps.map((n) => [`s${n}`, n === 0 ? `under ${ends[0]}` : `${ends[n - 1]} and more`]);
  }

  function colourTexts(values) {
    const counts = new Map();
    for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    const common = Array.from(counts).sort((a, b) => b[1] - a[1]).slice(0, 7);
    const names = new Map(common.map(([value], n) => [value, `c${n}`]));
    circles.forEach((circle, n) => {
      circle.setAttribute("class", values[n] ? names.get(values[n]) || "c7" : "none");
    });
    const legend = common.map(([value, count], n) => [`c${n}`, `${value} (${count})`]);
    const others = values.filter((value) => value && !names.has(value)).length;
    if (others) legend.push(["c7", `others (${others})`]);
    const missing = values.filter((value) => !value).length;
    if (missing) legend.push(["none", `without (${missing})`]);
    return legend;
  }

  function nearest(x, y, most) {
    let best = -1;
    let least = most ** 2;
    points.forEach(([px, py], n) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) {
        best = n;
        least = distance;
      }
    });
    return best;
  }

  frame.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    choose(nearest(at.x, at.y, 60));
  });
  // An arrow key goes to the next record by x or by y, so that all of them can be reached.
  const orders = [0, 1].map((axis) =>
    points.map((_, n) => n).sort((a, b) => points[a][axis] - points[b][axis] || a - b)
  );
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1] };
  frame.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || chosen < 0) return;
    event.preventDefault();
    const order = orders[step[0]];
    choose(order[order.indexOf(chosen) + step[1]] ?? -1);
  });
  frame.addEventListener("focus", () => {
    if (chosen < 0) choose(nearest(0, 0, Infinity));
  });
  frame.tabIndex = 0;
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "Map: the arrow keys go to the next record on the left, on the right, above or below");
  select.addEventListener("change", () => {
    colour();
    if (chosen >= 0) circles[chosen].classList.add("chosen");
  });
  document.querySelector(".map-controls").hidden = false;
  document.getElementById("map-hint").hidden = false;
  colour();
}

function prepareNavigation() {
  const links = new Map();
  for (const link of document.querySelectorAll("nav.contents a")) links.set(link.hash.slice(1), link);
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-15% 0px -75% 0px" }
  );
  for (const section of document.querySelectorAll("section")) seen.observe(section);
}

prepareSounds();
prepareMap();
prepareNavigation();
