# SPDX-License-Identifier: Apache-2.0
"""How long a VM stands still: the measured is measured, the estimated says from what, and the sum is the sum."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from colocache.measure import cases, standstill
from colocache.measure.answer import first_line
from colocache.measure.guest_times import guest_times
from colocache.measure.host import examine
from colocache.measure.rig import Rig, WrongResultError
from colocache.measure.session import Plan
from colocache.measure.standstill import WIRE_SHARE, Standstill, ram_for

PLAN = Plan((32 << 20,), ("shm",), (2,), 3, quick=True)
DIRTY = 8 << 20


@pytest.fixture(scope="module")
def slow_network() -> standstill.Answer:
    """8 MiB over a network that is slower than any socket here."""
    return Standstill(PLAN, examine(), DIRTY, 1e8).run()


def test_what_fits_into_the_guest_is_measured_and_the_rest_estimated_from_the_largest(
    slow_network: standstill.Answer,
) -> None:
    assert [pause.dirty_bytes for pause in slow_network.pauses] == sorted({DIRTY, *standstill.SIZES})
    for pause in slow_network.pauses:
        fits = ram_for(pause.dirty_bytes) <= 32 << 20
        assert (pause.flush.measured, pause.seal.measured) == (fits, fits)
        assert pause.flush_part.known == fits
        assert not pause.transfer.measured
        assert pause.seconds == pytest.approx(sum(part.seconds for part in pause.parts.values() if part))
    largest = [pause for pause in slow_network.pauses if pause.flush.measured][-1]
    whole = slow_network.pauses[-1]
    assert whole.flush.seconds == pytest.approx(largest.flush.seconds * whole.dirty_bytes / largest.dirty_bytes)
    assert "from 10 MB, measured" in whole.flush.source


def test_a_slow_network_bounds_the_transfer_and_a_fast_one_does_not(slow_network: standstill.Answer) -> None:
    asked = slow_network.asked
    assert asked.transfer.seconds == pytest.approx(DIRTY / (1e8 / 8 * WIRE_SHARE))
    assert "0.1 Gbit/s" in asked.transfer.source
    fast = Standstill(PLAN, examine(), DIRTY, 1e13)
    part = fast._transfer(DIRTY, rate=1e9)
    assert part.seconds == pytest.approx(DIRTY / 1e9)
    assert "the network gives more" in part.source


def test_the_first_line_is_the_answer_with_both_figures(slow_network: standstill.Answer) -> None:
    line = first_line(slow_network)
    assert line.startswith("8 MiB dirty over 0.1 Gbit/s: your VM stands still for about ")
    assert "(estimated); the flush's part of it, seal and flush, is " in line
    assert line.endswith("(measured).")


def test_a_wrong_flush_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.flush_ns

    def wrong(rig: Rig, pattern: object) -> int:
        took = right(rig, pattern)  # type: ignore[arg-type]
        rig.guest[:] = 0
        return took

    monkeypatch.setattr(standstill, "flush_ns", wrong)
    with pytest.raises(WrongResultError, match="our seal and flush of"):
        Standstill(PLAN, examine(), DIRTY, None).run()


def test_a_guest_tells_what_its_log_and_its_state_take() -> None:
    found = guest_times(3)
    assert found.sync_ns_per_page > 0
    assert found.load_ns > 0
    assert found.sync_pages >= 1
    assert found.state_bytes > 100


# ---- the command ----


def bench(*args: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "colocache", "bench", *args]
    given = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=given)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_answer_comes_first_and_fits_the_terminal(columns: int) -> None:
    small = ("--ram", "16M", "--backing", "shm", "--rounds", "1", "--quick")
    done = bench("--dirty", "4G", "--network", "10G", *small, "--json", columns=columns)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("4 GiB dirty over 10 Gbit/s: your VM stands still for about ")
    assert "…" not in done.stdout
    rules = [line for line in lines if line.startswith("──")]
    assert len(rules) == 2
    assert max(len(line.rstrip()) for line in rules) <= columns
    found = json.loads(lines[-1])
    assert found["dirty_bytes"] == 4 << 30
    assert found["pause_seconds"] == found["sizes"][-1]["pause_seconds"] > found["flush_part_seconds"]["p50"] > 0
    assert found["flush_part_seconds"]["p10"] is None, "of one round there is no spread"
    assert set(found["sizes"][0]["parts"]) == {"log_sync", "transfer", "seal", "flush", "load"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--network", "10G"), "--network goes with --dirty"),
        (("--dirty", "0"), "give 1M to"),
        (("--dirty", "4G", "--network", "nan"), "no rate of a network"),
        (("--dirty", "4G", "--network", "1"), "no rate of a network"),
        (("--dirty", "4G", "--network", "G"), "no rate of a network"),
        (("--dirty", "4G", "--full"), "--dirty excludes"),
    ],
)
def test_what_makes_no_sense_is_refused(args: tuple[str, ...], said: str) -> None:
    done = bench(*args)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")


def test_a_guest_that_shared_memory_has_no_room_for_is_measured_smaller_and_it_says_why() -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a /dev/shm of 160 MiB can only be had by root")
    script = 'mount -t tmpfs -o size=160m tmpfs /dev/shm && exec "$0" -m colocache bench "$@"'
    args = ("--dirty", "100M", "--ram", "120M", "--backing", "shm", "--rounds", "1", "--threads", "1", "--json")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, *args],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ram_bytes"] == 60 << 20
    assert "guest RAM is 60 MiB: 120 MiB would take 240 MiB of /dev/shm, which has room for 160" in report["notes"]
    assert any("more was not measured in a guest of 60 MiB" in note for note in report["notes"])
