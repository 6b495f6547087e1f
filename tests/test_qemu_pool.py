# SPDX-License-Identifier: Apache-2.0
"""QEMUs that wait: whatever dies among them costs itself, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from qemu_support import guest, image_file, needs_qemu

from colocache.vmm.qemu.errors import QemuDiedError, QemuError, QemuSlowError
from colocache.vmm.qemu.memory_access import write
from colocache.vmm.qemu.pool import START_TRIES, Pool
from colocache.vmm.qemu.process import QemuProcess

pytestmark = needs_qemu


@pytest.fixture
def start() -> Iterator[Callable[[], QemuProcess]]:
    with ExitStack() as stack:
        image = stack.enter_context(image_file())

        def start_one() -> QemuProcess:
            made = QemuProcess(guest(), image, shared=False, incoming=True)
            stack.callback(made.kill)
            return made

        yield start_one


def test_a_process_that_dies_while_it_is_looked_at_has_died(start: Callable[[], QemuProcess]) -> None:
    """A dying process has no memory left some time before it is seen to be dead."""
    process = start()
    assert process.private_bytes() == 0
    process.begin_death()
    with pytest.raises(QemuDiedError):
        while True:
            process.private_bytes()


def test_starts_that_fail_are_tried_again(start: Callable[[], QemuProcess]) -> None:
    n_tries = 0

    def make() -> QemuProcess:
        nonlocal n_tries
        n_tries += 1
        if n_tries < START_TRIES:
            raise QemuDiedError("killed while it started")
        return start()

    with closing(Pool(make)) as pool:
        assert pool.take().status() == "inmigrate"
    assert n_tries == START_TRIES


def test_a_qemu_that_never_starts_is_an_error() -> None:
    n_tries = 0

    def make() -> QemuProcess:
        nonlocal n_tries
        n_tries += 1
        raise QemuError("there is no such machine")

    with closing(Pool(make)) as pool, pytest.raises(QemuError, match="did not start: there is no such machine"):
        pool.take()
    assert n_tries == START_TRIES


def test_one_that_was_killed_while_it_waited_is_not_handed_out(start: Callable[[], QemuProcess]) -> None:
    made: list[QemuProcess] = []

    def make() -> QemuProcess:
        made.append(start())
        return made[-1]

    with closing(Pool(make)) as pool:
        pool.wait_ready()
        made[0].begin_death()
        made[0].see_dead()
        assert pool.take() is made[1]


def test_processes_that_have_written_their_memory_are_no_use_however_many(start: Callable[[], QemuProcess]) -> None:
    def make() -> QemuProcess:
        made = start()
        write(made.pid, made.address(), b"early")  # its copy would hide the image's page
        return made

    with closing(Pool(make)) as pool, pytest.raises(QemuSlowError, match="none of its memory"):
        pool.take(timeout=1.0)
