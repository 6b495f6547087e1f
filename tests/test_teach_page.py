# SPDX-License-Identifier: Apache-2.0
"""What the reader can do in the page besides stepping: try another way, predict, and answer the quiz."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Browser
from played_page import PLAYS, SHAPE, numbers_of, opened, to_play, trouble

# A random play, with what predict.js asks before each action: [step before, action, right answer, step after].
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as browser:
        yield browser


@pytest.fixture(autouse=True)
def at_play(browser: Browser) -> None:
    to_play(browser)


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
                n_pages = after["bitmaps"]["flush"].count("1")
                assert right == f"{n_pages} page{'s' if n_pages != 1 else ''}"
            elif name == "flush":
                n_wrong = after["wrong"].count("1")
                assert right.startswith("Exactly") if not n_wrong else f": {n_wrong} page" in right
            else:
                told = {"The flush is repeated": "replay", "The cache is still": "copy all", "Nothing": "nothing to"}
                said = before["if_now"]["svm"]
                assert said == "" or next(v for k, v in told.items() if right.startswith(k)) in said
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
