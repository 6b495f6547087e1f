# SPDX-License-Identifier: Apache-2.0
"""The lesson's web page in a real browser: it opens, steps, draws what was recorded, and fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, started

from colocache.teach import web
from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import record
from colocache.teach.recording import Chapter, Lesson, Step


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return record(CHAPTERS)


@pytest.fixture(scope="module")
def page(lesson: Lesson, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lesson") / "lesson.html"
    path.write_text(web.page(lesson), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser, page: Path) -> Browser:
    shared_browser.trouble.clear()
    shared_browser.screen(1280)
    shared_browser.open(page, "?fresh")
    return shared_browser


DRAWN = """(() => {
  const cells = (panel) => [...document.querySelectorAll(`[data-panel="${panel}"] [data-pfn]`)];
  const out = {};
  for (const panel of [
    "pvm-memory", "cache", "svm-memory", "pvm-bitmap", "svm-bitmap", "guest-ram", "flush-set", "unacked",
  ])
    if (document.querySelector(`[data-panel="${panel}"]`).checkVisibility())
      out[panel] = cells(panel).map((cell) => cell.textContent);
  out.wrong = cells("svm-memory").map((cell) => cell.classList.contains("wrong"));
  out.title = document.getElementById("step-title").textContent;
  out.text = document.getElementById("step-text").textContent;
  out.verdict = document.getElementById("verdict-text").textContent;
  out.hash = location.hash;
  return out;
})()"""


def expected(chapter: Chapter, number: int, step: Step) -> dict[str, Any]:
    """What the page must show for a step, from the recording alone."""
    bits = step.bitmaps

    def marks(name: str) -> list[str]:
        return ["1" if bit == "1" else "" for bit in bits[name]]

    def stamps(image: tuple[str, ...]) -> list[str]:
        return ["" if stamp == "-" else stamp for stamp in image]

    flush = ["" if b == "0" else o if o != "." else "1" for b, o in zip(bits["flush"], step.origin, strict=True)]
    pairs = zip(bits["unacked"], bits["pending"], strict=True)
    return {
        "pvm-memory": stamps(step.images["pvm"]), "cache": stamps(step.images["cache"]),
        "svm-memory": stamps(step.images["svm"]), "pvm-bitmap": marks("pvm"), "flush-set": flush,
        **({"guest-ram": stamps(step.ram)} if chapter.memory == "bounded" else {"svm-bitmap": marks("svm")}),
        "unacked": ["w" if p == "1" else "u" if u == "1" else "" for u, p in pairs],
        "wrong": [bit == "1" for bit in step.wrong], "title": step.title, "text": step.text,
        "verdict": step.verdict["sentence"], "hash": f"#{chapter.id}/{number}",
    }  # fmt: skip


def test_every_step_is_drawn_as_it_was_recorded_and_the_right_arrow_walks_through_all(
    browser: Browser, lesson: Lesson
) -> None:
    walk = [(c, n, s) for c in lesson.chapters for n, s in enumerate(c.steps, 1)]
    for chapter, number, step in walk:
        assert browser.js(DRAWN) == expected(chapter, number, step)
        browser.key("ArrowRight")
    assert browser.js("location.hash") == "#play/1"
    browser.key("ArrowRight")
    assert browser.js("location.hash") == "#quiz/1"
    assert browser.js("document.getElementById('next').disabled") is True
    assert browser.trouble == []


def test_keys_go_forward_back_home_to_the_end_and_to_the_next_chapter(browser: Browser, lesson: Lesson) -> None:
    first, second = lesson.chapters[:2]
    for key, hash_ in (
        ("End", f"#{first.id}/{len(first.steps)}"), ("ArrowLeft", f"#{first.id}/{len(first.steps) - 1}"),
        ("Home", f"#{first.id}/1"), ("]", f"#{second.id}/1"), ("ArrowLeft", f"#{first.id}/{len(first.steps)}"),
        ("[", f"#{first.id}/1"), ("ArrowLeft", f"#{first.id}/1"), ("n", f"#{first.id}/2"), ("p", f"#{first.id}/1"),
    ):  # fmt: skip
        browser.key(key)
        assert browser.js("location.hash") == hash_, key
    assert browser.trouble == []


def test_page_down_reads_to_the_end_of_the_page_and_then_the_next_chapter(browser: Browser, lesson: Lesson) -> None:
    first, second = lesson.chapters[:2]
    browser.screen(390, 700)
    for _ in range(20):
        before = browser.js("window.scrollY")
        browser.key("PageDown")
        if browser.js("location.hash") != f"#{first.id}/1":
            break
        assert browser.js("window.scrollY") > before
    assert browser.js("[location.hash, window.scrollY]") == [f"#{second.id}/1", 0]
    assert before > 0, "there was more to read first"
    browser.key("PageUp")
    assert browser.js("location.hash") == f"#{first.id}/1"


def test_the_skip_link_goes_to_the_machines_and_keeps_the_step(browser: Browser) -> None:
    browser.js("location.hash = '#union/3'")
    browser.key("Tab")
    assert browser.js("document.activeElement.className") == "skip"
    browser.key("Enter")
    assert browser.js("[document.activeElement.id, location.hash]") == ["stage", "#union/3"]


SEEN_TOGETHER = """(() => {
  const box = (selector) => document.querySelector(selector).getBoundingClientRect();
  const last = ["svm-bitmap", "guest-ram"].map((name) => `[data-panel="${name}"]`)
    .find((one) => document.querySelector(one).checkVisibility());
  const parts = [".step", '[data-panel="pvm-bitmap"] .grid', `${last} .grid`].map(box);
  return [Math.min(...parts.map((part) => part.top)), Math.max(...parts.map((part) => part.bottom)), box(".bar").top];
})()"""


def test_text_and_both_bitmaps_are_on_one_screen_of_a_laptop_and_in_reach_on_a_phone(
    browser: Browser, lesson: Lesson
) -> None:
    steps = [f"#{c.id}/{n}" for c in lesson.chapters for n in range(1, len(c.steps) + 1)]
    browser.screen(1366, 650)
    for hash_ in (*steps, "#play/1", "#quiz/1"):
        browser.js(f"location.hash = '{hash_}'; window.scrollTo(0, 0)")
        top, bottom, bar = browser.js(SEEN_TOGETHER)
        assert 0 <= top < bottom <= bar, hash_
    browser.screen(390, 844)
    for hash_ in steps:
        browser.js(f"location.hash = '{hash_}'; window.scrollTo(0, 0)")
        top, bottom, bar = browser.js(SEEN_TOGETHER)
        assert bottom - top <= bar, f"{hash_}: {bottom - top} pixels, {bar} are free"


@pytest.mark.parametrize("name", ["union", "bounded", "stock-qemu"])
def test_a_printed_chapter_is_a_handout_of_all_its_steps_in_colour(browser: Browser, lesson: Lesson, name: str) -> None:
    printed = lesson.chapter(name)
    browser.js(f"location.hash = '#{name}/2'")
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    browser.tell("Emulation.setEmulatedMedia", media="print")
    text = browser.js("document.body.innerText")
    assert printed.question in text
    assert printed.answer in text
    for step in printed.steps:
        assert step.title in text
        assert step.text in text
    shown = browser.js("[...document.querySelectorAll('#handout figcaption')].map((one) => one.textContent)")
    assert ("SVM bitmap" in shown) == (printed.memory == "mirror")
    assert ("guest RAM" in shown) == (printed.memory == "bounded")
    assert browser.js("document.querySelectorAll('#handout .sheet').length") == len(printed.steps)
    assert browser.js("document.querySelectorAll('#handout .copies figure').length") == 7 * len(printed.steps)
    assert browser.js("getComputedStyle(document.querySelector('.frame')).display") == "none"
    colours = browser.js("""["P0", "S0", "B"].map((kind) => {
      const style = getComputedStyle(
        document.querySelector(`#handout .copies .${kind}`) ?? document.querySelector(`#handout .key .${kind}`));
      return [style.printColorAdjust, style.backgroundColor, style.backgroundImage];
    })""")
    assert [keep for keep, _, _ in colours] == ["exact"] * 3
    assert len({(ground, image) for _, ground, image in colours}) == 3
    browser.tell("Emulation.setEmulatedMedia", media="")
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert browser.js("document.getElementById('handout').childElementCount") == 0


def test_the_scrubber_steps_and_says_where_it_is(browser: Browser, lesson: Lesson) -> None:
    browser.js("const s = document.getElementById('scrubber'); s.value = 4; s.dispatchEvent(new Event('input'))")
    step = lesson.chapters[0].steps[3]
    assert browser.js("document.getElementById('step-title').textContent") == step.title
    assert step.title in browser.js("document.getElementById('scrubber').getAttribute('aria-valuetext')")


def test_a_page_tells_who_wrote_it_in_which_epoch_by_mouse_and_by_keyboard(browser: Browser, lesson: Lesson) -> None:
    union = next(c for c in lesson.chapters if c.id == "union")
    images = union.steps[1].images
    pfn = list(zip(images["cache"], images["svm"], strict=True)).index(("P1", "S2"))
    browser.js("location.hash = '#union/2'")
    browser.js(f"""document.querySelector('[data-panel="svm-memory"] [data-pfn="{pfn}"]').click()""")
    told = browser.js("document.getElementById('page').innerText")
    assert f"Page {pfn}" in told
    assert "S2 written by the SVM on the way to epoch 2" in told
    assert "P1 written by the PVM on the way to epoch 1" in told
    browser.js("""document.querySelector('[data-panel="cache"] [data-pfn="0"]').focus()""")
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        browser.key(key)
    assert f"Page {lesson.columns + 1}" in browser.js("document.getElementById('page').innerText")
    assert browser.js("location.hash") == "#union/2", "arrows inside a grid move in the grid"
    assert browser.trouble == []


def test_screen_readers_get_a_name_for_each_grid_and_a_sentence_for_each_page(browser: Browser) -> None:
    tree = browser.tell("Accessibility.getFullAXTree")["nodes"]
    named = {
        role: [n["name"]["value"] for n in tree if n.get("role", {}).get("value") == role and n.get("name")]
        for role in ("grid", "gridcell", "slider", "heading", "button")
    }
    assert [name.split(" ")[0] for name in named["grid"]] == ["PVM", "unacked", "cache", "flush", "SVM", "PVM", "SVM"]
    assert all(name.startswith("page ") and ": " in name for name in named["gridcell"])
    assert len(named["gridcell"]) == 7 * 64
    assert named["slider"] == ["Step"]
    assert all(named["button"])
    assert "In step" in browser.js("document.getElementById('chapter-title').textContent")
    assert browser.js("document.getElementById('announce').getAttribute('aria-live')") == "polite"


@pytest.mark.parametrize("width", [320, 360, 700, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, lesson: Lesson, width: int) -> None:
    browser.screen(width, 740)
    for chapter in lesson.chapters:
        browser.js(f"location.hash = '#{chapter.id}/{len(chapter.steps)}'")
        browser.js("document.querySelector('[data-pfn=\"9\"]').click()")
        wide = browser.js("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        assert max(wide) <= width, chapter.id


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True])
def test_letters_stand_out_from_their_colour_in_light_and_dark(browser: Browser, dark: bool) -> None:
    browser.screen(1280, dark=dark)
    colours = browser.js("""["P0", "P1", "S0", "S1", "B", "u", "w"].map((kind) => {
      const cell = document.createElement("div"); cell.className = `cell ${kind}`;
      document.querySelector(".row").append(cell);
      const style = getComputedStyle(cell), root = getComputedStyle(document.documentElement);
      const probe = document.createElement("i"); document.body.append(probe);
      const resolve = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
      const behind = { S0: ["--svm", "--svm-deep"], S1: ["--svm", "--svm-deep"], B: ["--both", "--both-deep"] }[kind];
      const answer = [kind, style.color, behind ? behind.map(resolve) : [style.backgroundColor]];
      cell.remove(); probe.remove();
      return answer;
    })""")
    for kind, ink, grounds in colours:
        for ground in grounds:
            light, low = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (low + 0.05) >= 4.5, f"{kind}: {ink} on {ground}"


def test_motion_stops_for_those_who_ask_for_it(browser: Browser) -> None:
    for _ in range(3):
        browser.key("ArrowRight")  # the PVM boots: the first step that changes a page
    animation = "getComputedStyle(document.querySelector('.cell.changed')).animationName"
    browser.screen(1280, still=True)
    assert browser.js(animation) == "none"
    browser.screen(1280, still=False)
    assert browser.js(animation) == "arrive"


def test_the_page_asks_nobody_for_anything(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for word in ("http://", "https://", "@import", "url(", '<link rel="stylesheet"', "<script src"):
        assert word not in text
    assert "{{" not in text
