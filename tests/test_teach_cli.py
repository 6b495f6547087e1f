# SPDX-License-Identifier: Apache-2.0
"""`colocache teach` as people call it: in a pipe, in a terminal by keys, as files, and as an exercise."""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import colocache
from colocache.teach import draw, quiz
from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import record
from colocache.teach.recording import Lesson, read_lesson

COMMAND = [sys.executable, "-m", "colocache.teach"]
WAIT_SECONDS = 120.0


def run(*args: str, answers: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], input=answers, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )


def test_in_a_pipe_every_step_comes_as_plain_text_without_control_codes() -> None:
    done = run("--chapter", "union", "--chapter", "only-pvm")
    assert done.returncode == 0
    assert not set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout))
    for chapter in CHAPTERS:
        assert (chapter.question in done.stdout) == (chapter.id in ("union", "only-pvm"))
    assert "5/5  The union is the flush set" in done.stdout
    assert "S2!" in done.stdout, "a wrong page is marked without colour"
    assert "✗ SVM memory" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("pages", ["64", "100", "256"])
def test_the_lines_of_every_grid_are_equally_long(pages: str) -> None:
    done = run("--chapter", "flush", "--pages", pages)
    boxes = [line for line in done.stdout.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert len({len(line.rstrip()) for line in boxes}) == 1


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *args: str, rows: int = 45, columns: int = 120) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        env = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*COMMAND, *args], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**env, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        self.pid = self.process.pid
        self.seen = ""

    def until(self, *words: str) -> None:
        """Read until all words stand on what was written since the last time."""
        end = time.monotonic() + WAIT_SECONDS
        fresh = ""
        while not all(word in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", fresh) for word in words):
            assert time.monotonic() < end, f"{words} did not come: {fresh[-2000:]}"
            if select.select([self.fd], [], [], 1)[0]:
                fresh += os.read(self.fd, 1 << 16).decode(errors="replace")
        self.seen += fresh

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        """Read to the end; the exit status."""
        while True:
            try:
                more = os.read(self.fd, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            self.seen += more.decode(errors="replace")
        os.close(self.fd)
        return self.process.wait(WAIT_SECONDS)


@functools.cache
def recorded() -> Lesson:
    return record(CHAPTERS)


def left_by(pid: int) -> list[str]:
    return [region.name for region in colocache.list_regions() if region.name.startswith(f"{pid}-")]


def test_keys_step_forward_back_and_across_chapters_and_q_gives_the_terminal_back() -> None:
    terminal = Terminal("--chapter", "union", "--chapter", "only-pvm")
    terminal.until("1/5  All of epoch 2 is in the cache", "q quit")
    for keys, words in (
        ("n", "2/5  And what the SVM wrote"), ("\x1b[C", "3/5  Pages that only the PVM wrote"), ("p", "2/5  And"),
        ("\x1b[F", "5/5  The union"), ("n", "1/3  Everything came"), ("\x1b[D", "5/5  The union"),
        ("\x1b[H", "1/5  All of"), ("\x1b[6~", "1/3  Everything came"), ("nn", "3/3  Stale SVM pages stay"),
        ("[", "1/3  Everything came"), ("x", ""),
    ):  # fmt: skip
        terminal.press(keys)
        terminal.until(words, *(["q quit"] if words else []))
    terminal.press("q")
    assert terminal.end() == 0
    assert terminal.seen.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in terminal.seen, "the screen is given back"
    assert left_by(terminal.pid) == []


def test_a_low_terminal_gets_all_grids_in_one_row() -> None:
    terminal = Terminal("--chapter", "only-pvm", rows=24, columns=80)
    terminal.until("1/3", "q quit")
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.seen)
    assert screen.count("╭") == 7 == max(line.count("╭") for line in screen.splitlines())
    terminal.press("\x03")
    assert terminal.end() == 0


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (60, 45), (80, 45), (120, 45)])
def test_every_step_fits_the_terminal_with_its_keys(columns: int, rows: int) -> None:
    lesson = recorded()
    for chapter in lesson.chapters:
        for number, step in enumerate(chapter.steps):
            drawn = draw.draw(chapter, number, lesson.columns, columns, rows - 1)
            assert not draw.is_taller(drawn, columns, rows - 2), (chapter.id, step.title)
            assert draw.is_taller(drawn, columns, 10), "it is measured"


