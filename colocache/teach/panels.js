// SPDX-License-Identifier: Apache-2.0
// The grids: what each shows of a step, and drawing them. A step is one of a recording, or one that model.js made.
"use strict";
const panels = (() => {
  const PANELS = {
    "pvm-memory": { name: "PVM memory", image: "pvm" },
    unacked: { name: "unacked", note: "not confirmed yet" },
    cache: { name: "cache", image: "cache", note: "the second copy" },
    "flush-set": { name: "flush set" },
    "svm-memory": { name: "SVM memory", image: "svm", note: "guest RAM" },
    "pvm-bitmap": { name: "PVM bitmap", bits: "pvm", letter: "P", note: "pages that came" },
    "svm-bitmap": { name: "SVM bitmap", bits: "svm", letter: "S", note: "pages it wrote" },
    "guest-ram": { name: "guest RAM", image: "ram", note: "in shared memory" },
  };
  const NAMES = Object.keys(PANELS);
  // With bounded memory there is no SVM bitmap; guest RAM, which the SVM does not write, stands in its place.
  const BOUNDED_NOTES = { cache: "only what has come", "svm-memory": "its private view" };
  const isBounded = (s) => Boolean(s.ram && s.ram.length);
  const shown = (s) => NAMES.filter((panel) => panel !== (isBounded(s) ? "svm-bitmap" : "guest-ram"));
  const FLUSH_NOTES = { none: "nothing sealed yet", due: "sealed: to be copied", done: "all copied", own: "a list of its own", answer: "your answer" };
  const FLUSH_WORDS = { ".": "not in it", P: "in it, written by the PVM", S: "in it, written by the SVM", B: "in it, written by both" };
  const UNACKED_WORDS = { "": "not in it", u: "sent, not confirmed", w: "waiting to be sent, not confirmed" };
  const SAMPLES = [
    ["P0", "P2", "written by the PVM on the way to epoch 2"], ["P1", "P1", "the same, older"], ["S0", "S2", "written by the SVM"],
    ["B", "B", "in the flush set for both"], ["w", "w", "waiting to be sent"], ["u", "u", "sent, not confirmed"],
    ["changed", "", "changed in this step"], ["focus", "", "the text speaks of it"], ["wrong", "", "wrong: not what it should be"],
  ];
  const grids = {};
  let nPages = 0, columns = 0, pick = () => {};

  const make = (tag, attributes = {}, text = "") => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };

  // ---- what a step shows -----------------------------------------------------------------------------------------
  const stampWords = (stamp) => {
    if (stamp === "-") return "never written, all zero bytes";
    if (stamp === "?") return "torn, no whole write of one machine";
    return `written by the ${stamp[0] === "P" ? "PVM" : "SVM"} on the way to epoch ${stamp.slice(1)}`;
  };
  // The newest epoch in any page of a chapter up to a step: its writes are drawn strong, older ones weak.
  const newest = (chapter, upTo) => {
    let epoch = 1;
    for (const s of chapter.steps.slice(0, upTo + 1)) {
      for (const name of ["pvm", "cache", "svm"]) for (const v of s.images[name]) if (v.length > 1) epoch = Math.max(epoch, +v.slice(1));
    }
    return epoch;
  };
  // Per page: the drawn text, the class for its look, and the words for it.
  const look = (panel, s, top) => {
    const spec = PANELS[panel];
    const cells = [];
    for (let pfn = 0; pfn < nPages; pfn++) {
      if (spec.image) {
        const stamp = (spec.image === "ram" ? s.ram : s.images[spec.image])[pfn];
        const age = stamp.length > 1 ? Math.min(2, top - +stamp.slice(1)) : 0;
        const kind = stamp === "-" ? "" : stamp === "?" ? "torn" : stamp[0] + age;
        const hole = stamp === "-" && panel === "cache" && isBounded(s);
        cells.push({ text: stamp === "-" ? "" : stamp, kind, words: hole ? "not there, and takes no memory" : stampWords(stamp) });
      } else if (spec.bits) {
        const set = s.bitmaps[spec.bits][pfn] === "1";
        cells.push({ text: set ? "1" : "", kind: set ? spec.letter + "0" : "", words: set ? "set" : "not set" });
      } else if (panel === "flush-set") {
        const set = s.bitmaps.flush[pfn] === "1";
        const from = set ? (s.origin[pfn] === "." ? "1" : s.origin[pfn]) : "";
        cells.push({ text: from, kind: from === "B" ? "B" : from === "S" ? "S0" : from ? "P0" : "", words: FLUSH_WORDS[from || "."] || "in it" });
      } else {
        const text = s.bitmaps.pending[pfn] === "1" ? "w" : s.bitmaps.unacked[pfn] === "1" ? "u" : "";
        cells.push({ text, kind: text, words: UNACKED_WORDS[text] });
      }
    }
    return cells;
  };
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const summary = (panel, cells) => {
    const counts = new Map();
    for (const cell of cells) counts.set(cell.text, (counts.get(cell.text) || 0) + 1);
    if (PANELS[panel].image) {
      const parts = [...counts].sort((a, b) => b[1] - a[1]).map(([text, n]) => `${n} × ${text || "empty"}`);
      return parts.join(", ");
    }
    const set = nPages - (counts.get("") || 0);
    if (panel === "unacked") return `${plural(set, "page")}${counts.get("w") ? `, ${counts.get("w")} waiting (w)` : ""}`;
    if (panel === "flush-set" && set) {
      const parts = ["P", "S", "B"].filter((k) => counts.get(k)).map((k) => `${counts.get(k)} ${k}`);
      return `${plural(set, "page")}${parts.length ? ": " + parts.join(", ") : ""}`;
    }
    return plural(set, "page");
  };
  const isGone = (panel, s) => (panel === "pvm-memory" || panel === "unacked") && !s.alive.pvm;
  const marks = (panel, pfn, value, then, s) => {
    const classes = ["cell"];
    if (value.kind) classes.push(value.kind);
    if (then && !isGone(panel, s) && then[pfn].text !== value.text && (value.text || panel !== "flush-set")) classes.push("changed");
    if (s.focus[pfn] === "1") classes.push("focus");
    if ((panel === "svm-memory" && s.wrong[pfn] === "1") || (panel === "flush-set" && s.missed && s.missed[pfn])) classes.push("wrong");
    return classes;
  };

  // ---- building once ---------------------------------------------------------------------------------------------
  const build = (panel) => {
    const holder = document.querySelector(`[data-panel="${panel}"]`);
    const head = make("h4", { id: `name-${panel}` });
    const note = make("small", {}, PANELS[panel].note || "");
    head.append(make("span", {}, PANELS[panel].name), note);
    const sum = make("p", { class: "sum", id: `sum-${panel}` });
    const grid = make("div", { class: "grid", role: "grid", "aria-labelledby": `name-${panel}`, "aria-describedby": `sum-${panel}`, style: `--columns:${columns}` });
    const cells = [];
    for (let first = 0; first < nPages; first += columns) {
      const row = make("div", { class: "row", role: "row" });
      for (let pfn = first; pfn < Math.min(nPages, first + columns); pfn++) {
        const cell = make("div", { class: "cell", role: "gridcell", tabindex: pfn === 0 ? "0" : "-1", "data-pfn": pfn });
        cells.push(cell);
        row.append(cell);
      }
      grid.append(row);
    }
    // A click chooses a page and leaves the focus alone, so that the arrow keys go on stepping.
    grid.addEventListener("mousedown", (event) => event.preventDefault());
    grid.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-pfn]");
      if (cell) pick(panel, +cell.dataset.pfn);
    });
    grid.addEventListener("keydown", (event) => gridKey(event, panel, cells));
    holder.append(head, grid, sum);
    grids[panel] = { cells, sum, grid, note, holder };
  };
  const gridKey = (event, panel, cells) => {
    const pfn = +event.target.dataset.pfn;
    const last = nPages - 1;
    const moves = {
      ArrowRight: pfn + 1, ArrowLeft: pfn - 1, ArrowDown: pfn + columns, ArrowUp: pfn - columns,
      Home: pfn - (pfn % columns), End: Math.min(last, pfn - (pfn % columns) + columns - 1),
    };
    if (event.key === "Enter" || event.key === " ") pick(panel, pfn);
    else if (event.key === "Escape") event.target.blur();
    else if (event.key in moves) {
      const to = moves[event.key];
      if (to >= 0 && to <= last) {
        event.target.tabIndex = -1;
        cells[to].tabIndex = 0;
        cells[to].focus();
      }
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const legend = (list) => {
    for (const [kind, text, words] of SAMPLES) {
      const item = make("li");
      item.append(make("span", { class: `cell ${kind}`, "aria-hidden": "true" }, text), make("span", {}, words));
      list.append(item);
    }
  };
  const setup = (guest, onPick) => {
    nPages = guest.n_pages;
    columns = guest.columns;
    pick = onPick;
    NAMES.forEach(build);
  };

  // ---- drawing a step ----------------------------------------------------------------------------------------------
  const draw = (s, before, top, chosen) => {
    for (const panel of NAMES) grids[panel].holder.hidden = !shown(s).includes(panel);
    for (const panel of shown(s)) {
      const { cells, sum, grid, note } = grids[panel];
      const now = look(panel, s, top), then = before ? look(panel, before, top) : null;
      now.forEach((value, pfn) => {
        const cell = cells[pfn], classes = marks(panel, pfn, value, then, s);
        const wrong = classes.includes("wrong") && panel === "svm-memory";
        if (chosen === pfn) classes.push("chosen");
        cell.className = classes.join(" ");
        cell.textContent = value.text;
        cell.setAttribute("aria-label", `page ${pfn}${value.text ? `, ${value.text}` : ""}: ${value.words}${wrong ? `, wrong: it should be epoch ${s.target}'s` : ""}`);
      });
      sum.textContent = isGone(panel, s) ? "gone with its machine" : summary(panel, now);
      if (panel === "flush-set") {
        note.textContent = FLUSH_NOTES[s.flush_state];
        grid.classList.toggle("done", s.flush_state === "done");
      } else note.textContent = (isBounded(s) && BOUNDED_NOTES[panel]) || PANELS[panel].note || "";
    }
  };
  // A small copy of one grid, for paper.
  const copy = (panel, s, before, top) => {
    const now = look(panel, s, top), then = before ? look(panel, before, top) : null;
    const done = panel === "flush-set" && s.flush_state === "done";
    const gone = isGone(panel, s);
    const figure = make("figure", { class: `panel${gone ? " gone" : ""}`, role: "img", "aria-label": `${PANELS[panel].name}: ${gone ? "gone" : summary(panel, now)}` });
    const grid = make("div", { class: `grid${done ? " done" : ""}`, style: `--columns:${columns}` });
    for (let first = 0; first < nPages; first += columns) {
      const row = make("div", { class: "row" });
      for (let pfn = first; pfn < Math.min(nPages, first + columns); pfn++) row.append(make("div", { class: marks(panel, pfn, now[pfn], then, s).join(" ") }, now[pfn].text));
      grid.append(row);
    }
    figure.append(make("figcaption", {}, PANELS[panel].name), grid, make("p", { class: "sum" }, gone ? "gone with its machine" : summary(panel, now)));
    return figure;
  };
  return { PANELS, shown, isBounded, make, newest, look, setup, draw, copy, legend };
})();
