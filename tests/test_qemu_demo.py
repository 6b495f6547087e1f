# SPDX-License-Identifier: Apache-2.0
"""`colocache demo --guest qemu` end to end: two stock QEMUs, a real kill, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import linux_guest
import pytest
from qemu_support import QEMU, needs_qemu
from test_demo import command, demo, report_of

from colocache.vmm.qemu import availability

pytestmark = needs_qemu
KVM = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm")
SMALL = ("--guest", "qemu", "--ram", "24M", "--checkpoints", "3", "--interval", "0.1", "--run-on", "0.2", "--json")


MARK = f"COLOCACHE_TESTED_BY={os.getpid()}"


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children can be told from those of a run beside this one."""
    monkeypatch.setenv(*MARK.split("="))


def qemus() -> list[str]:
    """Processes of this run that run a QEMU of a pair."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, marks = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if QEMU.encode() in words and b"colocache.ram" in words and MARK.encode() in marks.split(b"\0"):
                found.append(entry.name)
    return found


@pytest.mark.parametrize(
    ("accel", "point"),
    [
        pytest.param("kvm", "running", marks=[pytest.mark.kvm, KVM]),
        ("tcg", "receiving"),
        pytest.param("kvm", "sealed", marks=[pytest.mark.kvm, KVM]),
        ("tcg", "random"),
    ],
)
def test_the_secondary_takes_over_and_no_page_is_wrong(accel: str, point: str) -> None:
    before = set(qemus())
    report = report_of(demo(*SMALL, "--accel", accel, "--kill-primary-at", point, timeout=120))
    assert (report["guest"], report["wrong_pages"]) == ("qemu", 0)
    assert report["verified_pages"] >= report["checkpoints"] * (24 << 20) // 4096
    assert report["failover"]["steps_run_on"] > 0
    assert set(qemus()) <= before


@pytest.mark.parametrize("run", range(int(os.environ.get("COLOCACHE_LINUX_RUNS", "1"))))
@pytest.mark.parametrize("point", ["running", "receiving", "sealed", "random"])
def test_linux_is_whole_after_the_takeover(tmp_path: Path, point: str, run: int) -> None:
    """By hand: COLOCACHE_LINUX_RUNS=20."""
    console = tmp_path / "console"
    line = linux_guest.command(tmp_path)
    args = ("--guest", "qemu", "--checkpoints", "6", "--interval", "0.8", "--run-on", "5", "--console", str(console))
    report = report_of(demo(*args, "--kill-primary-at", point, "--json", "--", *line, timeout=300))
    assert report["wrong_pages"] == 0
    said = report["guest_report"]
    assert (said["programs"], said["bad"], said["missing"], said["again"], said["silent"]) == (2, 0, 0, 0, 0)
    assert said["ok_after"] > 0
    told = linux_guest.reports(console.read_bytes())
    assert set(told) == {"one", "two"}, run
    assert [bad for _, bad in told.values()] == [0, 0]


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ("ok 1; sleep 3; echo colocache: it bad page 7 is another", "things wrong in itself, the first: it: page 7"),
        ("ok 1; sleep 9999", "1 of the guest's 1 programs did not report after the takeover"),
    ],
)
def test_a_guest_that_finds_itself_damaged_or_says_no_more_fails_the_demo(
    tmp_path: Path, reports: str, words: str
) -> None:
    init = f"#!/bin/busybox sh\n/bin/busybox echo colocache: it {reports}\n/bin/busybox sleep 9999\n"
    line = linux_guest.command(tmp_path, init=init.replace("; sleep", "; /bin/busybox sleep"))
    ran = demo("--guest", "qemu", "--checkpoints", "8", "--interval", "0.8", "--run-on", "1", "--", *line, timeout=120)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("FAILED: ")
    assert words in ran.stdout.splitlines()[-1]
    assert "0 wrong" in ran.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--backing", "hugetlb"], "a copy of 2 MiB"),
        (["--ram", "8M"], "the small guest takes"),
        (["--", QEMU, "-m", "64", "-daemonize"], "-daemonize can't be used in a pair"),
        (["--", "no-such-qemu"], "there is no program no-such-qemu"),
        (["--initrd", "x"], "need --kernel"),
        (["--kernel", "x", "--", QEMU], "not both"),
    ],
)
def test_what_cannot_work_is_one_sentence(args: list[str], words: str) -> None:
    ran = demo("--guest", "qemu", *args)
    assert ran.returncode != 0
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_command_line_is_for_qemu_only() -> None:
    ran = subprocess.run(
        command("secondary", "--guest", "process", "--listen", "127.0.0.1:0", "--", QEMU),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "for --guest qemu, not for process" in ran.stderr


def test_two_different_machines_are_no_pair(tmp_path: Path) -> None:
    """They are told apart before a page is sent, and the sentence names both."""
    where = f"unix:{tmp_path}/pair"
    common = ("--guest", "qemu", "--connect-limit", "60")
    one = (QEMU, "-m", "32", "-accel", "tcg")
    with subprocess.Popen(
        command("secondary", *common, "--listen", where, "--events", "--", *one, "-smp", "2"), stdout=subprocess.PIPE
    ) as secondary:
        assert secondary.stdout is not None
        while b'"listening"' not in secondary.stdout.readline():
            pass
        primary = subprocess.run(
            command("primary", *common, "--connect", where, "--", *one),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        secondary.terminate()
        secondary.wait(30)
    assert primary.returncode != 0
    assert re.search(r"qemu: \S+ tcg pc-i440fx-\S+ 1 x qemu64", primary.stderr + primary.stdout), primary.stderr
    assert "2 x qemu64" in primary.stderr + primary.stdout


def test_a_qemu_that_can_not_be_driven_comes_with_what_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert availability.trouble() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    found = availability.trouble()
    assert found is not None
    assert "apt install qemu-system-x86" in found[1]
    old = tmp_path / QEMU
    old.write_text("#!/bin/sh\necho QEMU emulator version 6.2.0\n")
    old.chmod(0o755)
    assert availability.trouble() == (f"{QEMU} is of version 6.2.0", "install 7.2 or newer")


@pytest.mark.kvm
@KVM
def test_both_pairs_are_measured_side_by_side() -> None:
    """bench/beside_qemu.py, with the least of everything."""
    script = Path(__file__).resolve().parent.parent / "bench" / "beside_qemu.py"
    if not script.is_file():
        pytest.skip("these tests are not in a source tree")
    least = ["--ram", "64M", "--working-set", "4M", "--checkpoints", "1", "--rounds", "1", "--interval", "0.3"]
    done = subprocess.run(
        [sys.executable, script, *least, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    if "x-colo" in done.stderr and "refused" in done.stderr:
        pytest.skip("this QEMU was built without x-colo")
    assert done.returncode == 0, done.stderr
    own, ours = json.loads(done.stdout)
    assert (own["pair"], ours["pair"]) == ("x-colo", "colocache")
    (own_figures,), (our_figures,) = own["rounds"], ours["rounds"]
    assert own_figures["pvm_stands"][0] > 0
    assert our_figures["pvm_stands"][0] > 0
    assert own_figures["pages_mib"] > 60  # its cache is as large as guest RAM
