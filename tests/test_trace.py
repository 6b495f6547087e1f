# SPDX-License-Identifier: Apache-2.0
"""The trace of a pair: a file that viewers open, whose stages lie in each other and make the figures of the results."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy import TOY_BLOCKS, Pair, pair_of

from colocache.children import python_command
from colocache.errors import ArgumentError
from colocache.replication.results import SENT_STAGES, STAGES
from colocache.replication.trace import WAITING_MAX, Trace, begin_trace, end_trace, read_trace, write_trace

PRIMARY = ["ask", "stop", "state", "log", "pages", "answer", "resume", "loaded"]
SMALL = ("--ram", "16M", "--checkpoints", "4", "--interval", "0.05", "--run-on", "0.1", "--reconnect-limit", "0.05")


def spans(events: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X" and event["args"]["epoch"] == epoch]


def nested(events: list[dict[str, Any]]) -> bool:
    """Each of two spans of a track lies in the other, or beside it."""
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    open_until: list[float] = []
    for event in ordered:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while open_until and open_until[-1] <= begin + 0.002:  # ts has three decimals
            open_until.pop()
        if open_until and end > open_until[-1] + 0.002:
            return False
        open_until.append(end)
    return True


class Traced:
    """A pair of toys with a trace on each side."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        self.paths = {side: str(folder / side) for side in ("primary", "secondary")}
        pair.make_secondary()
        pair.make_primary(checkpoints=3)
        self.traces = {}
        for side, path in self.paths.items():
            begin_trace(path)
            self.traces[side] = getattr(pair, side)._trace = Trace(path, side)

    def run(self) -> dict[str, list[dict[str, Any]]]:
        for running in (self.pair.run_primary(), self.pair.run_secondary()):
            running.join()
        for side, path in self.paths.items():
            self.traces[side].close()
            end_trace(path)
        return {side: json.loads(Path(path).read_text()) for side, path in self.paths.items()}


@pytest.fixture
def traced(make_memory, tmp_path: Path) -> Iterator[Traced]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as made:
        yield Traced(made, tmp_path)


def test_the_stages_in_the_trace_lie_in_each_other_and_are_those_of_the_results(traced: Traced) -> None:
    events = traced.run()
    for side, recorder in (("primary", traced.pair.events_p), ("secondary", traced.pair.events_s)):
        for done in recorder.all("checkpoint"):
            found = spans(events[side], done["epoch"])
            assert nested(found), found
            pause = next(
                one for one in found if one["name"] in ("pause", "the primary's machine stands") and one["dur"] > 0
            )
            whole = done["pause_ms"] + done["extra_ms" if side == "primary" else "verify_ms"]
            assert pause["dur"] / 1e3 == pytest.approx(whole, abs=0.002)
            for stage in ("state", "log", "answer", "resume", "loaded") if side == "primary" else ("sync", "answer"):
                told = done["stages"][f"{stage}_ms"] + (done["extra_ms"] if stage == "state" else 0)
                assert next(one for one in found if one["name"] == stage)["dur"] / 1e3 == pytest.approx(told, abs=0.002)


def test_the_stages_of_a_pause_are_all_of_it(traced: Traced) -> None:
    traced.run()
    for done in traced.pair.events_p.all("checkpoint"):
        standing = [done["stages"][f"{stage}_ms"] for stage in ("state", "log", "pages", "answer", "resume")]
        assert list(done["stages"]) == [f"{stage}_ms" for stage in SENT_STAGES]
        assert sum(standing) == pytest.approx(done["pause_ms"], abs=0.001)
    for done in traced.pair.events_s.all("checkpoint"):
        assert list(done["stages"]) == [f"{stage}_ms" for stage in STAGES]
        assert sum(done["stages"].values()) - done["stages"]["receive_ms"] - done["stages"]["sync_ms"] == pytest.approx(
            done["pause_ms"], abs=0.002
        )
        assert all(took >= 0 for took in done["stages"].values()), done["stages"]


def test_a_trace_whose_writer_was_killed_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = str(tmp_path / "trace")
    begin_trace(path)
    with Trace(path, "primary") as trace:
        trace.add("pages", 1_000, 3_000, 7)
    with Path(path).open("ab") as file:
        file.write(b'{"name":"half a li')
    (pages,) = spans(read_trace(path), 7)
    assert (pages["name"], pages["ts"], pages["dur"]) == ("pages", 1.0, 2.0)
    whole = str(tmp_path / "whole")
    write_trace(whole, read_trace(path))
    assert pages in json.loads(Path(whole).read_text())


