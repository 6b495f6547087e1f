// SPDX-License-Identifier: Apache-2.0
// "Before you see it": questions about what an action will do. The right answer is what model.js comes to.
"use strict";
const predict = (() => {
  const AT_ONCE = "It takes over at once, from its own memory.";
  const NOBODY = "Nothing: there is no state to take over from.";
  const REPLAY = "The flush is repeated: exactly the sealed epoch.";
  const WHOLE = "The cache is still the last epoch: all of it is copied.";
  const NOTHING = "Nothing to restart from, until the next checkpoint.";

  const shuffled = (list) => {
    const left = [...list], out = [];
    while (left.length) out.push(left.splice(Math.floor(Math.random() * left.length), 1)[0]);
    return out;
  };
  const asked = (question, choices, right) => ({ question, choices: shuffled([...new Set([right, ...choices])]), right });

  const pvmDies = (s) => {
    const finish = `It finishes epoch ${Math.max(s.sealed, s.open || s.sealed)} first, then takes over from it.`;
    const right = s.phase === "empty" ? NOBODY : s.sealed > s.committed ? finish : AT_ONCE;
    return asked("The PVM dies. What can its secondary do?", [AT_ONCE, finish, NOBODY], right);
  };
  const svmDies = (s) => {
    const right = s.sealed > s.committed ? REPLAY : s.receiving > s.sealed ? NOTHING : WHOLE;
    return asked("The SVM's process dies. What will the next process find?", [REPLAY, WHOLE, NOTHING], right);
  };
  const sealed = (s) => {
    const p = model.count(s.pvmBits), b = model.count(s.svmBits);
    const union = model.count(s.pvmBits.map((bit, pfn) => bit || s.svmBits[pfn]));
    const all = [union, p + b, p, b, s.n].map((n) => model.plural(n, "page"));
    return asked(`The PVM bitmap has ${p}, the SVM bitmap ${b}. How large will the flush set be?`, all, all[0]);
  };
  const flushed = (s) => {
    const wrong = s.svm.filter((page, pfn) => (s.flush[pfn] ? s.cache[pfn] : page) !== s.epochs[s.sealed][pfn]).length;
    const good = `Exactly epoch ${s.sealed}.`;
    const some = wrong || Math.max(1, model.count(s.flush) >> 1);
    return asked("What will SVM memory be after the flush?", [good, `Not epoch ${s.sealed}: ${model.plural(some, "page")} will be wrong.`], wrong ? `Not epoch ${s.sealed}: ${model.plural(wrong, "page")} will be wrong.` : good);
  };

  // A question before this action in this state; null if there is nothing to ask.
  const ask = (s, id) => {
    if (id === "kill-pvm") return pvmDies(s);
    if (id === "kill-svm" || id === "kill-in-flush") return svmDies(s);
    if (id === "seal" && s.phase !== "sealing" && s.open && s.staged === s.open) return sealed(s);
    if (id === "flush" && s.sealed > s.committed) return flushed(s);
    return null;
  };
  return { ask };
})();
