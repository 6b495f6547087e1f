# SPDX-License-Identifier: Apache-2.0
"""What is played in the page is what the engine does: random plays in Chromium, repeated on real machines.

The page computes with a small model (model.js). Here it is played by pressing its buttons and clicking its pages; then
the same is done with the real engine, and after every action all that can be seen must be the same on both sides.
COLOCACHE_PLAYS says how many plays, e.g. `COLOCACHE_PLAYS=1000 pytest -s tests/test_teach_play.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import Browser
from played_page import PLAYS, SHAPE, numbers_of, opened, to_play, trouble

from colocache import Cache
from colocache.errors import ColocacheError
from colocache.teach.pair import Pair, pair_in_step
from colocache.teach.play import Play
from colocache.teach.recording import Step
from colocache.teach.secondary import Secondary

# A play in the page: `numbers` choose among what is offered at each point, killing more seldom than the rest.
PLAY_IT = """((numbers, size) => {
  document.getElementById("ask-first").checked = false;
  play.restart();
  const done = [], harm = new Set(model.actions.filter((one) => one.harm).map((one) => one.id));
  for (const number of numbers) {
    const offered = play.offered().flatMap((id) => Array(id.endsWith("writes") ? 4 : harm.has(id) ? 1 : 3).fill(id));
    if (!offered.length) break;
    const due = model.due(play.state());
    if (due && !offered.includes(due)) throw new Error(`${due} is said to be next and can't be done`);
    const id = number % 7 < 3 && due ? due : offered[Math.floor(number / 7) % offered.length];
    const pfn = id.endsWith("writes") ? Math.floor(number / 1000) % size : -1;
    const panel = id === "pvm-writes" ? "pvm-memory" : "svm-memory";
    const where = pfn < 0 ? `[data-act="${id}"]` : `[data-panel="${panel}"] [data-pfn="${pfn}"]`;
    document.querySelector(where).click();
    const step = play.chapter.steps[lesson.at.step];
    done.push({ id, pfn, refused: step.title === "The engine refuses", due: model.due(play.state()), step });
  }
  return done;
})"""


class Left:
    """What can be seen of a secondary whose process is dead: what it said last."""

    def __init__(self, svm: Secondary) -> None:
        self._bits, self._status = svm.bits(), svm.status()

    def bits(self) -> dict[str, str]:
        return self._bits

    def status(self) -> dict[str, Any]:
        return self._status


class Machines:
    """The real pair, told in the page's words."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.used, self.asked, self.open = 1, 0, 0  # the primary's numbers: newest used, under way, begun to be sent
        self.stop_pfn = 0

    @property
    def _number(self) -> int:
        return self.asked or self.open or self.used + 1

    def do(self, name: str, pfn: int) -> None:
        """ColocacheError if the engine refuses."""
        if pfn >= 0:
            (self.pair.pvm_writes if name == "pvm-writes" else self.pair.svm_writes)([pfn])
        else:
            verb: Callable[[], None] = getattr(self, name.replace("-", "_"))
            verb()

    def pause(self) -> None:
        self.asked = self.used = self._number
        self.pair.pvm_pauses(self.asked)

    def send(self, share: float = 1) -> None:
        self.used = self.open = self._number
        if not self.asked:
            self.pair.pvm.sync()
        waiting = self.pair.pvm.sender.count()[0]
        self.pair.deliver(self.open, -int(-waiting * share // 1))

    def send_half(self) -> None:
        self.send(0.5)

    def take_log(self) -> None:
        self.pair.on_svm("sync")

    def device_state(self) -> None:
        self.open = self.asked
        self.pair.on_svm("device_state", self.asked)

    def seal(self) -> None:
        before = self.pair.origin
        try:
            self.pair.seal(self.open or self.asked or self.used + 1)
        except ColocacheError as error:
            self.pair.origin = before
            if "no device state" in str(error):
                self._resend()
            raise
        self.open = 0

    def received(self) -> None:
        self.pair.received()
        self.asked = 0

    def _resend(self) -> None:
        self.pair.pvm.sender.resend()
        self.asked = self.open = 0

    def flush(self) -> None:
        self.pair.on_svm("flush")

    def loaded(self) -> None:
        self.pair.on_svm("loaded")

    def _connect_again(self) -> None:
        self.pair.reconnect()
        if self.asked and self.asked == self.pair.status()["sealed"]:
            self.received()
        else:
            self._resend()

    def cut(self) -> None:
        if self.open:
            self.pair.on_svm("abort", self.open, "the connection was lost")
        self.open = 0
        self._connect_again()

    def kill_pvm(self) -> None:
        self.pair.pvm.alive = False

    def failover(self) -> None:
        self.pair.on_svm("failover")

    def kill_svm(self) -> None:
        """SIGKILL if it is a process of its own; else it is dropped as it stands: close writes nothing."""
        pair = self.pair
        if pair.victim is not None:
            pair.victim.die()
        else:
            svm = pair.svm
            assert svm is not None
            pair.svm = Left(svm)  # type: ignore[assignment]
            svm.cache.close()
        pair.svm_alive = False
        self.open = 0

    def kill_in_flush(self) -> None:
        """The engine's flush stands still at a page in the middle, and is killed there."""
        pair = self.pair
        assert pair.victim is not None
        pfns = [pfn for pfn, bit in enumerate(pair.svm_bits()["flush"]) if bit == "1"]
        self.stop_pfn = pfns[len(pfns) // 2]
        pair.victim.stop_at("flush_until", self.stop_pfn)
        pair.victim.kill()
        pair.svm_alive = False
        self.open = 0

    def attach(self) -> None:
        pair = self.pair
        if pair.victim is not None:
            pair.attach()
        else:
            cache = pair._stack.enter_context(Cache.attach(pair.memory, threads=1))
            pair.svm = pair._stack.enter_context(Secondary(pair.memory, cache, pair.sockets[1].fileno()))
            pair.svm_alive = True
        self._connect_again()


SEEN = (
    "images",
    "bitmaps",
    "origin",
    "flush_state",
    "focus",
    "status",
    "alive",
    "verdict",
    "target",
    "wrong",
    "if_now",
)


def seen(step: Step) -> dict[str, Any]:
    """All that the machines hold and all that is said of it, as the page has it."""
    found = {name: getattr(step, name) for name in SEEN}
    return {**found, "images": {name: list(image) for name, image in step.images.items()}}


def check_torn(page: dict[str, Any], real: dict[str, Any], stop: int) -> None:
    """In mid-flush: which pages before the one it stopped at are copied is this CPU's affair; no other page may change.

    Then the two are made alike, so that the rest of the step is compared.
    """
    flush, cache = real["bitmaps"]["flush"], real["images"]["cache"]
    for pfn, (drawn, found) in enumerate(zip(page["images"]["svm"], real["images"]["svm"], strict=True)):
        if flush[pfn] == "1" and pfn < stop:
            assert drawn == cache[pfn], pfn
        else:
            assert found == drawn, pfn
    for one in (page, real):
        one["images"]["svm"] = one["verdict"] = one["wrong"] = one["if_now"] = None


def repeat(done: list[dict[str, Any]], *, killable: bool) -> int:
    """Do it all with real machines; how many actions were compared."""
    with pair_in_step(SHAPE, killable=killable) as pair:
        machines, play = Machines(pair), Play(SHAPE)
        for n, action in enumerate(done):
            name, told = action["id"], f"action {n + 1} of {[a['id'] for a in done[: n + 1]]}"
            if name == "kill-in-flush" and pair.victim is None:
                return n  # its second process runs in the test's own: it can't be killed in the middle of a call
            try:
                machines.do(name, action["pfn"])
                refused = False
            except ColocacheError:
                refused = True
            assert refused == action["refused"], told
            play.step(pair, "", "", target=action["step"]["target"])
            real, page = seen(play.steps[-1]), {name: action["step"][name] for name in SEEN}
            if name == "kill-in-flush":
                check_torn(page, real, machines.stop_pfn)
            assert page == real, told
    return len(done)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as browser:
        yield browser


@pytest.fixture(autouse=True)
def at_play(browser: Browser) -> None:
    to_play(browser)


def play_in(browser: Browser, seed: int) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = browser.js(f"{PLAY_IT}({numbers_of(seed)}, {SHAPE.n_pages})")
    return done


def test_the_played_page_and_the_engine_agree_after_every_action_of_random_plays(browser: Browser) -> None:
    compared, ids, refused = 0, set(), 0
    for seed in range(PLAYS):
        done = play_in(browser, seed)
        names = {action["id"] for action in done}
        killable = "kill-in-flush" in names or (seed % 2 == 0 and "kill-svm" in names)
        try:
            compared += repeat(done, killable=killable)
        except AssertionError as error:
            raise AssertionError(f"play {seed}: {error}") from error
        ids |= names
        refused += sum(action["refused"] for action in done)
    print(f"{PLAYS} plays: {compared} actions, {refused} of them refused by page and engine alike")  # see it with -s
    assert compared > 5 * PLAYS
    assert ids == set(browser.js("model.actions.map((one) => one.id)")), "every action was tried"
    assert refused, "the engine refused something, and the page with it"
    assert trouble(browser) == []
