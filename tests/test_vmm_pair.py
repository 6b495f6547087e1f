# SPDX-License-Identifier: Apache-2.0
"""A primary and a secondary in one process, 200 checkpoints: after every flush every page is the primary's.

Both guests run on between two checkpoints, each under a salt of its own, and every load writes a page that the other
side does not have. So whatever is lost on the way, on either side, leaves a page that is wrong.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from colocache import Cache, Memory, MemoryShortError, RamImage, Sender, UnsupportedError, VetoError, message_header
from colocache.vmm import DeviceStateError, GuestOptions, LoadReport, Machine, Ram, blocks_for, make_machine
from colocache.vmm.base import ReferenceMachine
from colocache.vmm.kvm import kvm_trouble

RAM_BYTES = 4 << 20
END = 0x7E57  # a message type that ends the pages of an epoch
TROUBLE = kvm_trouble()
needs_kvm = pytest.mark.skipif(TROUBLE is not None, reason=" -- ".join(TROUBLE or ()))
every_guest = pytest.mark.parametrize(
    ("kind", "backing"),
    [
        pytest.param("kvm", "shm", marks=[pytest.mark.kvm, needs_kvm], id="kvm-shm"),
        pytest.param("kvm", "hugetlb", marks=[pytest.mark.kvm, pytest.mark.hugepages, needs_kvm], id="kvm-hugetlb"),
        pytest.param("process", "shm", id="process-shm"),
        pytest.param("process", "hugetlb", marks=pytest.mark.hugepages, id="process-hugetlb"),
    ],
)


class Pair:
    """Both sides, and what a checkpoint is, without any of colocache.replication."""

    def __init__(self, stack: ExitStack, kind: str, backing: str) -> None:
        specs = blocks_for(RAM_BYTES)
        options = GuestOptions(steps_per_second=0, run_pages=24, run_share=0.1, working_set_bytes=RAM_BYTES)
        self.sender = stack.enter_context(Sender())
        images = [stack.enter_context(RamImage.create(spec, backing)) for spec in specs]
        rams = [
            Ram(one.spec.name, self.sender.add_block(one.spec.name, one.addr, one.spec.len_bytes), 4096,
                one.spec.n_pages, one.addr)
            for one in images
        ]  # fmt: skip
        self.pvm = make_machine(kind, rams, options, self.sender.mark_dirty)
        stack.callback(self.pvm.close)
        memory = stack.enter_context(Memory.create(blocks=specs, backing=backing))
        self.cache = stack.enter_context(Cache.create(memory))
        rams = [Ram(one.name, one.index, 4096, one.n_pages, one.guest_addr) for one in self.cache.blocks.values()]
        self.svm = make_machine(kind, rams, GuestOptions(steps_per_second=0), self.mark)
        stack.callback(self.svm.close)
        self.forget_marks = False
        self.ours, self.theirs = (stack.enter_context(one) for one in socket.socketpair())
        self.epoch = 0

    def mark(self, block: int, first_pfn: int, n_pages: int) -> None:
        if not self.forget_marks:
            self.cache.mark_dirty(block, first_pfn, n_pages)

    def send(self) -> int:
        """All pending pages into the cache; how many."""
        sent: list[int] = []

        def primary() -> None:
            sent.append(self.sender.send(self.ours, epoch=self.epoch, timeout=30).n_pages)
            self.ours.sendall(message_header(END, self.epoch, 0))

        thread = threading.Thread(target=primary)
        thread.start()
        _, taken = self.cache.receive_stream(self.theirs, timeout=30, epoch=self.epoch)
        thread.join()
        assert sent == [taken]
        return taken

    def checkpoint(self, spoil: Callable[[bytes], bytes] = bytes) -> LoadReport:
        """One epoch, both machines standing at the end of it."""
        self.epoch += 1
        if self.epoch == 1:
            self.pvm.discard_dirty_log()
            self.sender.mark_all()
        else:
            self.pvm.sync_dirty_log(self.sender)
        n_pages = self.send()  # in the background: both may run
        self.svm.pause()
        self.pvm.pause()
        self.pvm.sync_dirty_log(self.sender)
        n_pages += self.send()
        state = spoil(self.pvm.save_device_state(with_hashes=True))
        self.cache.device_state_buffer(self.epoch, len(state))[:] = state
        if self.epoch == 1:
            self.svm.discard_dirty_log()
        else:
            self.svm.sync_dirty_log(self.cache)
        self.cache.seal(self.epoch, n_pages=n_pages, check=self.svm.check_device_state)
        self.sender.received()
        self.cache.flush()
        report = self.svm.load_device_state(self.cache.device_state())
        self.cache.loaded()
        return report

    def run(self, steps: int = 40) -> None:
        for machine in (self.svm, self.pvm):
            machine.resume()
        for machine in (self.svm, self.pvm):
            wait_for(machine, machine.steps + steps)

    def run_exactly(self, steps: int) -> None:
        """Few enough steps of each to leave most pages alone, however slow this machine is."""
        for machine in (self.svm, self.pvm):
            assert isinstance(machine, ReferenceMachine)
            box = machine._mailbox.box
            salt = secrets.randbits(64)
            machine._history.append(machine.steps, salt)
            box.salt, box.limit, box.stop = salt, machine.steps + steps, 0
            machine._enter()


def wait_for(machine: Machine, steps: int) -> None:
    deadline = time.monotonic() + 30
    while machine.steps < steps:
        assert machine.failure is None
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture
def pair(kind: str, backing: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        try:
            made = Pair(stack, kind, backing)
        except (MemoryShortError, UnsupportedError) as error:
            pytest.skip(str(error))
        made.pvm.boot()
        made.pvm.resume()
        yield made
        made.cache.validate()


@every_guest
def test_every_page_is_the_primarys_after_each_of_200_checkpoints(pair: Pair) -> None:
    for _ in range(200):
        report = pair.checkpoint()
        assert report.epoch_hashes_checked == RAM_BYTES // 4096
        assert report.wrong_pages == ()
        pair.run()
    # the primary is gone: the secondary goes on from its live state, and every page of it is accounted for
    pair.svm.pause()
    assert pair.svm.verify().wrong == ()
    pair.svm.resume()
    wait_for(pair.svm, pair.svm.steps + 500)
    pair.svm.pause()
    assert pair.svm.verify().wrong == ()


@every_guest
def test_a_secondary_whose_log_is_thrown_away_is_found_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check has teeth: without the secondary's dirty log the pages it alone wrote stay wrong."""
    pair.checkpoint()
    pair.run_exactly(100)
    monkeypatch.setattr(pair.svm, "sync_dirty_log", lambda _: pair.svm.discard_dirty_log())
    assert pair.checkpoint().wrong_pages != ()


