# SPDX-License-Identifier: Apache-2.0
"""What an image is: an epoch, an epoch with the SVM's own writes on top, or something no machine ever had.

Pure functions over what was recorded, so that a test, the web page and a teacher come to the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colocache.teach.tags import NEVER

Image = Sequence[str]
KINDS = ("empty", "epoch", "live", "mixed")


@dataclass(frozen=True)
class Verdict:
    """kind: "empty", "epoch" (exactly `epoch`), "live" (`epoch` and the SVM's own writes since) or "mixed"."""

    kind: str
    epoch: int


def judge(image: Image, epochs: Mapping[int, Image]) -> Verdict:
    """What `image` is, given PVM memory at each epoch. The newest epoch that fits."""
    for epoch in sorted(epochs, reverse=True):
        if list(image) == list(epochs[epoch]):
            return Verdict("epoch", epoch)
    for epoch in sorted(epochs, reverse=True):
        own = f"S{epoch + 1}"
        if all(page in (there, own) for page, there in zip(image, epochs[epoch], strict=True)):
            return Verdict("live", epoch)
    if all(page == NEVER for page in image):
        return Verdict("empty", 0)
    return Verdict("mixed", 0)


def wrong_pages(image: Image, epoch: Image) -> str:
    """One character per page: 1 where `image` is not what `epoch` is."""
    return "".join("0" if page == there else "1" for page, there in zip(image, epoch, strict=True))


def sentence(verdict: Verdict, *, svm_runs: bool, n_wrong: int = 0, target: int = 0) -> str:
    """What SVM memory is worth, for people."""
    if verdict.kind == "mixed":
        wrong = f", {n_wrong} pages are not epoch {target}" if n_wrong else ""
        return f"No state that any machine ever had{wrong}."
    if verdict.kind == "empty":
        return "Nothing yet."
    if verdict.kind == "epoch":
        return f"Exactly epoch {verdict.epoch}."
    if svm_runs:
        return f"The SVM's own state: epoch {verdict.epoch} and what it wrote since."
    return f"What the dead machine left: epoch {verdict.epoch} and its own writes."


def flush_state(status: Mapping[str, Any], *, own_list: bool) -> str:
    """What the flush set is for now: "none" yet, "due", "done", or a list of the secondary's "own"."""
    if own_list:
        return "own"
    if status["sealed"] == 0:
        return "none"
    return "due" if status["sealed"] > status["committed"] else "done"


def if_now(
    status: Mapping[str, Any], alive: Mapping[str, bool], verdict: Verdict, *, bounded: bool = False
) -> dict[str, str]:
    """What would happen if one side died at this moment: {"pvm": sentence, "svm": sentence}; "" if it is dead already.

    The table is that of csrc/recover.c and of failover in colocache.h; a wrong memory makes every answer wrong.
    `bounded`: the secondary's memory is.
    """
    phase, sealed, committed = status["phase"], status["sealed"], status["committed"]
    due = sealed > committed
    torn = verdict.kind == "mixed" and not due
    if not alive["svm"] and due:
        pvm = f"A new process could finish epoch {sealed} from shared memory and take over; until then nobody runs."
    elif not alive["svm"]:
        pvm = "Nobody could take over: the secondary's process is dead."
    elif phase == "empty":
        pvm = "Nobody could take over: there is no state that could run."
    elif phase == "sealing" and due:
        pvm = f"The SVM would finish epoch {sealed} first and then take over from it."
    elif torn:
        pvm = "The SVM would run on with this memory, and it is wrong."
    else:
        pvm = "The SVM would take over at once, from its own memory."
    if sealed == 0:
        svm = "No epoch is complete: all of memory would have to be sent again."
    elif due:
        svm = f"The next process would replay the flush and have exactly epoch {sealed}."
    elif bounded:
        svm = f"Guest RAM is exactly epoch {sealed}: the next process would restart from there."
    elif status["receiving"] > sealed:
        svm = (
            f"Pages of epoch {status['receiving']} are in the cache: nothing to restart from until the next checkpoint."
        )
    else:
        svm = f"The cache is exactly epoch {sealed}: the next process would copy all of it and restart from there."
    over = phase == "failed_over"
    return {
        "pvm": pvm if alive["pvm"] and not over else "",
        "svm": svm if alive["svm"] and alive["pvm"] and not over and not torn else "",
    }
