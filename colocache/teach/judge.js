// SPDX-License-Identifier: Apache-2.0
// What an image is, and what would happen now: judge.py again, for the states that the page computes itself.
// tests/test_teach_play.py compares the two.
"use strict";
const judge = (() => {
  const same = (image, other) => image.every((page, pfn) => page === other[pfn]);
  const verdict = (image, epochs) => {
    const numbers = Object.keys(epochs).map(Number).sort((a, b) => b - a);
    const exact = numbers.find((epoch) => same(image, epochs[epoch]));
    if (exact) return { kind: "epoch", epoch: exact };
    const live = numbers.find((epoch) => image.every((page, pfn) => page === epochs[epoch][pfn] || page === `S${epoch + 1}`));
    return live ? { kind: "live", epoch: live } : { kind: "mixed", epoch: 0 };
  };
  const sentence = ({ kind, epoch }, svmRuns, nWrong, target) => {
    if (kind === "mixed") return `No state that any machine ever had${nWrong ? `, ${nWrong} pages are not epoch ${target}` : ""}.`;
    if (kind === "epoch") return `Exactly epoch ${epoch}.`;
    return svmRuns ? `The SVM's own state: epoch ${epoch} and what it wrote since.` : `What the dead machine left: epoch ${epoch} and its own writes.`;
  };
  const ifNow = ({ phase, sealed, committed, receiving }, alive, { kind }) => {
    const due = sealed > committed, torn = kind === "mixed" && !due, over = phase === "failed_over";
    let pvm = "The SVM would take over at once, from its own memory.";
    if (!alive.svm && due) pvm = `A new process could finish epoch ${sealed} from shared memory and take over; until then nobody runs.`;
    else if (!alive.svm) pvm = "Nobody could take over: the secondary's process is dead.";
    else if (phase === "empty") pvm = "Nobody could take over: there is no state that could run.";
    else if (phase === "sealing" && due) pvm = `The SVM would finish epoch ${sealed} first and then take over from it.`;
    else if (torn) pvm = "The SVM would run on with this memory, and it is wrong.";
    let svm = `The cache is exactly epoch ${sealed}: the next process would copy all of it and restart from there.`;
    if (due) svm = `The next process would replay the flush and have exactly epoch ${sealed}.`;
    else if (receiving > sealed) svm = `Pages of epoch ${receiving} are in the cache: nothing to restart from until the next checkpoint.`;
    return { pvm: alive.pvm && !over ? pvm : "", svm: alive.svm && alive.pvm && !over && !torn ? svm : "" };
  };
  return { verdict, sentence, ifNow };
})();