@every_guest
def test_a_load_that_does_not_mark_what_it_wrote_is_found_out(pair: Pair) -> None:
    pair.checkpoint()
    pair.forget_marks = True
    pair.run()
    assert pair.checkpoint().wrong_pages == ()  # the load of the first epoch was still marked
    pair.run()
    last = pair.cache.blocks["boot"].n_pages - 1
    # A process guest's load is also in the kernel's log, which is thrown away at its end.
    assert pair.checkpoint().wrong_pages == (("boot", last),)


@every_guest
def test_a_state_that_does_not_parse_aborts_the_epoch_and_the_next_one_is_whole(pair: Pair) -> None:
    pair.checkpoint()
    pair.run()
    with pytest.raises(VetoError) as veto:
        pair.checkpoint(lambda state: state[:-3] + b"bad")
    assert isinstance(veto.value.__cause__, DeviceStateError)
    assert pair.svm.verify().wrong == ()  # its own memory, untouched
    pair.sender.resend()
    pair.run()
    assert pair.checkpoint().wrong_pages == ()


@every_guest
def test_the_secondary_writes_pages_that_the_primary_does_not(pair: Pair) -> None:
    """They really drift apart, or the checks above would mean little."""
    pair.checkpoint()
    pair.run_exactly(100)
    pair.svm.sync_dirty_log(pair.cache)
    svm = set(np.flatnonzero(np.unpackbits(pair.cache.blocks["pc.ram"].svm_bitmap.view(np.uint8), bitorder="little")))
    pair.pvm.sync_dirty_log(pair.sender)
    pair.epoch += 1
    pair.send()
    pvm = set(np.flatnonzero(np.unpackbits(pair.cache.blocks["pc.ram"].pvm_bitmap.view(np.uint8), bitorder="little")))
    assert svm - pvm
    assert pvm - svm
