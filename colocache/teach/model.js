// SPDX-License-Identifier: Apache-2.0
// The pair of machines that the page lets you play: what the engine does, as a small model.
//
// It computes what a recorded lesson would hold after each action. tests/test_teach_play.py plays at random in a browser
// and does the same with the real engine: every image, bitmap and number must agree after every action.
//
// A state is plain data; an action is {id, side, label, harm, why, run}. `why(s)` says in a sentence why it can't be done now,
// "" if it can; `run(s, pfn)` changes the state and returns what to say about it. What the engine itself would refuse can
// be tried: `run` then says so, and `refused` is true.
"use strict";
const model = (() => {
  const NEVER = "-";
  const fill = (n, value) => Array(n).fill(value);
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const count = (bits) => bits.filter(Boolean).length;
  const text = (bits) => bits.map((bit) => (bit ? "1" : "0")).join("");

  // Two machines in step at epoch 1, as every chapter but the first begins.
  const start = (n) => ({
    n, pvm: fill(n, "P1"), cache: fill(n, "P1"), svm: fill(n, "P1"),
    pvmLog: fill(n, false), svmLog: fill(n, false), // the hypervisors' dirty logs
    unacked: fill(n, false), pending: fill(n, false),
    pvmBits: fill(n, false), svmBits: fill(n, false), flush: fill(n, true), origin: fill(n, "P"),
    phase: "live", sealed: 1, committed: 1, receiving: 1,
    open: 0, staged: 0, // the epoch that is arriving; the one whose device state is there
    used: 1, asked: 0, stamp: 2, // the PVM: newest number used; checkpoint under way; what its writes are marked with
    pvmAlive: true, svmAlive: true, pvmPaused: false, svmPaused: false, takeOverAfter: false,
    epochs: { 1: fill(n, "P1") },
  });

  // ---- pieces of actions -------------------------------------------------------------------------------------
  const or = (into, bits) => bits.forEach((bit, pfn) => { if (bit) into[pfn] = true; });
  const clear = (bits) => bits.fill(false);
  const pvmSync = (s) => { or(s.unacked, s.pvmLog); or(s.pending, s.pvmLog); clear(s.pvmLog); };
  const received = (s) => { clear(s.unacked); clear(s.pending); s.asked = 0; s.pvmPaused = false; };
  const resend = (s) => { or(s.pending, s.unacked); s.asked = 0; s.pvmPaused = false; };
  const openEpoch = (s, epoch) => { s.open = s.receiving = epoch; };
  const giveUpEpoch = (s) => { s.open = s.staged = 0; s.svmPaused = false; };
  const copyFlushSet = (s) => s.flush.forEach((bit, pfn) => { if (bit) s.svm[pfn] = s.cache[pfn]; });
  const unsent = (s) => s.pending.some(Boolean) || (!s.pvmPaused && s.pvmLog.some(Boolean));
  const number = (s) => s.asked || s.open || s.used + 1;

  const send = (s, share) => {
    if (!s.pvmPaused) pvmSync(s);
    const epoch = (s.used = number(s));
    const waiting = [...s.pending.keys()].filter((pfn) => s.pending[pfn]);
    const going = waiting.slice(0, Math.ceil(waiting.length * share));
    openEpoch(s, epoch);
    for (const pfn of going) {
      s.pending[pfn] = false;
      s.cache[pfn] = s.pvm[pfn];
      s.pvmBits[pfn] = true;
    }
    return {
      title: `${plural(going.length, "page")} of epoch ${epoch} arrive`, actor: "wire", message: `PAGES(${epoch})`,
      call: `sender.send(socket, epoch=${epoch}); cache.receive_stream(socket)`,
      text: "Their bytes go into the cache, and then each gets its bit in the PVM bitmap. SVM memory is not touched, and in unacked they stay until RECEIVED.",
    };
  };
  const refuse = (call, sentence, more = "Nothing has changed.") =>
    ({ title: "The engine refuses", refused: true, actor: "svm", call, text: `${sentence} ${more}` });

  // ---- what may be done when ---------------------------------------------------------------------------------
  const over = (s) => (s.phase === "failed_over" ? "The SVM has taken over: this play is at its end." : "");
  const noPvm = (s) => over(s) || (s.pvmAlive ? "" : "The PVM is dead.");
  const noSvm = (s) => over(s) || (s.svmAlive ? "" : "The SVM's process is dead.");
  const notBoth = (s) => noPvm(s) || noSvm(s);
  const whileFlushed = (s) => (s.phase === "sealing" ? `Epoch ${s.sealed} is being flushed and loaded: the next one waits for that.` : "");
  const needsAsked = (s) => (s.asked && s.asked !== s.sealed ? "" : "No checkpoint is under way: pause the PVM first.");

  const actions = [
    {
      id: "pvm-writes", side: "pvm", label: "",
      why: (s) => noPvm(s) || (s.pvmPaused ? "The PVM is paused." : ""),
      run: (s, pfn) => {
        s.pvm[pfn] = `P${s.stamp}`;
        s.pvmLog[pfn] = true;
        return {
          title: "The PVM writes", actor: "pvm",
          text: `Its hypervisor's dirty log notes it; no bitmap knows of it yet. The cache and SVM memory are what they were.`,
        };
      },
    },
    {
      id: "svm-writes", side: "svm", label: "",
      why: (s) => noSvm(s) || (s.phase !== "live" ? "The SVM does not run." : s.svmPaused ? "The SVM is paused." : ""),
      run: (s, pfn) => {
        s.svm[pfn] = `S${s.committed + 1}`;
        s.svmLog[pfn] = true;
        return {
          title: "The SVM writes", actor: "svm",
          text: "Its own dirty log, on its own host, notes it. The PVM has no way to know.",
        };
      },
    },
    {
      id: "pause", side: "pvm", label: "Pause",
      why: (s) => notBoth(s) || whileFlushed(s) || (s.pvmPaused ? "The PVM is paused." : ""),
      run: (s) => {
        const epoch = (s.asked = s.used = number(s));
        s.epochs[epoch] = s.pvm.slice();
        pvmSync(s);
        s.stamp = epoch + 1;
        s.pvmPaused = true;
        return {
          title: `The PVM pauses for epoch ${epoch}`, actor: "pvm", call: "sender.sync_dirty_log(log)", message: `CHECKPOINT_REQUEST(${epoch})`,
          text: `What its memory is now is epoch ${epoch}. Its dirty log is taken into unacked, and ${plural(count(s.pending), "page")} wait to be sent (w).`,
        };
      },
    },
    {
      id: "send-half", side: "pvm", label: "Send half",
      why: (s) => notBoth(s) || whileFlushed(s) || (unsent(s) ? "" : "No page waits to be sent."),
      run: (s) => send(s, 0.5),
    },
    {
      id: "send", side: "pvm", label: "Send all",
      why: (s) => notBoth(s) || whileFlushed(s) || (unsent(s) ? "" : "No page waits to be sent."),
      run: (s) => send(s, 1),
    },
    {
      id: "take-log", side: "svm", label: "Pause, take its log",
      why: (s) => noSvm(s) || whileFlushed(s) || (s.svmPaused ? "The SVM is paused, and its log is taken." : ""),
      run: (s) => {
        const n = count(s.svmLog);
        or(s.svmBits, s.svmLog);
        clear(s.svmLog);
        s.svmPaused = true;
        return {
          title: "The SVM's log becomes the SVM bitmap", actor: "svm", call: "cache.sync_dirty_log(log)",
          text: `The SVM stands still, and the ${plural(n, "page")} of its log are noted. Whatever it wrote after this, no list would know.`,
        };
      },
    },
    {
      id: "device-state", side: "pvm", label: "Send the registers",
      why: (s) => notBoth(s) || whileFlushed(s) || needsAsked(s) ||
        (unsent(s) ? "That it was all goes last: pages still wait to be sent." : s.staged ? "It is there already." : ""),
      run: (s) => {
        openEpoch(s, s.asked);
        s.staged = s.asked;
        return {
          title: `The registers of epoch ${s.asked} arrive`, actor: "wire", call: `cache.device_state_buffer(${s.asked}, n)`, message: `VMSTATE_SEND(${s.asked}), VMSTATE_SIZE(${s.asked})`,
          text: "Registers and devices of the PVM as it stood when it paused. Now all of the epoch is here, and nothing is decided yet.",
        };
      },
    },
    {
      id: "seal", side: "svm", label: "Seal",
      why: (s) => notBoth(s),
      run: (s) => {
        const call = `cache.seal(${s.open || s.asked || s.used + 1})`;
        if (s.phase === "sealing") return refuse(call, `Epoch ${s.sealed} is sealed already: flush it, and load it, first.`);
        if (!s.open) return refuse(call, "No epoch has begun to arrive, so there is none to seal.");
        if (s.staged !== s.open) {
          const lost = s.open;
          giveUpEpoch(s);
          resend(s);
          return refuse(call, `Epoch ${lost} has no device state, so it is not complete, and it is aborted.`,
            "Its number is spent; bits and bytes that came are kept, and the PVM will send again what is unacked.");
        }
        s.origin = s.pvmBits.map((p, pfn) => (p ? (s.svmBits[pfn] ? "B" : "P") : s.svmBits[pfn] ? "S" : "."));
        s.flush = s.origin.map((letter) => letter !== ".");
        s.sealed = s.open;
        s.open = s.staged = 0;
        clear(s.pvmBits);
        clear(s.svmBits);
        s.phase = "sealing";
        s.svmPaused = true;
        const of = (letter) => s.origin.filter((one) => one === letter).length;
        return {
          title: `Epoch ${s.sealed} is sealed`, actor: "svm", call,
          text: `The flush set is the union: ${of("P")} pages by the PVM alone, ${of("S")} by the SVM alone, ${of("B")} by both. From now on the epoch will be finished, whoever dies; both bitmaps belong to the next.`,
        };
      },
    },
    {
      id: "received", side: "svm", label: "Say RECEIVED",
      why: (s) => notBoth(s) || (s.asked && s.asked === s.sealed ? "" : s.asked ? "Only after the seal: the PVM forgets its pages on it." : "The PVM waits for no answer."),
      run: (s) => {
        const epoch = s.asked;
        received(s);
        return {
          title: `RECEIVED(${epoch})`, actor: "wire", call: "sender.received()", message: `VMSTATE_RECEIVED(${epoch})`,
          text: "The PVM empties unacked and lets its output out. Its epoch can no longer be lost, so it may run on while the SVM flushes.",
        };
      },
    },
    {
      id: "flush", side: "svm", label: "Flush",
      why: (s) => noSvm(s),
      run: (s) => {
        if (s.phase !== "sealing" || s.committed === s.sealed) return refuse("cache.flush()", `There is nothing to flush: epoch ${s.sealed}, the newest that is sealed, is committed.`);
        copyFlushSet(s);
        s.committed = s.sealed;
        return {
          title: "Flushed", actor: "svm", call: "cache.flush()", target: s.committed,
          text: `${plural(count(s.flush), "page")} were copied from the cache over guest RAM, and epoch ${s.committed} is committed. Every other page should have been the same already.`,
        };
      },
    },
    {
      id: "loaded", side: "svm", label: "Load and run",
      why: (s) => noSvm(s),
      run: (s) => {
        if (s.phase !== "sealing") return refuse("cache.loaded()", "No epoch is sealed, so none can have been loaded.");
        if (s.committed !== s.sealed) return refuse("cache.loaded()", `Epoch ${s.sealed} is sealed but not flushed: its registers fit no other memory.`);
        s.phase = s.takeOverAfter ? "failed_over" : "live";
        s.svmPaused = false;
        return {
          title: s.takeOverAfter ? "Now the SVM takes over" : `In step at epoch ${s.committed}`, actor: "svm", call: "cache.loaded()",
          message: s.pvmAlive ? `VMSTATE_LOADED(${s.committed})` : "", target: s.committed,
          text: s.takeOverAfter ? "It runs from the very epoch whose output the world may have seen. This play is at its end." : "The SVM has the epoch's memory and registers, and it runs. From here the two drift apart again.",
        };
      },
    },
    {
      id: "cut", side: "pvm", label: "Cut the connection", harm: true,
      why: (s) => notBoth(s) || (s.open || s.asked ? "" : "Nothing is under way that it could hurt: write a page, send it."),
      run: (s) => {
        const lost = s.open;
        if (lost) giveUpEpoch(s);
        s.svmPaused = s.phase === "sealing";
        if (s.asked && s.asked === s.sealed) {
          received(s);
          return {
            title: "Cut, and connected again", actor: "nobody", message: "HELLO",
            text: `Epoch ${s.sealed} was sealed, and the SVM says so when they meet again. That is as good as RECEIVED: the PVM empties unacked.`,
          };
        }
        resend(s);
        return {
          title: "Cut, and connected again", actor: "nobody", call: lost ? `cache.abort(${lost}, "the connection was lost"); sender.resend()` : "sender.resend()", message: lost ? `ABORT(${lost})` : "HELLO",
          text: `${lost ? `Epoch ${lost} is aborted, and its number is spent. ` : ""}Bits and bytes that came stay, for the next epoch. The PVM sends again what is unacked (w), not all of RAM.`,
        };
      },
    },
    {
      id: "kill-pvm", side: "pvm", label: "Kill the PVM", harm: true,
      why: (s) => notBoth(s),
      run: (s) => {
        s.pvmAlive = false;
        return {
          title: "The PVM dies", actor: "pvm",
          text: "Its memory, unacked and whatever it had not sent are gone. What can its secondary do?",
        };
      },
    },
    {
      id: "failover", side: "svm", label: "Fail over",
      why: (s) => noSvm(s) || (s.pvmAlive ? "The PVM lives: two machines must not both be the one." : s.takeOverAfter ? "It will, after the flush." : ""),
      run: (s) => {
        const call = "cache.failover()";
        if (s.phase === "empty") return refuse(call, "There is no state to take over from: its own process had died, and no checkpoint had mended that yet.", "These are two failures at once.");
        if (s.phase === "sealing") {
          s.takeOverAfter = true;
          return { title: "Not yet", actor: "svm", call, text: `Epoch ${s.sealed} is sealed, and the world may have seen its output. So it is flushed and loaded first, and then the SVM takes over.` };
        }
        s.phase = "failed_over";
        s.svmPaused = false;
        return { title: "The SVM takes over", actor: "svm", call, text: "From its own memory, at once. What had come of a newer epoch stays in the cache, unused; this play is at its end." };
      },
    },
    {
      id: "kill-svm", side: "svm", label: "Kill its process", harm: true,
      why: (s) => notBoth(s),
      run: (s) => dies(s, "SIGKILL"),
    },
    {
      id: "kill-in-flush", side: "svm", label: "Kill in mid-flush", harm: true,
      why: (s) => notBoth(s) || (s.phase === "sealing" && s.committed !== s.sealed && count(s.flush) > 1 ? "" : "Only between seal and flush, with two pages or more to copy."),
      run: (s) => {
        const pfns = [...s.flush.keys()].filter((pfn) => s.flush[pfn]);
        for (const pfn of pfns.slice(0, Math.floor(pfns.length / 2))) s.svm[pfn] = s.cache[pfn];
        return { ...dies(s, "SIGKILL, half way through the copy"), target: s.sealed };
      },
    },
    {
      id: "attach", side: "svm", label: "Attach a new one",
      why: (s) => over(s) || (s.svmAlive ? "The SVM's process lives." : ""),
      run: (s) => {
        const told = attach(s);
        if (s.asked && s.asked === s.sealed) received(s);
        else resend(s);
        return { actor: "svm", call: "Cache.attach(memory)", message: "HELLO", ...told };
      },
    },
  ];

  const dies = (s, title) => {
    s.svmAlive = false;
    s.open = s.staged = 0;
    s.svmPaused = s.pvmPaused = s.takeOverAfter = false;
    clear(s.svmLog);
    return {
      title, actor: "svm",
      text: "Its registers and its dirty log died with it; both images, the bitmaps and the commit word are in shared memory and stay. The PVM carries on alone.",
    };
  };
  // As recover.c decides: by the newest record, and by the newest epoch of which a page may have come.
  const attach = (s) => {
    s.svmAlive = true;
    if (s.sealed > s.committed) {
      copyFlushSet(s);
      s.committed = s.sealed;
      s.phase = "live";
      return { title: "Attach: the flush is replayed", target: s.sealed, text: `Epoch ${s.sealed} was sealed and not committed, so all ${count(s.flush)} pages of its flush set are copied again. Copying twice does no harm.` };
    }
    if (s.receiving === s.sealed) {
      s.svm = s.cache.slice();
      s.phase = "live";
      return { title: `Attach: restart from epoch ${s.sealed}`, target: s.sealed, text: `No newer page had come, so the cache is exactly epoch ${s.sealed}. All of it is copied, and the VM restarts with that epoch's registers.` };
    }
    s.svmBits.fill(true);
    s.phase = "empty";
    return { title: "Attach: nothing to restart from", text: `The cache holds pages newer than epoch ${s.sealed}, and the machine that ran is gone. Every page counts as written by the SVM: the next checkpoint makes it whole, and sends only what is unacked or new.` };
  };

  // ---- what is next in an ordinary checkpoint; what would be the step of a recording ---------------------------
  const due = (s) => {
    if (s.phase === "failed_over") return "";
    if (!s.svmAlive) return "attach";
    if (!s.pvmAlive && s.phase === "empty") return "";
    if (!s.pvmAlive && !s.takeOverAfter) return "failover";
    if (s.pvmAlive && s.asked && s.asked === s.sealed) return "received";
    if (s.phase === "sealing") return s.committed === s.sealed ? "loaded" : "flush";
    if (!s.asked) return "pause";
    if (s.pending.some(Boolean)) return "send";
    if (!s.svmPaused) return "take-log";
    return s.staged ? "seal" : "device-state";
  };
  const step = (s, said) => {
    const nothing = fill(s.n, false), alive = { pvm: s.pvmAlive, svm: s.svmAlive };
    const status = { phase: s.phase, sealed: s.sealed, committed: s.committed, receiving: s.receiving };
    const target = said.target || 0;
    const wrong = s.svm.map((page, pfn) => target !== 0 && page !== s.epochs[target][pfn]);
    const verdict = judge.verdict(s.svm, s.epochs);
    const runs = s.svmAlive && s.phase !== "empty";
    return {
      title: said.title, text: said.text, actor: said.actor || "nobody", call: said.call || "", message: said.message || "",
      images: { pvm: s.pvmAlive ? s.pvm.slice() : fill(s.n, NEVER), cache: s.cache.slice(), svm: s.svm.slice() },
      bitmaps: {
        pvm: text(s.pvmBits), svm: text(s.svmBits), flush: text(s.flush),
        unacked: text(s.pvmAlive ? s.unacked : nothing), pending: text(s.pvmAlive ? s.pending : nothing),
      },
      origin: s.origin.map((letter, pfn) => (s.flush[pfn] ? letter : ".")).join(""),
      flush_state: s.sealed > s.committed ? "due" : "done", focus: text(nothing), status, alive,
      verdict: { ...verdict, sentence: judge.sentence(verdict, runs, count(wrong), target) },
      target, wrong: text(wrong), if_now: judge.ifNow(status, alive, verdict),
    };
  };
  const act = (s, id, pfn) => {
    const action = actions.find((one) => one.id === id);
    const next = structuredClone(s);
    return { state: next, said: action.run(next, pfn) };
  };
  const why = (s, id) => actions.find((one) => one.id === id).why(s);
  return { start, actions, act, why, due, step, plural, count };
})();
