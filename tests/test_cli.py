# SPDX-License-Identifier: Apache-2.0
"""The small commands of the command line: inspect, recover, clean, doctor."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import colocache
from colocache import Cache, Memory
from colocache.cli import COMMANDS, cli

from support import BLOCKS


def test_every_command_that_is_there_has_help() -> None:
    runner = CliRunner()
    shown = runner.invoke(cli, ["--help"])
    assert shown.exit_code == 0
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        assert name in shown.output
        found = runner.invoke(cli, [name, "--help"])
        assert found.exit_code == 0
        assert "Usage:" in found.output
    assert {"demo", "primary", "secondary", "inspect", "recover", "clean", "doctor"} <= set(COMMANDS)


def test_doctor_tries_each_thing_and_gives_a_command_for_what_is_missing() -> None:
    ran = CliRunner().invoke(cli, ["doctor", "--json"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.output.splitlines()[-1])
    names = {finding["name"] for finding in report["findings"]}
    assert names == {
        "KVM", "huge pages", "hugetlbfs", "POSIX shm", "THP", "bounded memory", "memory", "PAGEMAP_SCAN", "userfaultfd",
        "QEMU", "CPU", "spill folder",
    }  # fmt: skip
    for finding in report["findings"]:
        assert finding["found"]
        assert finding["ok"] or finding["fix"]
    assert report["guest"] in ("kvm", "process")


# Makes userfaultfd fail with an errno of one's choice, as a container's filter does, and becomes the doctor.
FORBIDDEN = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
load, equal, answer = 0x20, 0x15, 0x06  # BPF: load the word at k; jump if equal to k; return k
fail, allow = 0x00050000 | int(sys.argv[1]), 0x7FFF0000
program = [(load, 0, 0, 0), (equal, 0, 1, number), (answer, 0, 0, fail), (answer, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, filter, 0, 0):  # no new privileges; seccomp
    sys.exit(77)
os.execv(sys.executable, [sys.executable, "-m", "colocache", "doctor", "--json"])
"""


@pytest.mark.parametrize(
    ("number", "found"),
    [(errno.EPERM, "permission is missing"), (errno.EINVAL, "is too old"), (errno.ENOSYS, "has none, or a seccomp")],
)
def test_doctor_tells_missing_permission_from_an_old_kernel(number: int, found: str) -> None:
    command = [sys.executable, "-c", FORBIDDEN, str(number)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode == 77:
        pytest.skip("this kernel has no seccomp filters")
    assert ran.returncode == 0, ran.stderr
    findings = {one["name"]: one for one in json.loads(ran.stdout.splitlines()[-1])["findings"]}
    assert not findings["userfaultfd"]["ok"]
    assert found in findings["userfaultfd"]["found"]
    log = findings["PAGEMAP_SCAN"]
    assert not log["ok"]
    assert ("allow userfaultfd" in log["fix"]) == (number == errno.EPERM)


def test_doctor_notices_a_dirty_log_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from colocache import UnsupportedError, doctor

    def broken(_ranges: object) -> None:
        raise UnsupportedError("this kernel has no PAGEMAP_SCAN", hint="run a newer one")

    monkeypatch.setattr(doctor, "UffdDirtyLog", broken)
    finding = doctor.dirty_log()
    assert (finding.ok, finding.found, finding.fix) == (
        False,
        "this kernel has no PAGEMAP_SCAN (run a newer one)",
        "run a newer one",
    )


def test_clean_leaves_what_is_owned_and_removes_what_is_not(memory: Memory) -> None:
    runner = CliRunner()
    with Cache.create(memory, threads=1):
        ran = runner.invoke(cli, ["clean", memory.name, "--json"])
        assert ran.exit_code == 1
        assert json.loads(ran.output.splitlines()[-1])["busy"][0]["name"] == memory.name
        assert str(os.getpid()) in ran.output
    memory.close()
    ran = runner.invoke(cli, ["clean", memory.name, "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output.splitlines()[-1])["removed"][0]["name"] == memory.name
    assert memory.name not in [region.name for region in colocache.list_regions()]


def test_inspect_shows_every_block_and_does_not_disturb_the_owner(memory: Memory) -> None:
    with Cache.create(memory, threads=1) as cache:
        cache.receive_zero(1, 1, 0, 5)
        ran = CliRunner().invoke(cli, ["inspect", memory.name, "--json"])
        report = json.loads(ran.output.splitlines()[-1])
        assert f"(process {os.getpid()}) is dead: colocache secondary --attach --name {memory.name} " in ran.output
        assert [block["name"] for block in report["blocks"]] == [block.name for block in BLOCKS]
        assert report["blocks"][1]["pvm_pages"] == 5
        assert report["receiving_epoch"] == 1
        listed = CliRunner().invoke(cli, ["inspect", "--json"])
        assert memory.name in [one["name"] for one in json.loads(listed.output.splitlines()[-1])["regions"]]


@pytest.mark.parametrize("command", ["inspect", "recover", "clean"])
def test_a_region_that_is_not_there_is_one_sentence(command: str) -> None:
    ran = CliRunner().invoke(cli, [command, "nix"])
    assert ran.exit_code == 1
    assert ran.output.startswith("Error: there is no")


def test_recover_refuses_what_somebody_owns(memory: Memory) -> None:
    with Cache.create(memory, threads=1):
        ran = CliRunner().invoke(cli, ["recover", memory.name])
    assert ran.exit_code == 1
    assert "Error: " in ran.output