@pytest.mark.parametrize(("columns", "rows", "word"), [(80, 45, "underlined"), (120, 45, "> the text speaks of it")])
def test_the_legend_of_what_is_drawn_stands_below_it_and_behind_a_key(columns: int, rows: int, word: str) -> None:
    terminal = Terminal("--chapter", "only-pvm", rows=rows, columns=columns)
    terminal.until("1/3", word, "q quit")
    terminal.press("?")
    terminal.until(word, "control region is", "? again goes back")
    terminal.press("?")
    terminal.until("1/3", "q quit")
    terminal.press("?")
    terminal.until("? again goes back")
    terminal.press("q")
    assert terminal.end() == 0


def test_auto_on_a_terminal_goes_by_itself_to_the_end() -> None:
    terminal = Terminal("--chapter", "only-pvm", "--auto", "--delay", "0")
    assert terminal.end() == 0
    assert "3/3" in terminal.seen


def test_ctrl_c_in_the_middle_leaves_nothing_behind() -> None:
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "death" not in process.stdout.readline():  # somewhere in the chapters with child processes
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == -signal.SIGINT, "as a shell expects it of every command"
    assert "Traceback" not in errors
    assert left_by(process.pid) == []


def test_html_and_export_write_whole_files_that_agree(tmp_path: Path) -> None:
    done = run("--chapter", "seal", "--html", str(tmp_path / "a.html"), "--export", str(tmp_path / "a.json"))
    assert done.returncode == 0
    assert "1 chapters, 4 steps" in done.stdout
    lesson = read_lesson((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [chapter.id for chapter in lesson.chapters] == ["seal"]
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="lesson-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert read_lesson(data[1]) == lesson
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--html", "/nowhere/a.html"), "can't be written"), (("--chapter", "x"), "no chapter is called x"),
        (("--pages", "63"), "63 is not in the range"), (("--quiz", "--list"), "give one of them"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said_in_a_sentence(args: tuple[str, ...], sentence: str) -> None:
    done = run(*args)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_option_and_where_the_format_is_described() -> None:
    text = run("--help").stdout
    for word in ("--auto", "--delay", "--pages", "--html", "--export", "--quiz", "--list", "colocache.teach.recording"):
        assert word in text


# ---- quiz ----------------------------------------------------------------------------------------


def solve(shown: str) -> list[str]:
    """The right answers to a whole run, from what it shows: the union, and the choice that WHYS has first."""
    right = {why.choices[0] for why in quiz.WHYS}
    answers = []
    for part in shown.split("Exercise ")[1:]:
        rows = re.findall(r"^ +\d+  ([PS· ]+)$", part, re.MULTILINE)
        cells = [cell for row in rows for cell in row.split()]
        union = [pfn for pfn in range(quiz.SHOWN) if cells[pfn] != "·" or cells[pfn + quiz.SHOWN] != "·"]
        answers.append(" ".join(map(str, union)))
        text = " ".join(part.split())
        answers += [
            letter for letter, choice in re.findall(r"([abc])\) (.*?\.)(?= [abc]\)| Which)", text) if choice in right
        ]
    return answers


def test_right_answers_from_stdin_pass_and_wrong_ones_do_not() -> None:
    seen = run("--quiz", "--seed", "1", "--rounds", "2", answers="0\nx\n" * 2)
    assert seen.returncode == 1
    assert "0 of 4 right" in seen.stdout
    assert "Missing:" in seen.stdout
    answers = solve(seen.stdout)
    assert len(answers) == 4
    good = run("--quiz", "--seed", "1", "--rounds", "2", answers="\n".join(answers) + "\n")
    assert "4 of 4 right." in good.stdout
    assert good.returncode == 0


def test_a_quiz_whose_answers_end_says_so() -> None:
    done = run("--quiz", "--seed", "1", answers="0-3\n")
    assert done.returncode == 1
    assert "Stopped after 1 of 8 answers" in done.stdout
    assert "Traceback" not in done.stderr
