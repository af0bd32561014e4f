"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Charts: one set per appearance; printing always uses the light one.
  const draw = (theme, printing) => {
    document.documentElement.classList.toggle("printing", printing);
    for (const [name, figure] of Object.entries(data.figures[theme])) {
      const place = document.getElementById("plot-" + name);
      // Charts do not reflow on paper, so for printing their width is fixed beforehand.
      const size = printing ? { autosize: false, width: place.clientWidth } : {};
      Plotly.react(place, figure.data, { ...figure.layout, ...size }, {
        responsive: true,
        displayModeBar: false,
      });
    }
  };
  const drawForScreen = () => draw(dark.matches ? "dark" : "light", false);
  drawForScreen();
  dark.addEventListener("change", drawForScreen);
  window.addEventListener("beforeprint", () => draw("light", true));
  window.addEventListener("afterprint", drawForScreen);

  const table = document.getElementById("feature-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const detail = document.getElementById("detail");

  // Text from the corpus only ever enters the page through textContent.
  const element = (tag, text = "", attributes = {}) => {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  const explanationOf = (explanation) => {
    const paragraph = element("p", explanation.text, { class: "told" });
    const who = [explanation.kind, explanation.model].filter(Boolean).join(" · ");
    const source = element("p", who + " ", { class: "note" });
    if (!explanation.llm) source.append(element("span", "no LLM", { class: "badge none" }));
    return [paragraph, source];
  };

  const compact = (value) => String(Number(value.toPrecision(3)));

  const histogramOf = (counts) => {
    const used = counts.flatMap((count, bin) => (count > 0 ? [bin] : []));
    if (!used.length) return [element("p", "never fired", { class: "missing" })];
    const first = used[0];
    const last = used[used.length - 1];
    const shown = counts.slice(first, last + 1);
    const highest = Math.max(...shown);
    const bars = element("div", "", { class: "bars" });
    shown.forEach((count, offset) => {
      const bin = first + offset;
      const range = data.edges
        ? compact(data.edges[bin]) + " – " + compact(data.edges[bin + 1])
        : "bin " + bin;
      const bar = element("i", "", { "data-tip": range + ": " + count.toLocaleString("en-GB") });
      bar.style.height = (count ? Math.max(1.5, (100 * count) / highest) : 0) + "%";
      bars.append(bar);
    });
    const ends = element("div", "", { class: "ends" });
    const edge = (bin) => (data.edges ? compact(data.edges[bin]) : "bin " + bin);
    ends.append(
      element("span", edge(first)),
      element("span", "activation, log scale"),
      element("span", edge(data.edges ? last + 1 : last)),
    );
    return [bars, ends];
  };

  const exampleOf = (example, strongest) => {
    const block = element("div", "", { class: "example" });
    const end = example.start + example.raw.length - 1;
    const peak = example.max === null ? "not computed" : compact(example.max);
    const where = `document ${example.doc} · tokens ${example.start}–${end} · largest ${peak}`;
    block.append(element("small", where));
    example.raw.forEach((raw, at) => {
      const value = example.values[at];
      const shown = example.shown[at];
      if (shown.startsWith(" ")) block.append(" ");
      const token = element("span", shown.trimStart() || shown, { "data-tip": `${raw}  ${compact(value)}` });
      if (value > 0 && strongest > 0) {
        token.setAttribute("data-hot", "");
        token.style.setProperty("--a", Math.min(1, value / strongest).toFixed(3));
      }
      block.append(token);
    });
    return block;
  };

  const show = (row) => {
    const feature = data.features[Number(row.dataset.index)];
    rows.forEach((other) => other.setAttribute("aria-selected", String(other === row)));
    const parts = [element("h3", "Feature " + feature.id)];
    if (feature.explanations.length) parts.push(...feature.explanations.flatMap(explanationOf));
    else parts.push(element("p", "not explained", { class: "missing" }));
    const facts = element("dl");
    for (const [name, value] of feature.facts) {
      const pair = element("div");
      const missing = value === "not computed" ? { class: "missing" } : {};
      pair.append(element("dt", name), element("dd", value, missing));
      facts.append(pair);
    }
    parts.push(facts, element("h4", "Activations"));
    if (feature.histogram) parts.push(...histogramOf(feature.histogram));
    else parts.push(element("p", "not computed", { class: "missing" }));
    const strongest = feature.max || Math.max(0, ...feature.examples.map((e) => e.max || 0));
    for (const [kind, title] of [["top", "Where it fires most"], ["sample", "Firing windows drawn at random"]]) {
      const examples = feature.examples.filter((example) => example.kind === kind);
      if (examples.length) parts.push(element("h4", title), ...examples.map((e) => exampleOf(e, strongest)));
    }
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
  };

  const choose = (row) => {
    show(row);
    history.replaceState(null, "", "#" + row.id);
    if (getComputedStyle(detail).position === "static") detail.scrollIntoView({ block: "start" });
  };

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(row);
  });
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(row);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const visible = Array.from(body.rows).filter((other) => !other.hidden);
      const next = visible[visible.indexOf(row) + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) {
        next.focus();
        show(next);
      }
    }
  });

  const matches = document.getElementById("matches");
  const filter = (words) => {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
      count += row.hidden ? 0 : 1;
    }
    matches.textContent = count + " of " + rows.length;
  };
  document.getElementById("search").addEventListener("input", (event) => filter(event.target.value));
  filter("");

  const buttons = Array.from(table.tHead.querySelectorAll("button"));
  buttons.forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const numeric = head.classList.contains("n");
      const now = head.getAttribute("aria-sort");
      // Numbers are first sorted from the largest, text from A.
      const first = numeric && column > 0 ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = now === first ? other : first;
      buttons.forEach((one) => one.parentElement.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const keyed = rows.map((row) => {
        const cell = row.cells[column];
        const raw = numeric ? cell.dataset.value : cell.textContent.trim();
        const absent = numeric ? raw === "" : cell.querySelector(".missing") !== null;
        return { row, absent, key: numeric ? Number(raw) : raw };
      });
      keyed.sort((a, b) => {
        if (a.absent !== b.absent) return a.absent ? 1 : -1; // missing stays last either way
        return sign * (numeric ? a.key - b.key : a.key.localeCompare(b.key));
      });
      body.append(...keyed.map((entry) => entry.row));
    });
  });

  const tip = document.getElementById("tip");
  detail.addEventListener("pointerover", (event) => {
    const over = event.target.closest("[data-tip]");
    tip.hidden = !over;
    if (!over) return;
    tip.textContent = over.dataset.tip;
    const box = over.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), window.innerWidth - size.width - 8);
    const above = box.top - size.height - 6;
    tip.style.left = left + "px";
    tip.style.top = (above > 4 ? above : box.bottom + 6) + "px";
  });
  detail.addEventListener("pointerleave", () => { tip.hidden = true; });

  const linked = rows.find((row) => "#" + row.id === location.hash);
  show(linked || rows[0]);
})();
