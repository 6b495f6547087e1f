// SPDX-License-Identifier: Apache-2.0
// Draws a recorded lesson. Everything shown comes from the recording; nothing is computed about the engine here.
"use strict";
(() => {
  const lesson = JSON.parse(document.getElementById("lesson-data").textContent);
  const { n_pages: nPages, columns } = lesson.guest;
  const $ = (id) => document.getElementById(id);
  const KINDS = { lesson: "How it works", death: "A death at each point", counter: "Done wrong on purpose" };
  const ACTORS = { pvm: "the PVM", svm: "the SVM", wire: "on the wire", nobody: "" };
  const PANELS = {
    "pvm-memory": { name: "PVM memory", image: "pvm" },
    unacked: { name: "unacked", note: "sent or to send, not confirmed" },
    cache: { name: "cache", image: "cache" },
    "flush-set": { name: "flush set" },
    "svm-memory": { name: "SVM memory", image: "svm" },
    "pvm-bitmap": { name: "PVM bitmap", bits: "pvm", letter: "P", note: "received since the last seal" },
    "svm-bitmap": { name: "SVM bitmap", bits: "svm", letter: "S", note: "written by the SVM since" },
  };
  const FLUSH_NOTES = { none: "nothing sealed yet", due: "sealed: to be copied", done: "committed: all copied", own: "a list of its own" };
  const at = { chapter: 0, step: 0, page: null };
  const grids = {};
  let timer = null;

  const make = (tag, attributes = {}, text = "") => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };
  const chapter = () => lesson.chapters[at.chapter];
  const step = () => chapter().steps[at.step];
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  // ---- words -----------------------------------------------------------------------------------------------
  const stampWords = (stamp) => {
    if (stamp === "-") return "never written, all zero bytes";
    if (stamp === "?") return "torn, no whole write of one machine";
    return `written by the ${stamp[0] === "P" ? "PVM" : "SVM"} on the way to epoch ${stamp.slice(1)}`;
  };
  const FLUSH_WORDS = { ".": "not in it", P: "in it, written by the PVM", S: "in it, written by the SVM", B: "in it, written by both" };
  const UNACKED_WORDS = { "": "not in it", u: "sent, not confirmed", w: "waiting to be sent, not confirmed" };

  // What one panel shows in a step: per page the drawn text, the class for its look, and the words for it.
  const newest = (one, upTo) => {
    let epoch = 1;
    for (const s of one.steps.slice(0, upTo + 1)) for (const name of ["pvm", "cache", "svm"]) for (const v of s.images[name]) if (v.length > 1) epoch = Math.max(epoch, +v.slice(1));
    return epoch;
  };
  const look = (panel, s, top) => {
    const spec = PANELS[panel];
    const cells = [];
    for (let pfn = 0; pfn < nPages; pfn++) {
      if (spec.image) {
        const stamp = s.images[spec.image][pfn];
        const age = stamp.length > 1 ? Math.min(2, top - +stamp.slice(1)) : 0;
        const kind = stamp === "-" ? "" : stamp === "?" ? "torn" : stamp[0] + age;
        cells.push({ text: stamp === "-" ? "" : stamp, kind, words: stampWords(stamp) });
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
  const summary = (panel, cells, s) => {
    const counts = new Map();
    for (const cell of cells) counts.set(cell.text, (counts.get(cell.text) || 0) + 1);
    if (PANELS[panel].image) {
      const parts = [...counts].sort((a, b) => b[1] - a[1]).map(([text, n]) => `${n} × ${text || "empty"}`);
      return parts.join(", ");
    }
    const set = nPages - (counts.get("") || 0);
    if (panel === "unacked") return `${plural(set, "page")}${counts.get("w") ? `, ${counts.get("w")} of them waiting (w)` : ""}`;
    if (panel === "flush-set" && set) {
      const parts = ["P", "S", "B"].filter((k) => counts.get(k)).map((k) => `${counts.get(k)} ${k}`);
      return `${plural(set, "page")}${parts.length ? ": " + parts.join(", ") : ""}`;
    }
    return plural(set, "page");
  };

  // ---- building once ---------------------------------------------------------------------------------------
  const buildPanel = (panel) => {
    const holder = document.querySelector(`[data-panel="${panel}"]`);
    const head = make("h4", { id: `name-${panel}` });
    const note = make("small", {}, PANELS[panel].note || "");
    head.append(make("span", {}, PANELS[panel].name), note);
    const sum = make("p", { class: "sum", id: `sum-${panel}` });
    const grid = make("div", { class: "grid", role: "grid", "aria-labelledby": `name-${panel}`, "aria-describedby": `sum-${panel}`, style: `--columns:${columns}` });
    const cells = [];
    for (let first = 0; first < nPages; first += columns) {
      const row = make("div", { class: "row", role: "row" });
      for (let pfn = first; pfn < first + columns; pfn++) {
        if (pfn >= nPages) { row.append(make("div", { class: "cell none", role: "presentation" })); continue; }
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
      if (cell) choose(+cell.dataset.pfn);
    });
    grid.addEventListener("keydown", (event) => gridKey(event, cells));
    holder.append(head, grid, sum);
    grids[panel] = { cells, sum, grid, note };
  };
  const gridKey = (event, cells) => {
    const pfn = +event.target.dataset.pfn;
    const last = nPages - 1;
    const moves = { ArrowRight: pfn + 1, ArrowLeft: pfn - 1, ArrowDown: pfn + columns, ArrowUp: pfn - columns, Home: pfn - (pfn % columns), End: Math.min(last, pfn - (pfn % columns) + columns - 1) };
    if (event.key === "Enter" || event.key === " ") choose(pfn);
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
  const buildChapters = () => {
    for (const [kind, name] of Object.entries(KINDS)) {
      const of = lesson.chapters.map((c, index) => [c, index]).filter(([c]) => c.kind === kind);
      if (!of.length) continue;
      const list = make("ul");
      const group = make("optgroup", { label: name });
      for (const [c, index] of of) {
        const button = make("button", { type: "button", "data-chapter": index }, c.title);
        button.addEventListener("click", () => go(index, 0));
        const item = make("li");
        item.append(button);
        list.append(item);
        group.append(make("option", { value: index }, c.title));
      }
      $("chapter-list").append(make("h2", {}, name), list);
      $("chapter-select").append(group);
    }
    $("engine").textContent = `Recorded from the real engine, version ${lesson.engine.version}: ${nPages} pages in shared memory.`;
  };
  const buildLegend = () => {
    const samples = [
      ["P0", "P2", "written by the PVM on the way to epoch 2"], ["P1", "P1", "the same, older"], ["S0", "S2", "written by the SVM"],
      ["B", "B", "in the flush set for both"], ["w", "w", "waiting to be sent"], ["u", "u", "sent, not confirmed"],
      ["changed", "", "changed in this step"], ["focus", "", "the text speaks of it"], ["wrong", "", "wrong: not what it should be"],
    ];
    for (const [kind, text, words] of samples) {
      const item = make("li");
      item.append(make("span", { class: `cell ${kind}`, "aria-hidden": "true" }, text), make("span", {}, words));
      $("legend").append(item);
    }
  };

  // ---- drawing a step ----------------------------------------------------------------------------------------
  const draw = () => {
    const c = chapter(), s = step(), before = at.step ? c.steps[at.step - 1] : null, top = newest(c, at.step);
    $("kind").textContent = KINDS[c.kind];
    $("kind").className = `kind ${c.kind}`;
    $("chapter-title").textContent = c.title;
    $("question").textContent = c.question;
    $("step-count").textContent = `Step ${at.step + 1} of ${c.steps.length}`;
    $("step-title").textContent = s.title;
    $("step-text").textContent = s.text;
    drawDoing(s);
    for (const panel of Object.keys(PANELS)) drawPanel(panel, s, before, top);
    $("host-pvm").classList.toggle("gone", !s.alive.pvm);
    $("host-svm").classList.toggle("gone", !s.alive.svm);
    drawVerdict(s);
    const last = at.step === c.steps.length - 1;
    $("answer").textContent = last ? c.answer : "";
    drawPage();
    $("scrubber").max = c.steps.length;
    $("scrubber").value = at.step + 1;
    $("scrubber").setAttribute("aria-valuetext", `step ${at.step + 1} of ${c.steps.length}: ${s.title}`);
    $("prev").disabled = at.chapter === 0 && at.step === 0;
    $("next").disabled = at.chapter === lesson.chapters.length - 1 && last;
    $("chapter-select").value = at.chapter;
    for (const button of document.querySelectorAll("[data-chapter]")) button.setAttribute("aria-current", String(+button.dataset.chapter === at.chapter));
    $("announce").textContent = `${s.title}. ${s.text} SVM memory: ${s.verdict.sentence}`;
    document.title = `${c.title}, step ${at.step + 1}: the COLO lesson`;
  };
  const drawDoing = (s) => {
    $("doing").replaceChildren();
    if (ACTORS[s.actor]) $("doing").append(make("span", { class: `chip ${s.actor}` }, ACTORS[s.actor]));
    if (s.message) $("doing").append(make("span", { class: "chip" }, s.message));
    if (s.call) $("doing").append(make("code", { class: "chip" }, s.call));
  };
  const drawPanel = (panel, s, before, top) => {
    const { cells, sum, grid, note } = grids[panel];
    const now = look(panel, s, top), then = before ? look(panel, before, top) : null;
    const gone = panel === "pvm-memory" || panel === "unacked" ? !s.alive.pvm : false;
    now.forEach((value, pfn) => {
      const cell = cells[pfn];
      const classes = ["cell"];
      if (value.kind) classes.push(value.kind);
      if (then && !gone && then[pfn].text !== value.text && (value.text || panel !== "flush-set")) classes.push("changed");
      if (s.focus[pfn] === "1") classes.push("focus");
      const wrong = panel === "svm-memory" && s.wrong[pfn] === "1";
      if (wrong) classes.push("wrong");
      if (at.page === pfn) classes.push("chosen");
      cell.className = classes.join(" ");
      cell.textContent = value.text;
      cell.setAttribute("aria-label", `page ${pfn}: ${value.words}${wrong ? `, wrong: it should be epoch ${s.target}'s` : ""}`);
    });
    sum.textContent = gone ? "gone with its machine" : summary(panel, now, s);
    if (panel === "flush-set") {
      note.textContent = FLUSH_NOTES[s.flush_state];
      grid.classList.toggle("done", s.flush_state === "done");
    }
  };
  const drawVerdict = (s) => {
    const bad = s.verdict.kind === "mixed", good = s.verdict.kind === "epoch";
    $("verdict").className = `verdict ${bad ? "bad" : good ? "good" : ""}`;
    $("verdict-sign").textContent = bad ? "✕" : good ? "✓" : "•";
    $("verdict-text").textContent = s.verdict.sentence;
    $("if-now").replaceChildren();
    for (const [side, name] of [["pvm", "If the PVM died now:"], ["svm", "If the SVM's process died now:"]]) {
      if (s.if_now[side]) $("if-now").append(make("dt", {}, name), make("dd", {}, s.if_now[side]));
    }
    const { phase, sealed, committed, receiving } = s.status;
    $("status").textContent = `control region: ${phase.replace("_", " ")}, sealed ${sealed}, committed ${committed}, receiving ${receiving}`;
  };
  const drawPage = () => {
    const box = $("page");
    box.replaceChildren();
    if (at.page === null) return;
    const c = chapter(), s = step(), top = newest(c, at.step), pfn = at.page;
    box.append(make("h3", {}, `Page ${pfn}`));
    const list = make("dl");
    for (const panel of Object.keys(PANELS)) {
      const value = look(panel, s, top)[pfn];
      const dd = make("dd");
      if (value.text) dd.append(make("b", {}, value.text), ` ${value.words}`);
      else dd.append(value.words);
      list.append(make("dt", {}, PANELS[panel].name), dd);
    }
    box.append(list);
    const table = make("table");
    table.append(make("caption", {}, "Its bytes through this chapter"));
    const head = make("tr");
    for (const name of ["step", "PVM", "cache", "SVM"]) head.append(make("th", { scope: "col" }, name));
    table.append(head);
    c.steps.forEach((one, index) => {
      const row = make("tr", index === at.step ? { class: "now" } : {});
      row.append(make("th", { scope: "row" }, `${index + 1} ${one.title}`));
      for (const name of ["pvm", "cache", "svm"]) row.append(make("td", {}, one.images[name][pfn]));
      table.append(row);
    });
    box.append(table);
  };

  // ---- moving ------------------------------------------------------------------------------------------------
  const go = (chapterIndex, stepIndex) => {
    at.chapter = chapterIndex;
    at.step = stepIndex;
    history.replaceState(null, "", `#${chapter().id}/${at.step + 1}`);
    draw();
  };
  const choose = (pfn) => {
    at.page = at.page === pfn ? null : pfn;
    draw();
  };
  const forward = () => {
    if (at.step + 1 < chapter().steps.length) go(at.chapter, at.step + 1);
    else if (at.chapter + 1 < lesson.chapters.length) go(at.chapter + 1, 0);
    else stop();
  };
  const back = () => {
    if (at.step > 0) go(at.chapter, at.step - 1);
    else if (at.chapter > 0) go(at.chapter - 1, lesson.chapters[at.chapter - 1].steps.length - 1);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "Play";
    $("play").setAttribute("aria-pressed", "false");
  };
  const play = () => {
    if (timer) return stop();
    timer = setInterval(forward, 6000);
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", "true");
  };
  const fromHash = () => {
    const [id, number] = location.hash.slice(1).split("/");
    const index = lesson.chapters.findIndex((c) => c.id === id);
    if (index < 0) return go(0, 0);
    const steps = lesson.chapters[index].steps.length;
    go(index, Math.min(steps, Math.max(1, parseInt(number, 10) || 1)) - 1);
  };

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
    const jump = {
      ArrowRight: forward, ArrowLeft: back,
      Home: () => go(at.chapter, 0), End: () => go(at.chapter, chapter().steps.length - 1),
      PageDown: () => go(Math.min(lesson.chapters.length - 1, at.chapter + 1), 0), PageUp: () => go(Math.max(0, at.chapter - 1), 0),
    }[event.key];
    if (!jump) return;
    event.preventDefault();
    jump();
  });
  $("scrubber").addEventListener("input", () => go(at.chapter, +$("scrubber").value - 1));
  $("chapter-select").addEventListener("change", () => go(+$("chapter-select").value, 0));
  $("next").addEventListener("click", forward);
  $("prev").addEventListener("click", back);
  $("play").addEventListener("click", play);
  window.addEventListener("hashchange", fromHash);

  Object.keys(PANELS).forEach(buildPanel);
  buildChapters();
  buildLegend();
  fromHash();
})();
