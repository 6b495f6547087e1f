# SPDX-License-Identifier: Apache-2.0
"""`colocache bench` end to end, on a small guest."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from colocache import backing as bk
from colocache import list_regions
from colocache.measure import huge

SMALL = ("--quick", "--ram", "16M", "--rounds", "3")
HOST_FIELDS = {"cpu", "cores", "numa_nodes", "ram_bytes", "huge_pages", "kernel"}
ROW_FIELDS = {
    "case", "backing", "strategy", "ram_bytes", "dirty_ratio", "run_pages", "threads", "seconds", "gb_per_s", "of_peak",
    "baseline_ratio",
}  # fmt: skip


def bench(*args: str, **given: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "colocache", "bench", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **given)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run with everything that it can write."""
    folder = tmp_path_factory.mktemp("bench")
    done = bench(
        *SMALL, "--backing", "shm", "--threads", "1", "--threads", "2", "--json", "--csv", str(folder / "rows.csv")
    )
    assert done.returncode == 0, done.stderr
    (folder / "report.json").write_text(done.stdout.splitlines()[-1])
    return done, folder


def test_json_is_the_last_line_and_has_the_fields_that_were_promised(
    ran: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    report = json.loads(ran[0].stdout.splitlines()[-1])
    assert set(report["host"]) >= HOST_FIELDS
    assert set(report["peak_gb_per_s"]) == {"shm"}
    assert set(report["peak_gb_per_s"]["shm"]) == {"1", "2"}
    assert {row["case"] for row in report["rows"]} == {"union", "receive", "flush", "pause", "checkpoint"}
    for row in report["rows"]:
        assert set(row) >= ROW_FIELDS
        assert set(row["seconds"]) == {"p10", "p50", "p90"}
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["p50"] <= row["seconds"]["p90"]
        assert (row["backing"], row["strategy"], row["ram_bytes"]) == ("shm", "copy", 16 << 20)
    for row in report["rows"]:
        if row["case"] in ("flush", "pause", "receive"):
            assert row["of_peak"] > 0
        assert row["baseline_ratio"] > 0


def test_a_person_reads_tables_and_how_noisy_the_machine_was_and_a_pipe_gets_no_progress_bar(
    ran: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    words = ran[0].stdout
    for part in ("peak", "QEMU", "GB/s", "Peak copy bandwidth on shm, 2 threads", "This machine was", "1 NUMA node"):
        assert part in words
    assert "shm, 16 MiB, 2 threads, 3 rounds" in words
    assert "GB/s: 1e9 bytes copied in a second, each byte counted once" in words
    assert "\x1b" not in words + ran[0].stderr
    assert ran[0].stderr.splitlines() == [f"rows written to {ran[1] / 'rows.csv'}"]


def test_help_names_every_field_of_the_report(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    report = json.loads(ran[0].stdout.splitlines()[-1])
    told = set(re.findall(r"[a-z_]+", bench("--help").stdout))
    assert set(report) | set(report["rows"][0]) <= told


def test_csv_has_a_line_per_row(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    report = json.loads(ran[0].stdout.splitlines()[-1])
    with (ran[1] / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["rows"])
    assert float(rows[0]["seconds_p50"]) == report["rows"][0]["seconds"]["p50"]


def test_two_reports_are_set_side_by_side(ran: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path) -> None:
    """The second machine is the first, twice as fast; its report is a whole output, not only its last line."""
    report = json.loads((ran[1] / "report.json").read_text())
    report["host"]["cpu"] = "Twice"
    for row in report["rows"]:
        row["gb_per_s"] *= 2
        row["seconds"] = {name: value / 2 for name, value in row["seconds"].items()}
    other = tmp_path / "other.json"
    other.write_text("tables\n\n" + json.dumps(report) + "\n")
    done = bench("--compare", str(ran[1] / "report.json"), str(other), "--json")
    assert done.returncode == 0, done.stderr
    assert "B: Twice" in done.stdout
    assert "100 % more GB/s" in done.stdout
    assert "NOT ALIKE" not in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"]
    assert {round(row["b_faster"], 6) for row in found["rows"]} == {2.0}


def test_comparing_something_else_is_one_sentence(tmp_path: Path) -> None:
    other = tmp_path / "x.json"
    row = dict.fromkeys(ROW_FIELDS, 1) | {"case": "flush", "backing": "shm", "strategy": "copy"}
    for text in (
        '{"rows": 3}',
        "[" * 100_000,
        json.dumps({"host": {}, "peak_gb_per_s": {}, "rows": [row]}),
        json.dumps({"host": {}, "peak_gb_per_s": {"shm": {"x": 1}}, "rows": []}),
        json.dumps({"host": {}, "peak_gb_per_s": {}, "rows": [row | {"seconds": {"p50": "1"}}]}),
    ):
        other.write_text(text)
        done = bench("--compare", str(other), str(other))
        assert done.returncode == 1
        assert "holds no report of `colocache bench --json`" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["0", "15M"])
def test_a_guest_too_small_to_measure_is_refused(size: str) -> None:
    done = bench("--ram", size)
    assert done.returncode == 2
    assert "give at least 16M" in done.stderr


def changed(report: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The same report with these fields in each row."""
    return {**report, "rows": [{**row, **fields} for row in report["rows"]]}


def test_what_is_not_alike_is_said_loudly_and_cells_in_error_have_no_verdict(
    ran: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    report = json.loads((ran[1] / "report.json").read_text())
    other = tmp_path / "other.json"
    for fields, said in (
        ({"ram_bytes": 64 << 20}, "NOT ALIKE shm, A 16 MiB on 2 threads, B 64 MiB on 2 threads"),
        ({"threads": 4}, "B 16 MiB on 4 threads"),
        ({"error": "measuring error: 1.3 of the peak"}, "error in B"),
        ({"rounds": 1}, "fewer than 3 rounds"),
        ({}, "within the spread"),
    ):
        other.write_text(json.dumps(changed(report, **fields)))
        done = bench("--compare", str(ran[1] / "report.json"), str(other), "--json")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        rows = json.loads(done.stdout.splitlines()[-1])["rows"]
        assert all(row["alike"] == (row["a_threads"] == row["b_threads"] and "ram_bytes" not in fields) for row in rows)
        assert ("less GB/s" in done.stdout) is False


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_number_is_cut_and_no_line_is_longer_than_the_terminal(
    ran: tuple[subprocess.CompletedProcess[str], Path], width: int
) -> None:
    """Through --compare and the tables, drawn from the same run."""
    files = [str(ran[1] / "report.json")] * 2
    done = bench("--compare", *files, env={**os.environ, "COLUMNS": str(width)})
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    tables = [line for line in done.stdout.splitlines() if not line.startswith(("A: ", "B: "))]
    assert max(len(line.rstrip()) for line in tables) <= max(width, 70)


def test_plots_are_drawn_as_png_and_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench(*SMALL, "--backing", "shm", "--threads", "1", "--threads", "2", "--plots", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == [f"{name}.{kind}" for name in ("pause", "scaling", "throughput") for kind in ("png", "svg")]
    assert (tmp_path / "p" / "throughput.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("pause", "scaling", "throughput"):
        text = (tmp_path / "p" / f"{name}.svg").read_text()
        assert "16 MiB guest" in text, "text stays text, and says what the figures are of"
        assert "3 rounds" in text
        assert "thread" in text
        assert "QEMU 10.2" in text


def test_plots_without_matplotlib_say_what_to_install_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    start = time.monotonic()
    done = bench("--plots", str(tmp_path / "p"), env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "install 'colocache[bench]'" in done.stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / "p").exists()


def test_a_backing_that_is_not_there_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    if bk.thp_mode() not in ("never", "deny"):
        pytest.skip("this machine has THP for shared memory")
    done = bench(*SMALL, "--backing", "thp")
    assert done.returncode == 1
    assert "shmem_enabled" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_huge_pages_and_names_are_given_back_on_ctrl_c(number: signal.Signals) -> None:
    if os.geteuid() != 0 or not os.access(huge.NR_HUGEPAGES, os.W_OK):
        pytest.skip("only root may reserve huge pages")
    # More than are free now, so that some must be reserved; others may take or give back pages meanwhile.
    free = bk.huge_pages().free
    ram = bk.round_up((free // 2 + 24) * bk.HUGE, 1 << 20)
    if 4 * ram > bk.memory_available():
        pytest.skip("too little memory to reserve more huge pages than are free")
    before = bk.huge_pages().total
    command = [sys.executable, "-m", "colocache", "bench", "--backing", "hugetlb", "--ram", str(ram), "--full"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while bk.huge_pages().total <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        reserved = bk.huge_pages().total
        time.sleep(0.3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert reserved > before, errors
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in errors
    # Another run on this machine may have changed the number too: ours is what must be gone.
    assert bk.huge_pages().total <= reserved - (reserved - before)
    assert not [region.name for region in list_regions() if re.match(rf"{process.pid}-", region.name)]
