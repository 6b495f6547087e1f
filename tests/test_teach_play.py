# SPDX-License-Identifier: Apache-2.0
"""What is played in the page is what the engine does: random plays in Chromium, repeated on real machines.

The page computes with a small model (model.js). Here it is played by pressing its buttons and clicking its pages; then
the same is done with the real engine, and after every action all that can be seen must be the same on both sides.
COLOCACHE_PLAYS says how many plays, e.g. `COLOCACHE_PLAYS=1000 pytest tests/test_teach_play.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import Browser, started

from colocache import Cache
from colocache.errors import ColocacheError
from colocache.teach import web
from colocache.teach.chapters import CHAPTERS
from colocache.teach.pair import Pair, pair_in_step
from colocache.teach.play import Play, record
from colocache.teach.recording import Step
from colocache.teach.secondary import Secondary
from colocache.teach.shape import Shape

PLAYS = int(os.environ.get("COLOCACHE_PLAYS", "40"))
ACTIONS = 30  # at most, in each play
SHAPE = Shape.of(64)

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

# The same, with what predict.js asks before each action: [step before, action, right answer, step after].
PREDICTED = """((numbers, size) => {
  play.restart();
  const found = [];
  for (const number of numbers) {
    const before = play.chapter.steps[lesson.at.step];
    const asked = play.offered().map((id) => [id, predict.ask(play.state(), id)]).filter(([, question]) => question);
    for (const [id, question] of asked) {
      const { state, said } = model.act(play.state(), id);
      found.push([before, id, question.right, model.step(state, said)]);
    }
    const offered = play.offered(), due = model.due(play.state());
    if (!offered.length) break;
    const id = number % 7 < 4 && due ? due : offered[Math.floor(number / 7) % offered.length];
    play.act(id, id.endsWith("writes") ? Math.floor(number / 1000) % size : -1);
  }
  return found;
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


def trouble(browser: Browser) -> list[str]:
    """But for one: the address follows each step, and nobody clicks as fast as these tests."""
    return [one for one in browser.trouble if "Throttling navigation" not in one]


@pytest.fixture(autouse=True)
def at_play(browser: Browser) -> None:
    browser.trouble.clear()
    browser.js("document.querySelector(`[data-chapter='${lesson.at.playChapter}']`).click()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = tmp_path_factory.mktemp("play") / "lesson.html"
    path.write_text(web.page(record(CHAPTERS[:1], SHAPE.n_pages)), encoding="utf-8")
    with started() as browser:
        browser.screen(1366, 650)
        browser.open(path, "#play/1")
        yield browser


def numbers_of(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1 << 30) for _ in range(rng.randint(5, ACTIONS))]


def play_in(browser: Browser, seed: int) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = browser.js(f"{PLAY_IT}({numbers_of(seed)}, {SHAPE.n_pages})")
    return done


def test_the_played_page_and_the_engine_agree_after_every_action_of_random_plays(browser: Browser) -> None:
    compared, ids, refused = 0, set(), 0
    for seed in range(PLAYS):
        done = play_in(browser, seed)
        names = {action["id"] for action in done}
        killable = "kill-in-flush" in names or (seed % 4 == 0 and "kill-svm" in names)
        try:
            compared += repeat(done, killable=killable)
        except AssertionError as error:
            raise AssertionError(f"play {seed}: {error}") from error
        ids |= names
        refused += sum(action["refused"] for action in done)
    assert compared > 5 * PLAYS
    assert ids == set(browser.js("model.actions.map((one) => one.id)")), "every action was tried"
    assert refused, "the engine refused something, and the page with it"
    assert trouble(browser) == []


def test_acting_from_an_earlier_step_tries_another_way_from_there(browser: Browser) -> None:
    browser.js("document.getElementById('ask-first').checked = false; play.restart()")
    browser.js("""document.querySelector('[data-panel="pvm-memory"] [data-pfn="3"]').click()""")
    for name in ("pause", "send", "take-log", "kill-svm"):
        browser.js(f"""document.querySelector('[data-act="{name}"]').click()""")
    assert browser.js("lesson.at.step") == 5
    assert browser.js("document.getElementById('host-svm').classList.contains('gone')") is True
    browser.key("p")
    assert browser.js("document.querySelector('[data-act=\"attach\"]').disabled") is True
    browser.js("document.querySelector('[data-act=\"device-state\"]').click()")
    assert browser.js("[lesson.at.step, play.chapter.steps.length]") == [5, 6]
    assert "registers" in browser.js("document.getElementById('step-title').textContent")


@pytest.mark.parametrize("name", ["kill-pvm", "kill-svm", "seal", "flush"])
def test_a_prediction_is_asked_for_before_it_is_shown(browser: Browser, name: str) -> None:
    browser.js("document.getElementById('ask-first').checked = false; play.restart()")
    browser.js("""document.querySelector('[data-panel="pvm-memory"] [data-pfn="3"]').click()""")
    for before in ("pause", "send", "take-log", "device-state", *(["seal"] if name == "flush" else [])):
        browser.js(f"""document.querySelector('[data-act="{before}"]').click()""")
    browser.js("document.getElementById('ask-first').click()")
    step = browser.js("lesson.at.step")
    assert browser.js("getComputedStyle(document.getElementById('if-now')).display") == "none", "it would tell"
    browser.js(f"""document.querySelector('[data-act="{name}"]').click()""")
    assert browser.js("lesson.at.step") == step, "nothing has happened yet"
    right = browser.js("predict.ask(play.state(), '" + name + "').right")
    choices = browser.js("[...document.querySelectorAll('#controls .choices button')].map((one) => one.textContent)")
    assert right in choices
    assert len(choices) > 1
    browser.js(f"document.querySelectorAll('#controls .choices button')[{choices.index(right)}].click()")
    assert browser.js("lesson.at.step") == step + 1
    assert browser.js("document.getElementById('step-text').textContent").startswith("✓ You were right.")
    browser.js("document.getElementById('ask-first').click()")


def test_predictions_are_what_then_happens(browser: Browser) -> None:
    """In random plays: what predict.js calls right is what the next state says."""
    asked = 0
    for seed in range(PLAYS, 2 * PLAYS):
        for before, name, right, after in browser.js(f"{PREDICTED}({numbers_of(seed)}, {SHAPE.n_pages})"):
            asked += 1
            if name == "kill-pvm":
                told = {
                    "It takes over at once": "take over at once",
                    "It finishes": "finish epoch",
                    "Nothing": "Nobody",
                }
                said = before["if_now"]["pvm"]
                wrong_memory = "it is wrong" in said and right.startswith("It takes over")
                assert wrong_memory or next(v for k, v in told.items() if right.startswith(k)) in said
            elif name == "seal":
                assert right == f"{after['bitmaps']['flush'].count('1')} page" + "s" * (
                    after["bitmaps"]["flush"].count("1") != 1
                )
            elif name == "flush":
                n_wrong = after["wrong"].count("1")
                assert right.startswith("Exactly") if not n_wrong else f": {n_wrong} page" in right
            else:
                told = {"The flush is repeated": "replay", "The cache is still": "copy all", "Nothing": "nothing to"}
                assert next(v for k, v in told.items() if right.startswith(k)) in before["if_now"]["svm"] or (
                    before["if_now"]["svm"] == ""
                )
    assert asked > PLAYS


def test_the_quiz_in_the_page_accepts_the_union_and_tells_what_is_missing_or_too_much(browser: Browser) -> None:
    browser.js("document.querySelector(`[data-chapter='${lesson.at.quizChapter}']`).click()")
    union = """[...document.querySelectorAll('[data-panel="pvm-bitmap"] [data-pfn]')].map((cell, pfn) =>
        cell.textContent || document.querySelector(`[data-panel="svm-bitmap"] [data-pfn="${pfn}"]`).textContent)"""
    button = "[...document.querySelectorAll('#quiz button')].find((one) => one.textContent === '%s').click()"
    told = "document.getElementById('quiz').innerText"
    click = """document.querySelector('[data-panel="flush-set"] [data-pfn="%d"]').click()"""
    pages = [pfn for pfn, bit in enumerate(browser.js(union)) if bit]
    for pfn in pages:
        browser.js(click % pfn)
    browser.js(button % "Check")
    assert f"✓ Right: the engine flushes the same {len(pages)} pages" in browser.js(told)
    browser.js("document.querySelector('#quiz .choices button').click()")
    assert " of 2 right" in browser.js(told)
    browser.js(button % "Next exercise")
    pages = [pfn for pfn, bit in enumerate(browser.js(union)) if bit]
    extra = next(pfn for pfn in range(SHAPE.n_pages) if pfn not in pages)
    for pfn in (*pages[1:], extra):
        browser.js(click % pfn)
    browser.js(button % "Check")
    assert "✕ 1 page missing" in browser.js(told)
    assert "✕ 1 page too many" in browser.js(told)
    marked = browser.js(
        """[...document.querySelectorAll('[data-panel="flush-set"] .wrong')].map((one) => +one.dataset.pfn)"""
    )
    assert sorted(marked) == sorted([pages[0], extra])
    assert trouble(browser) == []
