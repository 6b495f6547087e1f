# SPDX-License-Identifier: Apache-2.0
"""A real operating system under TCG: a Linux that checks itself goes on, whole, when its primary is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import linux_guest
import pytest
from qemu_support import Pair, needs_qemu, wait_until

from colocache.vmm.workload import GuestOptions

pytestmark = needs_qemu


class Console:
    """What a machine says."""

    def __init__(self) -> None:
        self.said = b""

    def __call__(self, data: bytes) -> None:
        self.said += data

    def wait_for(self, text: bytes) -> None:
        wait_until(lambda: text in self.said, 90)

    def wait_for_links(self, more: int) -> None:
        """Until both workers have told of that many more links."""
        before = linux_guest.reports(self.said)
        goals = {name: before.get(name, (0, 0))[0] + more for name in ("one", "two")}
        wait_until(lambda: all(linux_guest.reports(self.said).get(n, (0, 0))[0] >= g for n, g in goals.items()), 90)

    def wrong(self) -> int:
        return sum(bad for _, bad in linux_guest.reports(self.said).values())


@pytest.fixture
def booted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Pair, Console, Console]]:
    """A pair whose Linux is up, and the consoles of both machines. Its parameter: more words of the command line."""
    command = (*linux_guest.command(tmp_path), *getattr(request, "param", ()))
    pair = Pair(GuestOptions(command=command), 96 << 20)
    consoles = Console(), Console()
    try:
        pair.primary.on_output, pair.secondary.on_output = consoles
        pair.primary.boot()
        pair.primary.resume()
        consoles[0].wait_for(b"READY")
        consoles[0].wait_for_links(5)
        yield pair, *consoles
    finally:
        pair.close()


def test_linux_goes_on_whole_when_its_primary_is_killed(booted: tuple[Pair, Console, Console]) -> None:
    pair, primary, secondary = booted
    for _ in range(6):
        assert pair.checkpoint().wrong_pages == ()
        primary.wait_for_links(5)
    links = linux_guest.reports(secondary.said)
    pair.primary.close()
    secondary.wait_for_links(20)
    assert secondary.wrong() == primary.wrong() == 0
    after = linux_guest.reports(secondary.said)
    assert all(after[name][0] > links.get(name, (0, 0))[0] for name in after)
    assert pair.secondary.failure is None


def test_linux_reboots_while_paired_and_after_the_takeover(booted: tuple[Pair, Console, Console]) -> None:
    pair, primary, secondary = booted
    pair.checkpoint()
    primary.said = b""
    pair.primary._alive().console.write(b"reboot\n")
    primary.wait_for(b"READY")
    assert pair.checkpoint().wrong_pages == ()
    primary.wait_for_links(5)
    pair.primary.close()
    secondary.said = b""
    pair.secondary._alive().console.write(b"reboot\n")
    secondary.wait_for(b"READY")
    secondary.wait_for_links(5)
    assert secondary.wrong() == 0


def test_linux_that_powers_off_is_told(booted: tuple[Pair, Console, Console]) -> None:
    pair, _, _ = booted
    pair.primary._alive().console.write(b"poweroff\n")
    wait_until(lambda: pair.primary.powered_off)
    assert pair.primary.failure is None


def test_what_the_secondarys_own_branch_does_never_harms_the_pair(booted: tuple[Pair, Console, Console]) -> None:
    pair, primary, secondary = booted
    for word in (b"poweroff\n", b"reboot\n", b"panic\n"):
        assert pair.checkpoint().wrong_pages == ()
        epoch = pair.secondary_image.view.copy()
        secondary.said = b""
        pair.secondary._alive().console.write(word)
        primary.wait_for_links(5)
        assert (pair.secondary_image.view == epoch).all()
    assert pair.checkpoint().wrong_pages == ()
    secondary.wait_for_links(5)
    assert secondary.wrong() == primary.wrong() == 0


@pytest.mark.parametrize("booted", [("-device", "virtio-balloon-pci,free-page-reporting=on")], indirect=True)
def test_a_balloon_in_the_secondary_takes_nothing_from_the_image(booted: tuple[Pair, Console, Console]) -> None:
    """QEMU gives ballooned memory back by holes in the file, private mapping or not: the preload refuses them."""
    pair, primary, secondary = booted
    if b"virtio_balloon\r" not in primary.said:
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_balloon.ko")
    assert pair.checkpoint().wrong_pages == ()
    epoch = pair.secondary_image.view.copy()
    qmp = pair.secondary._alive().qmp
    before = qmp.execute("query-balloon")["actual"]
    qmp.execute("balloon", value=before // 2)
    wait_until(lambda: qmp.execute("query-balloon")["actual"] < before - (8 << 20), 90)
    assert (pair.secondary_image.view == epoch).all()
    assert pair.checkpoint().wrong_pages == ()
    secondary.wait_for_links(5)
    assert secondary.wrong() == 0