def test_a_disk_that_takes_nothing_costs_events_and_never_time(tmp_path: Path) -> None:
    begin_trace(str(tmp_path / "trace"))
    trace = Trace(str(tmp_path / "trace"), "primary")
    trace._drain = lambda _write: None  # type: ignore[method-assign]
    for number in range(WAITING_MAX + 5):
        trace.add("pages", number, number + 1)
    assert len(trace._waiting) == WAITING_MAX
    del trace._drain  # type: ignore[attr-defined]  # the disk is there again
    trace.close()
    assert "5 events lost" in [event["name"] for event in read_trace(str(tmp_path / "trace"))]


def test_a_full_disk_ends_the_trace_with_one_sentence_and_not_the_pair(make_memory, tmp_path: Path) -> None:
    said: list[str] = []
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as pair:
        pair.make_secondary()
        pair.make_primary(checkpoints=3)
        pair.primary._trace = Trace("/dev/full", "primary", failed=said.append)
        for running in (pair.run_primary(), pair.run_secondary()):
            running.join()
        pair.primary._trace.close()
    assert len(said) == 1
    assert "/dev/full can't be written: No space left" in said[0]


def test_a_file_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no trace can be written to .*: No such file or directory"):
        begin_trace(str(tmp_path / "no" / "trace"))


@pytest.mark.parametrize("kill_at", ["running", "sealed"])
def test_the_demos_trace_has_both_sides_in_one_file_though_the_primary_was_killed(tmp_path: Path, kill_at: str) -> None:
    path = tmp_path / "trace"
    more = ("--interval", "0.2", "--guest", "process", "--kill-primary-at", kill_at, "--trace", str(path))
    line = python_command("colocache.cli", "main", "demo", *SMALL, *more)
    ran = subprocess.run(line, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    events = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(names.values()) == {"primary", "secondary"}
    for side in ("primary", "secondary"):
        found = [event for event in events if event["ph"] == "X" and names[event["pid"]] == side]
        done = [event["args"]["epoch"] for event in found if event["name"] == "checkpoint"]
        assert done[:2] == [1, 2]  # what a killed process did last may be missing
        assert nested(found)
    # One clock: the secondary's checkpoint lies in the primary's.
    mine, theirs = (
        [one for one in spans(events, 2) if one["name"] in ("ask", "answer") and names[one["pid"]] == side]
        for side in ("primary", "secondary")
    )
    assert mine[0]["ts"] < theirs[0]["ts"] < mine[-1]["ts"] + mine[-1]["dur"]


def test_a_secondary_whose_machine_is_killed_goes_on_with_the_same_trace(tmp_path: Path) -> None:
    path, socket = tmp_path / "trace", tmp_path / "socket"
    common = ("--guest", "process", "--ram", "16M", "--backing", "shm", "--events", "--pair", "traced")
    line = python_command("colocache.cli", "main", "secondary", "--listen", f"unix:{socket}", *common)
    peer = ("--connect", f"unix:{socket}", "--interval", "0.05")
    with subprocess.Popen([*line, "--trace", str(path)], stdout=subprocess.PIPE, text=True) as secondary:
        assert secondary.stdout is not None
        with subprocess.Popen(
            python_command("colocache.cli", "main", "primary", *peer, *common), stdout=subprocess.DEVNULL
        ) as primary:
            seen: list[dict[str, Any]] = []

            def until(event: str, count: int) -> None:
                while sum(one["event"] == event for one in seen) < count:
                    seen.append(json.loads(secondary.stdout.readline()))  # type: ignore[union-attr]

            until("checkpoint", 3)
            time.sleep(0.3)
            (child,) = Path(f"/proc/{secondary.pid}/task/{secondary.pid}/children").read_text().split()
            subprocess.run(["kill", "-KILL", child], check=True)
            until("restarted", 1)
            seen.clear()
            until("checkpoint", 2)
            primary.send_signal(signal.SIGTERM)
        secondary.communicate(timeout=30)
    events = json.loads(path.read_text())
    pids = {event["pid"] for event in events if event["ph"] == "X" and event["name"] == "checkpoint"}
    assert len(pids) == 2
