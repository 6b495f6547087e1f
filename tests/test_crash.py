# SPDX-License-Identifier: Apache-2.0
"""Death at every store that matters: C programs fork children, kill them at each crash point, attach and compare.

The programs are built here from csrc with -DCOLOCACHE_FAULTS; the installed package has no crash points.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "c" / "run_faults.sh"

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


def build(how: str, where: Path) -> Path:
    """Build the fault programs into `where`; a failing build is a failing test, with the compiler's words."""
    done = subprocess.run([str(SCRIPT), how, str(where)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build", tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("setarch") is None:
        pytest.skip("setarch is missing: sanitizers need address randomisation turned down on some kernels")
    return build("build-sanitized", tmp_path_factory.mktemp("faults-sanitized"))


def run_together(*commands: list[str]) -> list[dict[str, Any]]:
    """Run programs at the same time, one a core; their JSON lines, or the first breach."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    ends = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, ends, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output) for output, _ in ends]


def summed(results: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(result[key] for result in results) for key in results[0]}


@pytest.mark.parametrize("memory", ["mirror", "sparse", "bounded"])
def test_no_death_at_any_point_leaves_a_mix_or_no_state(
    programs: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All pairs of bitmaps; of a sparse cache, a mirror too but for where its pages come from, each sixteenth pair."""
    crash = [str(programs / "crash"), "--memory", memory]
    each = 16 if memory == "sparse" else 1
    cases = 256 // each
    total = summed(run_together(*([*crash, "--cases", f"{half * each}:{2 * each}"] for half in (0, 1))))
    assert total["cases"] == cases
    assert total["kills"] == total["points"] > cases * 100
    assert total["attach_kills"] > cases * 4 * 10
    with capsys.disabled():
        print(
            f"\ncrash points, {memory}: {total['cases']} pairs of bitmaps, {total['kills']} deaths (each at a point of "
            f"its own), {total['attach_kills']} deaths inside attach, {total['recoveries']} recoveries "
            "compared with the model"
        )


def test_a_death_while_blocks_come_and_go_leaves_those_of_before_or_after(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = str(programs / "crash_blocks")
    total = summed(run_together([blocks, "mirror"], [blocks, "bounded"]))
    assert total["points"] > 600
    assert total["attach_kills"] > 3000
    with capsys.disabled():
        print(f"\nblocks that come and go: {total['points']} deaths, {total['attach_kills']} inside attach")


def test_death_in_a_flush_of_several_threads_is_replayed(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = [str(programs / "crash_threads"), "300", "1"]
    for memory, result in zip(("mirror", "bounded"), run_together(threads, [*threads, "bounded"]), strict=True):
        assert result["kills"] >= 300
        assert result["replays"] > 250
        with capsys.disabled():
            print(f"\nflush in 3 threads, {memory}: {result['kills']} deaths, {result['pages_checked']} pages")


def test_no_thread_is_told_of_a_takeover_before_shared_memory_says_it(programs: Path) -> None:
    done = subprocess.run([str(programs / "crash_failover")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "= 3 passed, 0 failed, 0 skipped"), done.stdout


@pytest.mark.parametrize("memory", ["mirror", "bounded"])
def test_damage_is_refused_and_nothing_is_written(
    programs: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage = [[str(programs / "crash_damage"), str(state), memory] for state in range(5)]
    results = [*run_together(damage[1], damage[2]), *run_together(damage[0], damage[3], damage[4])]
    total = summed(results)
    assert total["flips"] == total["refused"] + total["harmless"] > 300_000
    assert all(result["flips"] > 30_000 for result in results)
    with capsys.disabled():
        print(
            f"\ndamage, {memory}: bits of the control region turned over {total['flips']} times, alone and in pairs: "
            f"{total['refused']} refused, {total['harmless']} without any effect"
        )


def test_deaths_and_recoveries_are_clean_under_sanitizers(sanitized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crash = ["setarch", "-R", str(sanitized / "crash")]
    total = summed(run_together([*crash, "--cases", "9:256"], [*crash, "--memory", "bounded", "--cases", "214:256"]))
    assert total["cases"] == 2
    with capsys.disabled():
        print(f"\nunder address and undefined-behaviour sanitizers: {total['kills'] + total['attach_kills']} deaths")
