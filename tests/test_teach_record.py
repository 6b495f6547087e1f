# SPDX-License-Identifier: Apache-2.0
"""A recording at scale is what the engine saw, and its picture is drawn from it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import colocache
from colocache.teach import heat, machines
from colocache.teach.machines import EpochRecord, HeatRecording, RunOptions, mask, record_run
from colocache.vmm.kvm import kvm_trouble

TROUBLE = kvm_trouble()
needs_kvm = pytest.mark.skipif(TROUBLE is not None, reason=" -- ".join(TROUBLE or ()))
KINDS = [pytest.param("kvm", marks=[pytest.mark.kvm, needs_kvm]), "process"]
SMALL = {"backing": "shm", "ram_bytes": 4 << 20, "working_set_bytes": 2 << 20, "checkpoints": 4, "interval": 0.02}


@pytest.fixture(scope="module", params=KINDS)
def recording(request: pytest.FixtureRequest) -> HeatRecording:
    return record_run(RunOptions(kind=request.param, **SMALL))  # type: ignore[arg-type]


def test_the_recorded_bitmaps_are_those_that_the_engine_flushed(recording: HeatRecording) -> None:
    assert [epoch.epoch for epoch in recording.epochs] == [2, 3, 4, 5]
    for epoch in recording.epochs:
        pvm, svm = mask(epoch.pvm, recording.n_pages), mask(epoch.svm, recording.n_pages)
        assert (pvm & ~svm).sum() == epoch.pvm_pages
        assert (svm & ~pvm).sum() == epoch.svm_pages
        assert (pvm & svm).sum() == epoch.both_pages
        assert (pvm | svm).sum() == epoch.flushed_pages > 0


def test_every_page_was_verified_and_none_was_wrong(recording: HeatRecording) -> None:
    assert [epoch.verified_pages for epoch in recording.epochs] == [recording.n_pages] * 4
    assert recording.wrong_pages == 0
    assert recording.n_pages == (4 << 20) // 4096


def test_both_machines_really_wrote(recording: HeatRecording) -> None:
    assert any(epoch.pvm_pages for epoch in recording.epochs)
    assert any(epoch.svm_pages for epoch in recording.epochs)


def test_nothing_is_left_behind(recording: HeatRecording) -> None:
    assert recording.epochs
    assert [region.name for region in colocache.list_regions() if region.name.startswith(f"{os.getpid()}-")] == []


def made_up(n_pages: int) -> HeatRecording:
    """Two epochs: the PVM writes the first half and then nothing, the SVM all odd pages and then the last one."""
    half, odd = n_pages // 2, tuple((pfn, 1) for pfn in range(1, n_pages, 2))
    counts = {"pvm_pages": 1, "svm_pages": 2, "both_pages": 3, "flushed_pages": 6, "flush_ns": 1}
    done = {"verified_pages": n_pages, "wrong_pages": 0}
    epochs = (
        EpochRecord(2, ((0, half),), odd, **counts, **done),
        EpochRecord(3, (), ((n_pages - 1, 1),), **counts, **done),
    )
    guest: dict[str, str | int | float] = {"kind": "kvm", "ram_bytes": n_pages * 4096, "page_bytes": 4096}
    return HeatRecording(guest, (("ram", n_pages),), epochs)


@pytest.mark.parametrize("n_pages", [8, 255, 256, 257, 1000])
def test_a_row_shows_the_share_of_its_pages_that_are_set(n_pages: int) -> None:
    found = heat.shares(made_up(n_pages))
    rows = min(n_pages, heat.ROWS_MAX)
    assert all(share.shape == (rows, 2) for share in found.values())
    sizes = np.diff([*(np.arange(rows) * n_pages // rows), n_pages])
    total = {name: (share * sizes[:, None]).sum(axis=0).round(6).tolist() for name, share in found.items()}
    half, odd = n_pages // 2, n_pages // 2
    union = half + sum(1 for pfn in range(1, n_pages, 2) if pfn >= half)
    assert total == {"PVM bitmap": [half, 0], "SVM bitmap": [odd, 1], "flush set: the union": [union, 1]}
    assert found["PVM bitmap"][0, 0] == 1


def test_the_picture_is_a_png_of_the_size_it_should_have() -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib here: pip install 'colocache[bench]'")
    png = heat.picture(made_up(300))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (1500, 960)


def test_every_field_of_the_export_is_documented(recording: HeatRecording) -> None:
    whole = json.loads(recording.to_json())
    assert (whole["format"], whole["version"]) == (machines.FORMAT, machines.VERSION)
    for name in (*whole, *whole["guest"], *whole["blocks"][0], *whole["epochs"][0]):
        assert name in (machines.__doc__ or ""), name


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "colocache", "record", *args], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **env},
    )  # fmt: skip


def test_the_command_writes_both_files_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib here: pip install 'colocache[bench]'")
    png, export = tmp_path / "heat.png", tmp_path / "heat.json"
    done = run(
        str(png), "--export", str(export), "--guest", "process", "--ram", "4M", "--checkpoints", "3", "--interval",
        "0.02", "--backing", "shm", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong_pages"] == 0
    assert report["verified_pages"] == 3 * 1024
    assert png.read_bytes().startswith(b"\x89PNG")
    epochs = json.loads(export.read_text(encoding="utf-8"))["epochs"]
    assert sum(epoch["flushed_pages"] for epoch in epochs) == report["flushed_pages"]


def test_without_matplotlib_the_command_says_what_to_install_before_it_runs_anything(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    done = run(str(tmp_path / "heat.png"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "install 'colocache[bench]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_anything_to_write_the_command_asks_for_it() -> None:
    done = run()
    assert done.returncode == 2
    assert "--export" in done.stderr
