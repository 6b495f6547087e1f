// SPDX-License-Identifier: Apache-2.0
// The page: chapters, steps, and moving among them. A chapter is a recorded one, the one that is played, or the quiz.
"use strict";
const lesson = (() => {
  const { make } = panels;
  const recorded = JSON.parse(document.getElementById("lesson-data").textContent);
  const messages = JSON.parse(document.getElementById("words-data").textContent).messages;
  const chapters = [...recorded.chapters, play.chapter, quiz.chapter];
  const $ = (id) => document.getElementById(id);
  const KINDS = { lesson: "How it works", death: "A death at each point", counter: "Done wrong on purpose", play: "Now you" };
  const ACTORS = { pvm: "the PVM", svm: "the SVM", wire: "on the wire", nobody: "" };
  const at = { chapter: 0, step: 0, page: null, playChapter: chapters.indexOf(play.chapter), quizChapter: chapters.indexOf(quiz.chapter) };
  let timer = null;
  const chapter = () => chapters[at.chapter];
  const step = () => chapter().steps[at.step];

  // ---- building once -------------------------------------------------------------------------------------------
  const buildChapters = () => {
    for (const [kind, name] of Object.entries(KINDS)) {
      const of = chapters.map((c, index) => [c, index]).filter(([c]) => c.kind === kind);
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
    $("engine").textContent = `Recorded from the real engine, version ${recorded.engine.version}: ${recorded.guest.n_pages} pages in shared memory.`;
  };

  // ---- drawing a step --------------------------------------------------------------------------------------------
  const draw = () => {
    const c = chapter(), s = step(), before = at.step ? c.steps[at.step - 1] : null;
    const last = at.step === c.steps.length - 1;
    $("kind").textContent = KINDS[c.kind];
    $("kind").className = `kind ${c.kind}`;
    $("chapter-title").textContent = c.title;
    $("question").textContent = c.question;
    $("step-count").textContent = c === quiz.chapter ? "" : `Step ${at.step + 1} of ${c.steps.length}`;
    $("step-title").textContent = s.title;
    $("step-text").textContent = s.text;
    $("answer").textContent = last ? c.answer : "";
    drawDoing(s);
    panels.draw(s, before, panels.newest(c, at.step), at.page);
    $("host-pvm").classList.toggle("gone", !s.alive.pvm);
    $("host-svm").classList.toggle("gone", !s.alive.svm);
    drawVerdict(s);
    drawPage();
    drawMoving(c, s, last);
    play.draw();
    quiz.draw();
    $("announce").textContent = `${s.title}. ${s.text} SVM memory: ${s.verdict.sentence}`;
    document.title = `${c.title}, step ${at.step + 1}: the COLO lesson`;
  };
  const drawMoving = (c, s, last) => {
    $("scrubber").max = c.steps.length;
    $("scrubber").value = at.step + 1;
    $("scrubber").setAttribute("aria-valuetext", `step ${at.step + 1} of ${c.steps.length}: ${s.title}`);
    $("prev").disabled = at.chapter === 0 && at.step === 0;
    $("next").disabled = at.chapter === chapters.length - 1 && last;
    $("chapter-select").value = at.chapter;
    for (const button of document.querySelectorAll("[data-chapter]")) button.setAttribute("aria-current", String(+button.dataset.chapter === at.chapter));
  };
  const drawDoing = (s) => {
    $("doing").replaceChildren();
    if (ACTORS[s.actor]) $("doing").append(make("span", { class: `chip ${s.actor}` }, ACTORS[s.actor]));
    for (const [shown, name, epoch] of s.message.matchAll(/([A-Z_]+)(?:\((\d+)\))?/g)) {
      const chip = make("span", { class: "chip" });
      chip.append(make("b", {}, shown), ` ${messages[name].replace("{}", epoch)}`);
      $("doing").append(chip);
    }
    if (s.call) $("doing").append(make("code", { class: "chip" }, s.call));
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
    const c = chapter(), s = step(), top = panels.newest(c, at.step), pfn = at.page;
    box.append(make("h3", {}, `Page ${pfn}`));
    const list = make("dl");
    for (const panel of panels.shown(s)) {
      const value = panels.look(panel, s, top)[pfn];
      const dd = make("dd");
      if (value.text) dd.append(make("b", {}, value.text), ` ${value.words}`);
      else dd.append(value.words);
      list.append(make("dt", {}, panels.PANELS[panel].name), dd);
    }
    const table = make("table");
    table.append(make("caption", {}, "Its bytes through this chapter"));
    const head = make("tr");
    const ram = panels.isBounded(s);
    for (const name of ["step", "PVM", "cache", "SVM", ...(ram ? ["guest RAM"] : [])]) head.append(make("th", { scope: "col" }, name));
    table.append(head);
    c.steps.forEach((one, index) => {
      const row = make("tr", index === at.step ? { class: "now" } : {});
      row.append(make("th", { scope: "row" }, `${index + 1} ${one.title}`));
      for (const name of ["pvm", "cache", "svm"]) row.append(make("td", {}, one.images[name][pfn]));
      if (ram) row.append(make("td", {}, one.ram[pfn]));
      table.append(row);
    });
    box.append(list, table);
  };

  // ---- moving ----------------------------------------------------------------------------------------------------
  const go = (chapterIndex, stepIndex) => {
    if (chapterIndex !== at.chapter && chapters[chapterIndex].kind === "play") at.page = null;
    at.chapter = chapterIndex;
    at.step = stepIndex;
    play.moved();
    try {
      history.replaceState(null, "", `#${chapter().id}/${at.step + 1}`);
    } catch { /* Safari allows 100 in 30 s, a held arrow key is faster: then the address is a little behind */ }
    draw();
  };
  const choose = (pfn) => {
    at.page = at.page === pfn ? null : pfn;
    draw();
  };
  const pick = (panel, pfn) => {
    if (!play.pick(panel, pfn) && !quiz.pick(panel, pfn)) choose(pfn);
  };
  const forward = () => {
    if (at.step + 1 < chapter().steps.length) go(at.chapter, at.step + 1);
    else if (at.chapter + 1 < chapters.length) go(at.chapter + 1, 0);
    else stop();
  };
  const back = () => {
    if (at.step > 0) go(at.chapter, at.step - 1);
    else if (at.chapter > 0) go(at.chapter - 1, chapters[at.chapter - 1].steps.length - 1);
  };
  const chapterBy = (by) => {
    const to = Math.min(chapters.length - 1, Math.max(0, at.chapter + by));
    if (to === at.chapter && by > 0) return;
    go(to, 0);
    window.scrollTo(0, 0);
  };
  // Page Down reads on: down the page while there is more of it, then the next chapter.
  const pageKey = (by) => {
    const end = document.documentElement.scrollHeight - window.innerHeight;
    const more = by > 0 ? window.scrollY < end - 2 : window.scrollY > 2;
    if (more) window.scrollBy(0, by * window.innerHeight * 0.8);
    else chapterBy(by);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    $("run").textContent = "Run";
    $("run").setAttribute("aria-pressed", "false");
  };
  const run = () => {
    if (timer) return stop();
    timer = setInterval(forward, 6000);
    $("run").textContent = "Pause";
    $("run").setAttribute("aria-pressed", "true");
  };
  const fromHash = () => {
    const [id, number] = location.hash.slice(1).split("/");
    const index = chapters.findIndex((c) => c.id === id);
    if (index < 0) return go(0, 0);
    const steps = chapters[index].steps.length;
    go(index, Math.min(steps, Math.max(1, parseInt(number, 10) || 1)) - 1);
  };

  const KEYS = {
    ArrowRight: forward, n: forward, ArrowLeft: back, p: back,
    Home: () => go(at.chapter, 0), End: () => go(at.chapter, chapter().steps.length - 1),
    "]": () => chapterBy(1), "[": () => chapterBy(-1), PageDown: () => pageKey(1), PageUp: () => pageKey(-1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
    if (!Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  // Not by its hash: that names the step.
  $("skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("stage").focus();
    $("stage").scrollIntoView({ block: "nearest" });
  });
  $("scrubber").addEventListener("input", () => go(at.chapter, +$("scrubber").value - 1));
  $("chapter-select").addEventListener("change", () => go(+$("chapter-select").value, 0));
  $("next").addEventListener("click", forward);
  $("prev").addEventListener("click", back);
  $("run").addEventListener("click", run);
  window.addEventListener("hashchange", fromHash);

  panels.setup(recorded.guest, pick);
  panels.legend($("legend"));
  play.setup(recorded.guest, at, go);
  quiz.setup(recorded.guest, at, draw);
  handout.setup(chapter);
  buildChapters();
  fromHash();
  return { at, chapters };
})();
