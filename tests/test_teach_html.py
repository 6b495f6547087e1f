# SPDX-License-Identifier: Apache-2.0
"""The lesson's web page in a real browser: it opens, steps, draws what was recorded, and fits a phone.

The browser is spoken to over its debugging pipe (two descriptors and JSON), so that nothing but Chromium is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colocache.teach import web
from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import record
from colocache.teach.recording import Chapter, Lesson, Step

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_SECONDS = 60.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-sync", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page in a headless Chromium."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        dups = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        self.pid = os.posix_spawnp(
            program, [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], os.environ,
            file_actions=[*quiet, *dups],
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        self._buffer, self._number, self._session = b"", 0, ""
        self.trouble: list[str] = []  # exceptions, console errors, requests
        targets = self.tell("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self._session = self.tell("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            answer = self._hear()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(method)

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._in, 1 << 20)
            if not more:
                raise EOFError("the browser closed its pipe")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        heard: dict[str, Any] = json.loads(line)
        method, params = heard.get("method", ""), heard.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.trouble.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.trouble.append(str(params["entry"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.trouble.append(str(params["args"]))
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.trouble.append(f"a request left the page: {params['request']['url']}")
        return heard

    def js(self, expression: str) -> Any:
        answer = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.tell("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=KEYS[name])

    def screen(
        self, width: int, height: int = 900, *, dark: bool = False, still: bool = True, scale: float = 1
    ) -> None:
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.tell("Emulation.setEmulatedMedia", features=features)

    def open(self, path: Path, where: str = "") -> None:
        self.tell("Page.navigate", url=f"file://{path}{where}")
        end = time.monotonic() + WAIT_SECONDS
        while not self.js("document.readyState === 'complete' && !!document.querySelector('.cell[aria-label]')"):
            assert time.monotonic() < end, f"the page does not draw: {self.trouble}"

    def picture(self, path: Path, *, whole: bool = True) -> None:
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(OSError, EOFError):
            self.tell("Browser.close")
        os.close(self._out)
        os.close(self._in)
        end = time.monotonic() + WAIT_SECONDS
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.02)


KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Home": 36, "End": 35, "PageDown": 34, "PageUp": 33,
        "Enter": 13, "Tab": 9}  # fmt: skip


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
    program = next((name for name in NAMES if shutil.which(name)), None)
    if program is None:
        pytest.skip("no Chromium here: on Debian, `apt install chromium` lets the page be tested in it")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        yield browser
        browser.close()


@pytest.fixture
def browser(shared_browser: Browser, page: Path) -> Browser:
    shared_browser.trouble.clear()
    shared_browser.screen(1280)
    shared_browser.open(page, "?fresh")
    return shared_browser


DRAWN = """(() => {
  const cells = (panel) => [...document.querySelectorAll(`[data-panel="${panel}"] [data-pfn]`)];
  const out = {};
  for (const panel of ["pvm-memory", "cache", "svm-memory", "pvm-bitmap", "svm-bitmap", "flush-set", "unacked"])
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

    def stamps(name: str) -> list[str]:
        return ["" if stamp == "-" else stamp for stamp in step.images[name]]

    flush = ["" if b == "0" else o if o != "." else "1" for b, o in zip(bits["flush"], step.origin, strict=True)]
    pairs = zip(bits["unacked"], bits["pending"], strict=True)
    return {
        "pvm-memory": stamps("pvm"), "cache": stamps("cache"), "svm-memory": stamps("svm"),
        "pvm-bitmap": marks("pvm"), "svm-bitmap": marks("svm"), "flush-set": flush,
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
    assert browser.js("document.getElementById('next').disabled") is True
    assert browser.trouble == []


def test_keys_go_back_home_to_the_end_and_to_the_next_chapter(browser: Browser, lesson: Lesson) -> None:
    first, second = lesson.chapters[:2]
    for key, hash_ in (
        ("End", f"#{first.id}/{len(first.steps)}"), ("ArrowLeft", f"#{first.id}/{len(first.steps) - 1}"),
        ("Home", f"#{first.id}/1"), ("PageDown", f"#{second.id}/1"), ("ArrowLeft", f"#{first.id}/{len(first.steps)}"),
        ("PageUp", f"#{first.id}/1"), ("ArrowLeft", f"#{first.id}/1"),
    ):  # fmt: skip
        browser.key(key)
        assert browser.js("location.hash") == hash_, key
    assert browser.trouble == []


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
    browser.key("ArrowRight")
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
