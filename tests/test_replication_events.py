# SPDX-License-Identifier: Apache-2.0
"""Events reach their reader whole: one line each, whoever is killed, and a reader that went away stops no machine."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator

import pytest

from colocache.replication.events import Events


@pytest.fixture(params=[True, False], ids=["unbuffered", "buffered"])
def packets(request: pytest.FixtureRequest) -> Iterator[tuple[int, io.TextIOWrapper]]:
    """A pipe whose reader gets each write() of the writer by itself (pipe(2), O_DIRECT), as a stdout of Python's."""
    read, write = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    raw = io.FileIO(write, "w")
    out = io.TextIOWrapper(raw if request.param else io.BufferedWriter(raw), write_through=request.param)
    yield read, out
    os.close(read)
    out.close()


def test_a_process_killed_while_it_reports_leaves_no_line_without_its_end(
    packets: tuple[int, io.TextIOWrapper],
) -> None:
    """The keeper writes to the same pipe: half a line would swallow what it says of the death."""
    read, out = packets
    events = Events("secondary", machine_readable=True, out=out)
    for epoch in (1, 2):
        events.emit("checkpoint", f"epoch {epoch}: flushed", epoch=epoch)
        packet = os.read(read, 1 << 16)
        assert packet.endswith(b"\n")
        assert json.loads(packet)["epoch"] == epoch


def test_a_sentence_for_people_is_one_write_too(packets: tuple[int, io.TextIOWrapper]) -> None:
    read, out = packets
    Events("primary", machine_readable=False, out=out).emit("start", "guest kvm")
    assert os.read(read, 1 << 16) == b"primary: guest kvm\n"


def test_a_reader_that_went_away_stops_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(io.FileIO(write, "w"), write_through=True) as out:
        with pytest.raises(BrokenPipeError):  # what Events meets, and keeps to itself
            out.write("a line")
        events = Events("secondary", machine_readable=True, out=out)
        events.emit("checkpoint")
        events.emit("checkpoint")


def test_a_process_without_a_stdout_reports_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with `>&-`, Python's sys.stdout is None."""
    monkeypatch.setattr("sys.stdout", None)
    Events("secondary", machine_readable=True).emit("checkpoint")
