// SPDX-License-Identifier: Apache-2.0
// Playing: the chapter whose steps the reader makes. Each action adds a step; acting from an earlier step forgets the
// later ones, so that another way can be tried from there.
"use strict";
const play = (() => {
  const { make } = panels;
  const WRITES = { "pvm-memory": "pvm-writes", "svm-memory": "svm-writes" };
  const SIDES = { pvm: "PVM", svm: "SVM" };
  const chapter = {
    id: "play", kind: "play", title: "Play it yourself", question: "Can you lose a page, or the machine?",
    answer: "", steps: [],
  };
  let states = [], at = null, go = () => {}, nPages = 0;
  let question = null, score = { right: 0, asked: 0 };

  const begin = () => {
    const state = model.start(nPages);
    states = [state];
    question = null;
    chapter.steps = [model.step(state, {
      title: "Two machines, in step at epoch 1", target: 1,
      text: "Click pages in PVM memory or SVM memory: that machine writes them. Then run a checkpoint yourself, step by step, and kill whom you like.",
    })];
  };
  const state = () => states[at.step];
  const isHere = () => at !== null && at.chapter === at.playChapter;

  // ---- acting ----------------------------------------------------------------------------------------------------
  const act = (id, pfn = -1, told = "") => {
    if (model.why(state(), id)) return false;
    const { state: next, said } = model.act(state(), id, pfn);
    const last = chapter.steps[at.step];
    const made = model.step(next, said);
    made.text = told + made.text;
    let place = at.step + 1;
    if (pfn >= 0) { // writes one after the other are one step
      const goesOn = last.written && last.writer === id && at.step === chapter.steps.length - 1;
      made.writer = id;
      made.written = goesOn ? [...last.written, pfn] : [pfn];
      const pages = [...new Set(made.written)].sort((a, b) => a - b);
      made.title = `${said.title} page${pages.length > 1 ? "s" : ""} ${pages.length > 8 ? `${pages.slice(0, 7).join(", ")} … (${pages.length})` : pages.join(", ")}`;
      if (goesOn) place = at.step;
    }
    states.length = chapter.steps.length = place;
    states.push(next);
    chapter.steps.push(made);
    go(at.chapter, place);
    return true;
  };
  const press = (id) => {
    question = document.getElementById("ask-first").checked ? predict.ask(state(), id) : null;
    if (!question) return act(id);
    question.id = id;
    draw();
    document.querySelector("#controls .choices button").focus();
    return true;
  };
  const answer = (choice) => {
    const { id, right } = question, good = choice === right;
    score = { right: score.right + good, asked: score.asked + 1 };
    question = null;
    act(id, -1, good ? "✓ You were right. " : `✕ You said: “${choice}” It is: “${right}” `);
  };
  const theRest = () => {
    for (let id = model.due(state()); id && act(id); id = model.due(state())) if (id === "loaded") break;
  };
  const restart = () => {
    begin();
    go(at.chapter, 0);
  };

  // ---- drawing -----------------------------------------------------------------------------------------------------
  const draw = () => {
    const box = document.getElementById("controls");
    document.body.classList.toggle("playing", isHere());
    document.body.classList.toggle("asking", isHere() && document.getElementById("ask-first").checked);
    box.hidden = !isHere();
    if (!isHere()) return;
    document.getElementById("question-box").replaceChildren(...(question ? asking() : []));
    document.getElementById("actions").hidden = document.getElementById("options").hidden = question !== null;
    const due = model.due(state());
    for (const button of box.querySelectorAll("[data-act]")) {
      const why = model.why(state(), button.dataset.act);
      button.disabled = why !== "";
      button.title = why;
      button.classList.toggle("due", button.dataset.act === due);
    }
    document.getElementById("the-rest").disabled = due === "";
    document.getElementById("score").textContent = score.asked ? `${score.right} of ${score.asked} right` : "";
  };
  const asking = () => {
    const choices = make("div", { class: "choices" });
    for (const choice of question.choices) {
      const button = make("button", { type: "button" }, choice);
      button.addEventListener("click", () => answer(choice));
      choices.append(button);
    }
    return [make("p", { class: "asked" }, `Before you see it: ${question.question}`), choices];
  };
  const build = () => {
    const box = document.getElementById("actions");
    for (const [side, name] of Object.entries(SIDES)) {
      const group = make("div", { role: "group", class: `acts ${side}`, "aria-label": name });
      group.append(make("span", { class: "host-name", "aria-hidden": "true" }, name));
      for (const action of model.actions.filter((one) => one.side === side && one.label)) {
        const button = make("button", { type: "button", "data-act": action.id }, action.label);
        if (action.harm) button.classList.add("harm");
        button.addEventListener("click", () => press(action.id));
        group.append(button);
      }
      box.append(group);
    }
    document.getElementById("the-rest").addEventListener("click", theRest);
    document.getElementById("restart").addEventListener("click", restart);
    document.getElementById("ask-first").addEventListener("change", draw);
  };
  // A click on a page: true if it was a write of the game.
  const pick = (panel, pfn) => isHere() && !question && WRITES[panel] !== undefined && act(WRITES[panel], pfn);
  const setup = (guest, where, goTo) => {
    nPages = guest.n_pages;
    at = where;
    go = goTo;
    begin();
    build();
  };
  const moved = () => { question = null; };
  return { chapter, setup, pick, draw, moved, act, restart, state, offered: () => model.actions.map((one) => one.id).filter((id) => !model.why(state(), id)) };
})();
