# SPDX-License-Identifier: Apache-2.0
"""The small QEMU guest: its history in its own memory says what every page must hold, wherever it was stopped."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from qemu_support import SMALL_RAM, every_accel, image_file, needs_qemu, wait_until

from colocache.errors import ArgumentError
from colocache.vmm.qemu.guest_image import (
    CONSTANT_PAGES,
    LOAD,
    MAILBOX_PAGE,
    RAM_MAX,
    RAM_MIN,
    WORK_ADDR,
    guest_image,
)
from colocache.vmm.qemu.guest_oracle import check, step_of
from colocache.vmm.qemu.guests import guest_of
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.workload import GuestOptions

pytestmark = needs_qemu


@every_accel
@pytest.mark.parametrize("rate", [0.0, 4000.0], ids=["flat-out", "rate"])
def test_every_page_is_as_its_history_says_wherever_the_guest_is_stopped(accel: str, rate: float) -> None:
    options = GuestOptions(steps_per_second=rate, working_set_bytes=2 << 20, accel=accel)
    guest = guest_of(options, SMALL_RAM)
    assert guest.image is not None
    with image_file(SMALL_RAM) as fd:
        memory = np.frombuffer(mmap.mmap(fd, SMALL_RAM), dtype=np.uint64).reshape(-1, 512)
        process = QemuProcess(guest.line, fd, shared=True)
        try:
            for _ in range(12):
                goal = step_of(memory) + 40
                process.cont()
                wait_until(lambda goal=goal: step_of(memory) >= goal)  # type: ignore[misc]
                process.stop()
                found = check(memory, guest.image)
                assert found.wrong == ()
            copy = memory.copy()
        finally:
            process.kill()
            guest.close()
    # and each page of what it looks at is really looked at
    box = copy[LOAD // 4096 + MAILBOX_PAGE]
    first, n_pages = int(box[4]), int(box[5])
    written = [page for page in range(first, first + n_pages) if copy[page].any()]
    for page in (*written[:: max(1, len(written) // 60)], *(LOAD // 4096 + page for page in CONSTANT_PAGES)):
        for word in (0, 511):
            copy[page, word] ^= np.uint64(1)
            assert page in check(copy, guest.image).wrong
            copy[page, word] ^= np.uint64(1)


@every_accel
def test_a_guest_that_its_firmware_still_loads_has_no_wrong_page(accel: str) -> None:
    """Wherever it is stopped on its way from its first instruction to its first step."""
    guest = guest_of(GuestOptions(working_set_bytes=2 << 20, accel=accel), SMALL_RAM)
    assert guest.image is not None
    with image_file(SMALL_RAM) as fd:
        memory = np.frombuffer(mmap.mmap(fd, SMALL_RAM), dtype=np.uint64).reshape(-1, 512)
        process = QemuProcess(guest.line, fd, shared=True)
        try:
            found = check(memory, guest.image)
            assert found.wrong == ()
            assert found.n_pages > 0
            damaged = memory.copy()
            damaged[WORK_ADDR // 4096 + 1, 511] = 1
            assert check(damaged, guest.image).wrong == (WORK_ADDR // 4096 + 1,)
            while not step_of(memory):
                process.cont()
                process.stop()
                assert check(memory, guest.image).wrong == ()
        finally:
            process.kill()
            guest.close()


@every_accel
def test_it_tells_each_line_that_is_typed_once_with_its_number(accel: str) -> None:
    guest = guest_of(GuestOptions(working_set_bytes=2 << 20, accel=accel), SMALL_RAM)
    said: list[bytes] = []
    with image_file(SMALL_RAM) as fd:
        process = QemuProcess(guest.line, fd, shared=True, on_output=said.append)
        try:
            process.cont()
            wait_until(lambda: b"#0 " in b"".join(said))
            typed = b"one\ntwo\r\n\n" + b"x" * 300 + b"\nthe end\n"
            while typed:
                typed = typed[process.console.write(typed) :]
            wait_until(lambda: b"the end\r\n" in b"".join(said))
        finally:
            process.kill()
            guest.close()
    told = [line for line in b"".join(said).split(b"\r\n") if line.startswith(b">")]
    assert told == [b">0 one", b">1 two", b">2 " + b"x" * 32, b">3 the end"]


@pytest.mark.parametrize("ram_bytes", [0, RAM_MIN - 4096, RAM_MAX + 4096, RAM_MIN + 1])
def test_memory_that_the_guest_can_not_have_is_refused(ram_bytes: int) -> None:
    with pytest.raises(ArgumentError, match="the small guest takes"):
        guest_image(ram_bytes, GuestOptions(), kvm=False)


def test_the_same_guest_on_both_hosts_has_the_same_name_whatever_it_is_asked_to_do() -> None:
    names = {guest_image(RAM_MIN, GuestOptions(steps_per_second=rate), kvm=False).name for rate in (0.0, 5.0, 9999.0)}
    assert len(names) == 1
