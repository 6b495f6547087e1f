// SPDX-License-Identifier: Apache-2.0
// The exercise of `colocache teach --quiz`, in the page: two bitmaps are shown, the flush set is asked for, and why.
// The flush set is model.js's; the questions are quiz.py's.
"use strict";
const quiz = (() => {
  const { make } = panels;
  const whys = JSON.parse(document.getElementById("words-data").textContent).questions;
  const chapter = { id: "quiz", kind: "play", title: "Quiz", question: "Which pages will be flushed, and why?", answer: "", steps: [] };
  let at = null, redraw = () => {}, nPages = 0, exercise = null, right = 0, asked = 0, round = 0;

  const shuffled = (list) => {
    const left = [...list], out = [];
    while (left.length) out.push(left.splice(Math.floor(Math.random() * left.length), 1)[0]);
    return out;
  };
  // Pages of every kind: both, the PVM's alone, the SVM's alone.
  const drift = (state) => {
    const pages = shuffled([...Array(nPages).keys()]).slice(0, 9 + Math.floor(Math.random() * 5));
    const kinds = pages.map((pfn, n) => [pfn, n < 2 ? "PS" : n < 5 ? "P" : n < 8 ? "S" : ["P", "S", "PS"][Math.floor(Math.random() * 3)]]);
    for (const [pfn, kind] of kinds) {
      if (kind.includes("P")) state = model.act(state, "pvm-writes", pfn).state;
      if (kind.includes("S")) state = model.act(state, "svm-writes", pfn).state;
    }
    return kinds.reduce((found, [pfn, kind]) => ({ ...found, [kind]: Math.min(pfn, found[kind] ?? nPages) }), { state });
  };
  const next = () => {
    const found = drift(model.start(nPages));
    let { state } = found;
    for (const id of ["pause", "send", "take-log", "device-state"]) state = model.act(state, id).state;
    const after = model.act(state, "seal").state;
    const why = whys[round++ % whys.length];
    const fill = (text) => text.replace("{svm_only}", found.S).replace("{pvm_only}", found.P);
    exercise = {
      before: state, after, chosen: Array(nPages).fill(false), checked: false, said: [], answered: false,
      why: { question: fill(why.question), because: why.because, right: why.choices[0], choices: shuffled(why.choices) },
    };
    show();
  };

  // ---- the step that is drawn ----------------------------------------------------------------------------------------
  const show = () => {
    const { before, after, chosen, checked } = exercise;
    const shown = model.step(checked ? after : before, {
      title: `Exercise ${round}`,
      text: "An epoch has arrived, and the SVM's log is taken. Click, in the flush set, each page that the engine will copy.",
    });
    if (checked) shown.missed = after.flush.map((bit, pfn) => bit !== chosen[pfn]);
    else Object.assign(shown, { bitmaps: { ...shown.bitmaps, flush: chosen.map((bit) => (bit ? "1" : "0")).join("") }, origin: ".".repeat(nPages), flush_state: "answer" });
    if (checked) shown.bitmaps = { ...shown.bitmaps, pvm: model.step(before, {}).bitmaps.pvm, svm: model.step(before, {}).bitmaps.svm };
    chapter.steps = [shown];
    redraw();
  };
  const isHere = () => at !== null && at.chapter === at.quizChapter;
  const pick = (panel, pfn) => {
    if (!isHere() || panel !== "flush-set" || exercise.checked) return false;
    exercise.chosen[pfn] = !exercise.chosen[pfn];
    show();
    return true;
  };
  const check = () => {
    const { after, chosen } = exercise;
    const missing = after.flush.filter((bit, pfn) => bit && !chosen[pfn]).length;
    const extra = after.flush.filter((bit, pfn) => !bit && chosen[pfn]).length;
    const n = model.plural(model.count(after.flush), "page");
    exercise.said = [];
    if (!missing && !extra) exercise.said.push(`✓ Right: the engine flushes the same ${n}, the union of both bitmaps.`);
    if (missing) exercise.said.push(`✕ ${model.plural(missing, "page")} missing: there guest RAM would not be what the PVM had.`);
    if (extra) exercise.said.push(`✕ ${model.plural(extra, "page")} too many: no harm, a needless copy, as nobody wrote there.`);
    if (missing || extra) exercise.said.push(`The flush set has ${n}; where you differ is marked.`);
    right += !missing && !extra;
    asked += 1;
    exercise.checked = true;
    show();
  };
  const answer = (choice) => {
    const { why } = exercise;
    exercise.answered = true;
    asked += 1;
    right += choice === why.right;
    exercise.because = choice === why.right ? `✓ Right. ${why.because}` : `✕ It is: “${why.right}” ${why.because}`;
    redraw();
  };
  const draw = () => {
    const box = document.getElementById("quiz");
    box.hidden = !isHere();
    document.body.classList.toggle("quizzing", isHere());
    if (box.hidden) return;
    const { checked, said, answered, because, why } = exercise;
    const parts = said.map((line) => make("p", {}, line));
    const button = (text, pressed) => {
      const made = make("button", { type: "button" }, text);
      made.addEventListener("click", pressed);
      return made;
    };
    if (!checked) parts.push(button("Check", check));
    else if (!answered) {
      const choices = make("div", { class: "choices" });
      choices.append(...why.choices.map((choice) => button(choice, () => answer(choice))));
      parts.push(make("p", { class: "asked" }, why.question), choices);
    } else parts.push(make("p", { class: "asked" }, why.question), make("p", {}, because), button("Next exercise", next));
    parts.push(make("p", { class: "score" }, asked ? `${right} of ${asked} right` : ""));
    box.replaceChildren(...parts);
  };
  const setup = (guest, where, drawAgain) => {
    nPages = guest.n_pages;
    at = where;
    redraw = () => {};
    next();
    redraw = drawAgain;
  };
  return { chapter, setup, pick, draw };
})();
