# SPDX-License-Identifier: Apache-2.0
"""A recording at scale: the reference machines, both in this process, over some checkpoints on the real engine.

Before each seal the two bitmaps are read; after each flush every page of the secondary is compared with a hash that the
primary made of it. The format of `colocache record --export` is one JSON object:

    format          "colocache-heat"
    version         1
    guest           {kind, backing, ram_bytes, page_bytes, working_set_bytes, steps_per_second, interval_seconds}
    blocks          a list of {name, n_pages}; pages are numbered through all blocks, in this order
    epochs          a list, in order, from epoch 2 (epoch 1 is the initial copy: all of RAM); each
      epoch
      pvm, svm      lists of [first page, number of pages]: the PVM bitmap and the SVM bitmap as they were at the seal
      pvm_pages, svm_pages, both_pages, flushed_pages      counts by the engine: PVM only, SVM only, both, their sum
      flush_ns      time of the copy
      verified_pages, wrong_pages      after the flush
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from colocache import Cache, Memory, RamImage, Sender, bitmap, message_header
from colocache.errors import ColocacheError
from colocache.teach.primary import MESSAGE
from colocache.vmm import GuestOptions, Machine, MachineError, Ram, blocks_for, make_machine

FORMAT, VERSION = "colocache-heat", 1
PAGE_BYTES = 4096
WAIT_SECONDS = 30.0

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RunOptions:
    """What to record. `interval`: seconds that both machines run between two checkpoints."""

    kind: str = "auto"
    backing: str = "auto"
    ram_bytes: int = 64 << 20
    working_set_bytes: int = 0
    steps_per_second: float = 20_000.0
    checkpoints: int = 30
    interval: float = 0.1


@dataclass(frozen=True)
class EpochRecord:
    """One epoch; the fields are those of the module's text."""

    epoch: int
    pvm: Runs
    svm: Runs
    pvm_pages: int
    svm_pages: int
    both_pages: int
    flushed_pages: int
    flush_ns: int
    verified_pages: int
    wrong_pages: int


@dataclass(frozen=True)
class HeatRecording:
    """A run that was recorded."""

    guest: dict[str, str | int | float]
    blocks: tuple[tuple[str, int], ...]
    epochs: tuple[EpochRecord, ...]

    @property
    def n_pages(self) -> int:
        return sum(n_pages for _, n_pages in self.blocks)

    @property
    def wrong_pages(self) -> int:
        return sum(epoch.wrong_pages for epoch in self.epochs)

    def to_json(self) -> str:
        """The file's text."""
        blocks = [{"name": name, "n_pages": n_pages} for name, n_pages in self.blocks]
        epochs = [asdict(epoch) for epoch in self.epochs]
        whole = {"format": FORMAT, "version": VERSION, "guest": self.guest, "blocks": blocks, "epochs": epochs}
        return json.dumps(whole, separators=(",", ":"))


def record_run(options: RunOptions, progress: Callable[[int], object] = lambda _: None) -> HeatRecording:
    """Run a pair for so many checkpoints; `progress` is told the number of each. MachineError, MemoryShortError."""
    with ExitStack() as stack:
        pair = _MachinePair(options, stack)
        epochs = []
        for number in range(1, options.checkpoints + 2):
            found = pair.checkpoint(number)
            if number > 1:
                epochs.append(found)
                progress(number - 1)
            if number <= options.checkpoints:
                pair.run(options.interval)
        guest: dict[str, str | int | float] = {
            "kind": pair.pvm.kind, "backing": pair.memory.backing, "ram_bytes": options.ram_bytes,
            "page_bytes": PAGE_BYTES, "working_set_bytes": options.working_set_bytes,
            "steps_per_second": options.steps_per_second, "interval_seconds": options.interval,
        }  # fmt: skip
        blocks = tuple((block.name, block.n_pages) for block in pair.cache.blocks.values())
        return HeatRecording(guest, blocks, tuple(epochs))


