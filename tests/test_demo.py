# SPDX-License-Identifier: Apache-2.0
"""`colocache demo` end to end: real machines, real kills, and nothing left behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import colocache
from colocache import backing as bk
from colocache.children import python_command
from colocache.choices import MEMORY_MODES, RESUME_AT
from colocache.demo.room import check_pair_fits
from colocache.demo.tally import Tally, percentile, summary_of
from colocache.replication.results import SENT_STAGES, STAGES
from colocache.vmm import blocks_for
from colocache.vmm.kvm import kvm_trouble

FIELDS = {
    "guest", "backing", "flush", "ram_bytes", "checkpoints", "pvm_pages", "svm_pages", "both_pages", "flushed_pages",
    "pause_ms", "pvm_pause_ms", "flush_gb_per_s", "failover", "verified_pages", "wrong_pages",
}  # fmt: skip
SMALL = ("--ram", "16M", "--checkpoints", "4", "--interval", "0.05", "--run-on", "0.1", "--reconnect-limit", "0.05")
KILL_POINTS = ("running", "receiving", "sealed", "random")
GUESTS = (pytest.param("kvm", marks=pytest.mark.kvm), "process")


@pytest.fixture(autouse=True)
def _guest_is_possible(request: pytest.FixtureRequest) -> None:
    if "guest" in request.fixturenames and request.getfixturevalue("guest") == "kvm" and kvm_trouble():
        pytest.skip(str(kvm_trouble()))


def command(*args: str) -> list[str]:
    return python_command("colocache.cli", "main", *args)


def demo(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """One run to its end; it must leave nothing behind, however it ends."""
    line = command("demo", *args)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            out, errors = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            running.terminate()
            raise
    assert left_by(running.pid) == []
    return subprocess.CompletedProcess(line, running.returncode, out, errors)


def report_of(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report


def regions_of(pid: int) -> list[str]:
    """Regions that the demo with this pid made."""
    return [region.name for region in colocache.list_regions() if region.name.startswith(f"demo-{pid}-")]


def left_by(pid: int) -> list[str]:
    """Regions and folders that the demo with this pid left."""
    return [*regions_of(pid), *(str(path) for path in Path(tempfile.gettempdir()).glob(f"colocache.demo-{pid}-*"))]


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("kill_at", KILL_POINTS)
@pytest.mark.parametrize("guest", GUESTS)
def test_the_secondary_takes_over_wherever_the_primary_dies_and_no_page_is_wrong(
    guest: str, kill_at: str, memory: str
) -> None:
    how = ("--guest", guest, "--kill-primary-at", kill_at, "--backing", "shm", "--memory", memory)
    report = report_of(demo(*SMALL, *how, "--json"))
    assert set(report) >= FIELDS
    assert report["memory"] == memory
    assert report["guest"] == guest
    assert report["wrong_pages"] == 0
    done = report["checkpoints"]
    if kill_at == "random":
        assert done >= 1
    else:
        assert done == (5 if kill_at == "sealed" else 4)
        assert report["failover"]["epoch"] == done, "the takeover is from the newest sealed epoch"
    # Each flush, the takeover and the end: every page each time.
    assert report["verified_pages"] == (done + 2) * (16 << 20) // 4096
    assert report["flushed_pages"] == report["pvm_pages"] + report["svm_pages"] + report["both_pages"]
    if memory == "bounded":  # what it wrote was private: there is nothing to copy back
        assert report["svm_pages"] == report["both_pages"] == 0
        assert report["failover"]["folded_bytes"] > 0, "it runs on over one image"
    elif done > 1:
        assert report["svm_pages"] > 0, "the secondary's guest never drifted apart: the check proves nothing"
        assert report["both_pages"] > 0
    assert (report["failover"]["folded_bytes"] is not None) == (memory == "bounded")
    assert report["failover"]["steps_run_on"] > 0


@pytest.mark.parametrize("backing", ["shm", "hugetlb", "thp"])
def test_every_backing_works_with_all_of_ram_as_working_set(backing: str) -> None:
    if backing == "hugetlb" and bk.huge_pages().free < 32:
        pytest.skip("32 free huge pages are needed")
    if backing == "thp" and bk.thp_mode() in ("never", "deny"):
        pytest.skip(f"shmem_enabled is {bk.thp_mode()}")
    report = report_of(demo(*SMALL, "--backing", backing, "--working-set", "16M", "--json"))
    assert report["backing"] == backing
    assert report["wrong_pages"] == 0
    assert report["flushed_pages"] > 4096 // 2


def test_the_report_has_the_pauses_of_both_machines_with_their_stages_and_says_when_the_primary_ran_again() -> None:
    for resume_at in RESUME_AT:
        report = report_of(demo(*SMALL, "--resume-at", resume_at, "--json"))
        assert report["resume_at"] == resume_at
        assert list(report["stages_ms"]) == list(STAGES)
        assert set(report["pvm_stages_ms"]) == set(SENT_STAGES)
        shares = [report["pvm_stages_ms"][stage]["max"] for stage in SENT_STAGES if stage not in ("ask", "stop")]
        assert report["pvm_pause_ms"]["max"] <= sum(shares) + 0.001


@pytest.mark.parametrize(("verify", "moments"), [("none", 2), ("last", 3), ("all", 6)])
def test_verify_says_how_often_every_page_is_compared(verify: str, moments: int) -> None:
    report = report_of(demo(*SMALL, "--verify", verify, "--json"))
    assert report["verified_pages"] == moments * 4096


def test_over_tcp(tmp_path: Path) -> None:
    assert report_of(demo(*SMALL, "--transport", "tcp", "--json"))["wrong_pages"] == 0


def test_words_for_people_end_with_the_verdict_and_show_no_table_in_a_pipe() -> None:
    ran = demo(*SMALL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "OK: the secondary took over and every page was right"
    assert ran.stderr == ""


def test_a_wrong_page_is_reported_and_the_exit_status_says_so() -> None:
    """The demo believes nobody: here the secondary's own report of wrong pages."""
    from colocache.demo.run import DemoOptions, DemoRun
    from colocache.replication.signals import stop_on_signals

    with stop_on_signals() as stop:
        options = DemoOptions(ram_bytes=16 << 20, checkpoints=2, interval=0.05, run_on=0.1, reconnect_limit=0.05)
        run = DemoRun(options, stop, on_event=lambda _: None, on_note=lambda _: None)
        add = run.tally.add

        def tamper(event: dict[str, Any]) -> None:
            add({**event, "wrong_pages": 3} if event["event"] == "takeover" else event)

        run.tally.add = tamper  # type: ignore[method-assign]
        assert run.run()["wrong_pages"] == 3


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--ram", "17"), "Error: "),
        (("--ram", "lots"), "is not a size"),
        (("--ram", "400G", "--backing", "shm"), "missing"),
        (("--interval", "-1"), "--interval"),
        (("--kill-primary-at", "noon"), "--kill-primary-at"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(args: tuple[str, ...], what: str) -> None:
    ran = demo(*args)
    assert ran.returncode != 0
    assert what in ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
    assert len([line for line in ran.stderr.splitlines() if line.startswith("Error: ")]) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
def test_a_signal_cleans_up_and_ends_with_the_usual_status(signum: signal.Signals, seconds: float) -> None:
    args = [*SMALL, "--checkpoints", "1000", "--backing", "shm"]
    with subprocess.Popen(command("demo", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert wait_for(lambda: regions_of(running.pid) != [])
        time.sleep(seconds)
        running.send_signal(signum)
        out, errors = running.communicate(timeout=40)
    assert running.returncode == -signum, out + errors
    assert "Traceback" not in errors
    assert left_by(running.pid) == []


def test_both_sides_end_when_the_demo_itself_is_killed() -> None:
    args = [*SMALL, "--checkpoints", "1000", "--backing", "shm"]
    with subprocess.Popen(command("demo", *args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        assert wait_for(lambda: regions_of(running.pid) != [])
        time.sleep(1.0)
        running.kill()
    assert wait_for(lambda: regions_of(running.pid) == [])

    def alive() -> list[str]:
        said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return [line for line in said.splitlines() if f"--die-with-parent {running.pid}" in line]

    assert wait_for(lambda: alive() == [])
    left = left_by(running.pid)
    assert len(left) == 1, "nobody was there to remove the folder"
    ran = subprocess.run(command("clean"), capture_output=True, text=True, check=True)
    assert f"removed {left[0]}: the folder of a killed process" in ran.stdout
    assert left_by(running.pid) == []


def test_clean_leaves_the_folder_of_a_demo_that_lives() -> None:
    args = [*SMALL, "--checkpoints", "1000", "--backing", "shm"]
    with subprocess.Popen(command("demo", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert wait_for(lambda: regions_of(running.pid) != [])
        subprocess.run(command("clean"), capture_output=True, check=True)
        there = left_by(running.pid)
        running.terminate()
        running.communicate(timeout=40)
    assert len(there) == 2, "its region and its folder"
    assert left_by(running.pid) == []


def test_a_pair_that_needs_more_huge_pages_than_there_are_says_so_before_a_machine_starts() -> None:
    free = bk.huge_pages().free
    mib = max(2, free)  # three images of it are half as much again as there is
    ran = demo("--ram", f"{mib}M", "--backing", "hugetlb")
    assert ran.returncode == 1
    (sentence,) = ran.stderr.splitlines()
    needed = re.search(r"Error: (\d+) huge pages of 2 MiB are needed and (\d+) are free", sentence)
    assert needed, sentence
    assert int(needed[1]) >= 3 * mib // 2, "for both sides"


@pytest.mark.parametrize(
    ("backing", "huge_free", "memory", "fits"),
    [
        ("hugetlb", 200, 0, True), ("hugetlb", 190, 1 << 40, False), ("shm", 0, 400, True), ("shm", 200, 300, False),
        ("auto", 200, 0, True), ("auto", 190, 64, False), ("auto", 190, 130, True), ("auto", 70, 200, False),
        ("auto", 70, 260, True), ("auto", 0, 370, False), ("auto", 0, 400, True),
    ],
)  # fmt: skip
def test_whether_both_sides_fit_is_asked_for_both_together(
    monkeypatch: pytest.MonkeyPatch, backing: str, huge_free: int, memory: int, fits: bool
) -> None:
    """A guest of 128 MiB in two blocks; huge pages that are free, and MiB of memory."""
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(huge_free, huge_free))
    monkeypatch.setattr(bk, "memory_available", lambda: memory << 20)
    monkeypatch.setattr(bk, "shm_available", lambda: 1 << 50)
    specs = blocks_for(128 << 20, "process")
    if fits:
        check_pair_fits(backing, specs)
    else:
        with pytest.raises(colocache.MemoryShortError, match="missing"):
            check_pair_fits(backing, specs)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_percentiles_are_of_the_values_themselves() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert summary_of([5.0]) == {"p50": 5.0, "p99": 5.0, "max": 5.0}


def test_a_bounded_secondary_needs_one_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bk, "memory_available", lambda: 300 << 20)
    monkeypatch.setattr(bk, "shm_available", lambda: 1 << 50)
    specs = blocks_for(128 << 20, "process")
    check_pair_fits("shm", specs, "bounded")
    with pytest.raises(colocache.MemoryShortError):
        check_pair_fits("shm", specs, "mirror")


def test_the_tally_adds_each_checkpoint_once_and_only_the_secondarys_pages() -> None:
    tally = Tally()
    checkpoint = {
        "event": "checkpoint", "side": "secondary", "pvm_pages": 1, "svm_pages": 2, "both_pages": 3, "flushed_pages": 6,
        "bytes": 6 * 4096, "stages": {"copy_ms": 0.5}, "pause_ms": 2.0, "verified_pages": 10, "wrong_pages": 1,
    }  # fmt: skip
    tally.add(checkpoint)
    tally.add({**checkpoint, "pause_ms": 4.0, "stages": {"copy_ms": 1.0}})
    primary = {
        "event": "checkpoint", "side": "primary", "pause_ms": 7.0, "stages": {"answer_ms": 6.0, "log_ms": 1.0},
        "stood_ms": 0.5,
    }  # fmt: skip
    tally.add({**primary, "t": 10**9, "steps": 100})
    assert tally.report(None)["pvm_steps_per_s"] == 0
    tally.add({**primary, "t": 3 * 10**9, "steps": 500})
    report = tally.report(None)
    assert (report["checkpoints"], report["flushed_pages"], report["wrong_pages"]) == (2, 12, 2)
    assert report["pause_ms"] == {"p50": 2.0, "p99": 4.0, "max": 4.0}
    assert report["pvm_pause_ms"]["max"] == 7.0
    assert report["pvm_steps_per_s"] == 200
    assert {stage: one["p99"] for stage, one in report["pvm_stages_ms"].items()} == {"answer": 6.0, "log": 1.0}
    assert report["stages_ms"] == {"copy": {"p50": 0.5, "p99": 1.0, "max": 1.0}}
    assert report["flush_gb_per_s"] == round(12 * 4096 / 1.5e6, 3)
    assert report["failover"] is None


def test_the_bench_of_pauses_sets_four_ways_beside_each_other() -> None:
    """bench/pause.py, with the least of everything."""
    script = Path(__file__).resolve().parent.parent / "bench" / "pause.py"
    if not script.is_file():
        pytest.skip("these tests are not in a source tree")
    least = (
        "--ram", "16M", "--set", "1M", "--checkpoints", "3", "--interval", "0.05", "--rounds", "1",
        "--guest", "process", "--backing", "shm",
    )  # fmt: skip
    ran = subprocess.run([sys.executable, str(script), *least, "--json"], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)["results"]
    assert len(results) == 2 * 4
    for result in results:
        assert result["pvm_pause_ms"]["p50"] <= result["pvm_pause_ms"]["max"]
        assert result["pvm_stages_ms"]["answer"]["p50"] > 0
        assert result["pvm_steps_per_s"] > 0
        assert result["alone_steps_per_s"] > 0
        assert result["cores_busy"] > 0
        assert result["alone_cores_busy"] > 0
