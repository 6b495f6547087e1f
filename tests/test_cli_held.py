# SPDX-License-Identifier: Apache-2.0
"""A device state that passed its check and does not load after the flush, with real processes: the primary is told, and
the memory stays for a fresh machine, on memory without a name too."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from c_tools import run, tool
from cli_sides import Process, Sides, wrong_pages
from vmm_support import needs_kvm

import colocache
from colocache import backing as bk
from colocache.children import python_command

from support import files_of

HUGE_PAGES = 24  # two images of 16 MiB, and what they are rounded up by

# A device of the process guest, which has none: it loads slowly, or not at all, as long as a file is there.
DEVICE = """
import pathlib, time
from colocache.vmm import process
from colocache.vmm.errors import MachineError
here = pathlib.Path({folder!r})

def load(self, registers):
    if (here / "slow").exists():
        (here / "loading").touch()
    while (here / "slow").exists():
        time.sleep(0.01)
    if (here / "broken").exists():
        raise MachineError("the device is broken")

process.ProcessMachine._load_registers = load
"""

# A kernel that takes no registers of a vCPU as long as a file is there.
KERNEL = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == KVM_SET_SREGS && access(BROKEN, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
"""


class Device:
    """What the secondary's machine can't load while `broken` is there."""

    def __init__(self, folder: Path) -> None:
        self.broken, self.slow, self.loading = (folder / name for name in ("broken", "slow", "loading"))

    def until_loading(self) -> None:
        deadline = time.monotonic() + 30
        while not self.loading.exists():
            assert time.monotonic() < deadline, "nothing was loaded"
            time.sleep(0.01)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """In every process guest that this test starts."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(DEVICE.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return Device(tmp_path)


def vcpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The registers of every KVM guest that this test starts."""
    made = Device(folder)
    (folder / "kernel.c").write_text(KERNEL)
    where = f'-DBROKEN="{made.broken}"'
    compiler = tool("cc", "gcc", "clang")
    run([compiler, "-O1", "-fPIC", "-shared", where, folder / "kernel.c", "-o", folder / "kernel.so"])
    monkeypatch.setenv("LD_PRELOAD", str(folder / "kernel.so"))
    return made


@pytest.fixture
def nameless() -> str:
    """A backing whose memory goes with the last process that holds it."""
    if bk.thp_mode() not in ("never", "deny"):
        return "thp"
    why = "no memory without a name: THP is off for shared memory"
    if bk.writable_hugetlbfs() is not None:
        pytest.skip(f"{why}, and hugetlbfs is mounted")
    if bk.huge_pages().free < HUGE_PAGES:
        pytest.skip(f"{why}, and {bk.huge_pages().free} of {HUGE_PAGES} huge pages are free")
    return "hugetlb"


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


def children(process: Process) -> list[str]:
    pid = process.process.pid
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def held(sides: Sides, device: Device, backing: str, *args: str) -> tuple[Process, Process]:
    """Secondary and primary after a load that failed: the one waits for its operator, the other runs on alone."""
    secondary = sides.secondary("--backing", backing, "--reconnect-limit", "0.1", "--run-on", "0.5", *args)
    assert secondary.until("start")["persistent"] is False
    primary = sides.primary("--run-on", "0", *args)
    secondary.until("checkpoint", 2)
    device.broken.touch()
    said = secondary.until("held")
    assert (said["pid"], said["region"]) == (secondary.process.pid, sides.name)
    assert f"kill -USR2 {said['pid']}" in said["sentence"]
    assert f"the device state of epoch {said['epoch']} did not load" in secondary.until("error")["sentence"]
    status = colocache.inspect(sides.name).status
    assert status.sealed_epoch == status.committed_epoch == said["epoch"] >= 3
    assert "the secondary is lost: the device state of epoch" in primary.until("alone")["cause"]
    return secondary, primary


def say_dead(secondary: Process, primary: Process) -> None:
    """The operator stops the primary, and says so."""
    primary.process.kill()
    secondary.process.send_signal(signal.SIGUSR2)


def took_over(sides: Sides, secondary: Process) -> None:
    """From the epoch whose load had failed, with every page right."""
    found = secondary.until("takeover")
    assert (found["epoch"], found["cause"]) == (secondary.until("held")["epoch"], "the operator asked for it")
    assert found["verified_pages"] == (16 << 20) // 4096
    assert secondary.end()[0] == 0
    assert secondary.events[-1]["took_over"] is True
    assert wrong_pages(secondary) == 0
    assert files_of(sides.name) == []


