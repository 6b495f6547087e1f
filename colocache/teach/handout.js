// SPDX-License-Identifier: Apache-2.0
// Paper: printing a chapter prints all of its steps, each with its grids, as one handout.
"use strict";
const handout = (() => {
  const { make } = panels;
  const IF = { pvm: "If the PVM died now", svm: "If the SVM's process died now" };
  const stepOf = (chapter, number) => {
    const s = chapter.steps[number], before = number ? chapter.steps[number - 1] : null, top = panels.newest(chapter, number);
    const section = make("section", { class: "sheet" });
    const doing = [s.message, s.call].filter(Boolean).join("   ");
    section.append(make("h2", {}, `${number + 1}. ${s.title}`), make("p", {}, s.text));
    if (doing) section.append(make("p", { class: "soft" }, doing));
    const row = make("div", { class: "copies" });
    row.append(...panels.shown(s).map((panel) => panels.copy(panel, s, before, top)));
    section.append(row, make("p", { class: "soft" }, `SVM memory: ${s.verdict.sentence}`));
    for (const side of ["pvm", "svm"]) if (s.if_now[side]) section.append(make("p", { class: "soft" }, `${IF[side]}: ${s.if_now[side]}`));
    return section;
  };
  const fill = (chapter) => {
    const box = document.getElementById("handout");
    const legend = make("ul", { class: "key" });
    panels.legend(legend);
    box.replaceChildren(make("h1", {}, chapter.title), make("p", { class: "question" }, chapter.question), legend);
    box.append(...chapter.steps.map((_, number) => stepOf(chapter, number)));
    if (chapter.answer) box.append(make("p", { class: "end" }, chapter.answer));
  };
  const setup = (chapter) => {
    window.addEventListener("beforeprint", () => fill(chapter()));
    window.addEventListener("afterprint", () => document.getElementById("handout").replaceChildren());
  };
  return { setup };
})();