class _MachinePair:
    """Both reference machines, and one checkpoint after the other without a process in between."""

    def __init__(self, options: RunOptions, stack: ExitStack) -> None:
        specs = blocks_for(options.ram_bytes)
        work = GuestOptions(working_set_bytes=options.working_set_bytes, steps_per_second=options.steps_per_second)
        self.sender = stack.enter_context(Sender())
        images = [stack.enter_context(RamImage.create(spec, options.backing)) for spec in specs]
        rams = []
        for image in images:
            spec = image.spec
            index = self.sender.add_block(spec.name, image.addr, spec.len_bytes, spec.page_size)
            rams.append(Ram(spec.name, index, spec.page_size, spec.n_pages, image.addr))
        self.pvm = make_machine(options.kind, rams, work, self.sender.mark_dirty)
        stack.callback(self.pvm.close)
        self.memory = stack.enter_context(Memory.create(None, specs, backing=options.backing))
        self.cache = stack.enter_context(Cache.create(self.memory))
        blocks = self.cache.blocks.values()
        rams = [Ram(one.name, one.index, one.page_size, one.n_pages, one.guest_addr) for one in blocks]
        self.svm = make_machine(options.kind, rams, work, self.cache.mark_dirty)
        stack.callback(self.svm.close)
        self._ours, self._theirs = (stack.enter_context(end) for end in socket.socketpair())
        self._running: Sequence[Machine] = (self.pvm,)
        self.pvm.boot()

    def run(self, seconds: float) -> None:
        """Let both run, the secondary first, as the conversation has it."""
        self._running = (self.svm, self.pvm)
        for machine in self._running:
            machine.resume()
        time.sleep(seconds)

    def checkpoint(self, epoch: int) -> EpochRecord:
        """Make the secondary the primary; both stand afterwards."""
        if epoch == 1:
            self.pvm.discard_dirty_log()
            self.sender.mark_all()
        else:
            self.pvm.sync_dirty_log(self.sender)
        n_pages = self._send(epoch)  # in the background: both run
        for machine in self._running:
            machine.pause()
            if machine.failure is not None:
                raise MachineError(f"the guest stopped: {machine.failure}")
        self.pvm.sync_dirty_log(self.sender)
        n_pages += self._send(epoch)
        state = self.pvm.save_device_state(with_hashes=True)
        with self.cache.device_state_buffer(epoch, len(state)) as room:
            room[:] = state
        if epoch == 1:
            self.svm.discard_dirty_log()
        else:
            self.svm.sync_dirty_log(self.cache)
        pvm, svm = (self._runs(name) for name in ("pvm_bitmap", "svm_bitmap"))
        sealed = self.cache.seal(epoch, n_pages=n_pages, check=self.svm.check_device_state)
        self.sender.received()
        flushed = self.cache.flush()
        loaded = self.svm.load_device_state(self.cache.device_state())
        self.cache.loaded()
        return EpochRecord(
            epoch=epoch,
            pvm=pvm,
            svm=svm,
            pvm_pages=sealed.pvm_pages,
            svm_pages=sealed.svm_pages,
            both_pages=sealed.both_pages,
            flushed_pages=flushed.n_pages,
            flush_ns=flushed.copy_ns,
            verified_pages=loaded.epoch_hashes_checked,
            wrong_pages=len(loaded.wrong_pages),
        )

    def _send(self, epoch: int) -> int:
        """Pending pages into the cache; how many. The sender has a thread of its own, as it would have a host."""
        failed: list[ColocacheError] = []

        def primary() -> None:
            try:
                self.sender.send(self._ours, epoch=epoch, timeout=WAIT_SECONDS)
                self._ours.sendall(message_header(MESSAGE, epoch, 0))
            except ColocacheError as error:
                failed.append(error)

        thread = threading.Thread(target=primary, name="lesson-primary")
        thread.start()
        try:
            taken = self.cache.receive_stream(self._theirs, timeout=WAIT_SECONDS, epoch=epoch)[1]
        except BaseException:
            self._theirs.shutdown(socket.SHUT_RDWR)  # so that the other side gives up at once
            raise
        finally:
            thread.join()
        if failed:
            raise failed[0]
        return taken

    def _runs(self, name: str) -> Runs:
        """A bitmap of all blocks as runs of pages, numbered through the blocks."""
        found, before = [], 0
        for block in self.cache.blocks.values():
            found += [(before + first, n) for first, n in bitmap.runs(getattr(block, name))]
            before += block.n_pages
        return tuple(found)


def mask(runs: Runs, n_pages: int) -> npt.NDArray[np.bool_]:
    """Runs as one bool per page."""
    pages = np.zeros(n_pages, np.bool_)
    for first, n in runs:
        pages[first : first + n] = True
    return pages
