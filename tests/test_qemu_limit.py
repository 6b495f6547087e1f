# SPDX-License-Identifier: Apache-2.0
"""`--memory-limit` of a secondary on QEMU: kept by the kernel's own figure, whatever both guests write; each size of
it works or is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from qemu_support import needs_qemu
from test_demo import demo, report_of
from test_memory_limit import group, wait_until  # noqa: F401 -- a fixture

from colocache.children import python_command

pytestmark = needs_qemu
LIMIT = 40 << 20
SLACK = 8 << 20  # by which the peak of QEMU's own memory differs from run to run: how many of them overlap, and when
GUEST = ("--guest", "qemu", "--accel", "tcg", "--ram", "128M")
DEMO = (*GUEST, "--checkpoints", "4", "--interval", "0.2", "--run-on", "1")


def peak_of_a_secondary(
    group: tuple[Path, Path, Path],  # noqa: F811
    where: Path,
    *guest: str,
    limit: int,
) -> tuple[int, list[dict[str, int]]]:
    """The kernel's peak while a pair is in step, the image and QEMU's processes too; what the secondary tells."""
    folder, peak, _ = group
    events = where / f"events-{limit}"
    meeting = f"unix:{where}/s-{limit}"
    common = ("--events", *GUEST, *guest, "--run-on", "0.1")
    with events.open("wb") as out:
        secondary = subprocess.Popen(
            python_command(
                "colocache.cli", "main", "secondary", *common, "--listen", meeting, "--memory-limit", str(limit)
            ),
            stdout=out,
            preexec_fn=lambda: (folder / "cgroup.procs").write_text(str(os.getpid())),  # noqa: PLW1509
        )
    try:
        wait_until(lambda: b'"listening"' in events.read_bytes())
        to = ("--connect", meeting, "--interval", "0.2", "--checkpoints", "12", "--verify", "none")
        primary = subprocess.Popen(
            python_command("colocache.cli", "main", "primary", *common, *to), stdout=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: b'"checkpoint"' in events.read_bytes() or secondary.poll() is not None)
            peak.write_text("0")
            assert primary.wait(120) == 0
        finally:
            primary.kill()
        assert secondary.wait(30) == 0
    finally:
        secondary.kill()
        secondary.wait()
    memory = [json.loads(line) for line in events.read_text().splitlines() if '"event": "memory"' in line]
    return int(peak.read_text()), memory


def test_a_secondary_on_qemu_stays_below_its_limit_by_the_kernels_own_peak(
    group: tuple[Path, Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Beside QEMU's processes: a guest that writes nearly nothing has as many of them. Each guest writes 32 MiB over
    and over, so that both together are more than the limit."""
    idle, _ = peak_of_a_secondary(group, tmp_path, "--steps-per-second", "20", limit=LIMIT + 4096)
    peak, memory = peak_of_a_secondary(group, tmp_path, "--steps-per-second", "0", "--working-set", "32M", limit=LIMIT)
    assert len(memory) == 12
    assert max(one["private_bytes"] + one["staged_bytes"] for one in memory) > LIMIT // 4
    passed = max(one["passed_bytes"] for one in memory)
    assert peak - idle + memory[0]["bookkeeping_bytes"] <= LIMIT + passed + SLACK


@pytest.mark.parametrize(("limit", "speed"), [("1M", "300"), ("8M", "20000"), ("1G", "20000")])
def test_a_demo_under_a_limit_takes_over_and_folds(limit: str, speed: str) -> None:
    """Of a megabyte the secondary's machine hardly runs between checkpoints; after the takeover nothing holds it up."""
    report = report_of(demo(*DEMO, "--steps-per-second", speed, "--memory-limit", limit, "--json", timeout=120))
    assert report["wrong_pages"] == 0
    assert report["failover"]["steps_run_on"] > 0
    assert report["failover"]["folded_bytes"] is not None
    assert report["memory_limit"]["peak_bytes"] > 0


def test_a_guest_that_is_too_fast_for_its_limit_is_one_sentence() -> None:
    """Between two looks it writes more than all that there is room for."""
    ran = demo(*DEMO, "--steps-per-second", "0", "--memory-limit", "400K")
    assert ran.returncode == 1
    assert "leaves room for" in ran.stderr
    assert "start a fresh one with a larger limit" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("limit", ["1", "4K"])
def test_a_limit_that_no_secondary_can_keep_is_one_sentence(limit: str) -> None:
    ran = demo(*DEMO, "--memory-limit", limit)
    assert ran.returncode == 1
    assert "64 pages are the least to keep it in step: give at least " in ran.stderr
    assert "Traceback" not in ran.stderr