@pytest.mark.parametrize("guest", ["process", pytest.param("kvm", marks=[pytest.mark.kvm, needs_kvm])])
def test_memory_without_a_name_is_held_until_the_operators_word_starts_a_fresh_machine(
    sides: Sides, nameless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device, guest: str
) -> None:
    """And a load that fails again, or a machine that can't even be made, does not use the epoch up."""
    device = vcpu(tmp_path, monkeypatch) if guest == "kvm" else device
    secondary, primary = held(sides, device, nameless, "--guest", guest)
    time.sleep(0.5)  # five times the reconnect limit: nothing starts by itself beside a primary that runs on
    assert children(secondary) == []
    assert primary.process.poll() is None
    secondary.process.send_signal(signal.SIGUSR1)  # a checkpoint of nothing
    say_dead(secondary, primary)
    assert secondary.until("held", 2)["epoch"] == secondary.until("held")["epoch"]
    assert children(secondary) == []
    device.broken.unlink()
    secondary.process.send_signal(signal.SIGUSR2)
    took_over(sides, secondary)
    assert not [event for event in secondary.events if event["event"] in ("arbiter", "refused")]


def test_the_operators_word_stands_when_the_fresh_machine_is_killed_while_it_loads(
    sides: Sides, nameless: str, device: Device
) -> None:
    secondary, primary = held(sides, device, nameless)
    device.slow.touch()
    device.broken.unlink()
    say_dead(secondary, primary)
    device.until_loading()
    os.kill(secondary.child(), signal.SIGKILL)
    secondary.until("restarted")
    device.slow.unlink()
    took_over(sides, secondary)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_held_memory_is_given_up_at_a_signal_and_nothing_is_left(
    sides: Sides, nameless: str, device: Device, signum: signal.Signals
) -> None:
    secondary, _ = held(sides, device, nameless)
    assert files_of(sides.name) != []
    secondary.process.send_signal(signum)
    status, errors = secondary.end()
    assert status == -signum
    assert "Traceback" not in errors
    assert files_of(sides.name) == []


def test_memory_with_a_name_stays_for_attach_and_its_command_ends_with_status_4(sides: Sides, device: Device) -> None:
    secondary = sides.secondary()
    primary = sides.primary("--run-on", "0")
    secondary.until("checkpoint", 2)
    device.broken.touch()
    assert secondary.end()[0] == 4
    assert f"--attach --name {sides.name}" in secondary.until("kept")["sentence"]
    assert "the secondary is lost: the device state of epoch" in primary.until("alone")["cause"]
    primary.process.kill()
    device.broken.unlink()
    epoch = colocache.inspect(sides.name).status.sealed_epoch
    again = sides.secondary("--attach", "--reconnect-limit", "0.1", "--run-on", "0.2")
    assert again.until("takeover")["epoch"] == epoch >= 3
    assert again.end()[0] == 0
    assert wrong_pages(again) == 0
    assert files_of(sides.name) == []


def test_a_machine_killed_while_its_device_state_loads_is_restarted_and_the_pair_goes_on(
    sides: Sides, nameless: str, device: Device
) -> None:
    secondary = sides.secondary("--backing", nameless, "--reconnect-limit", "20")
    primary = sides.primary("--reconnect-limit", "20")
    secondary.until("checkpoint", 2)
    device.slow.touch()
    device.until_loading()
    os.kill(secondary.child(), signal.SIGKILL)
    device.slow.unlink()
    found = secondary.until("attached")
    assert (found["action"], found["epoch"]) == ("RESTART", 3)
    assert secondary.until("resumed")["wrong_pages"] == 0
    secondary.until("checkpoint", 5)
    primary.process.send_signal(signal.SIGTERM)
    assert primary.end()[0] == -signal.SIGTERM
    assert secondary.end()[0] == 0
    assert wrong_pages(primary, secondary) == 0
    assert [event["fresh"] for event in primary.events if event["event"] == "connected"] == [True, False]


def test_a_demo_whose_secondary_is_lost_ends_with_that_sentence(nameless: str, device: Device) -> None:
    device.broken.touch()
    command = ("demo", "--ram", "16M", "--guest", "process", "--backing", nameless, "--checkpoints", "3")
    ended = subprocess.run(
        python_command("colocache.cli", "main", *command), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "the secondary's machine is lost: no machine runs" in ended.stderr
