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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from colocache import Cache, Memory, RamImage, Sender, bitmap
from colocache.errors import ColocacheError
from colocache.replication.blocks import rams_of_blocks, rams_of_images
from colocache.replication.events import Events
from colocache.replication.pvm import Pvm
from colocache.replication.svm import Svm
from colocache.teach.primary import OneSocket
from colocache.vmm import GuestOptions, MachineError, blocks_for, make_machine

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
            found = pair.checkpoint()
            if number > 1:
                epochs.append(found)
                progress(number - 1)
            if number <= options.checkpoints:
                pair.run(options.interval)
        guest: dict[str, str | int | float] = {
            "kind": pair.pvm.machine.kind, "backing": pair.memory.backing, "ram_bytes": options.ram_bytes,
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
        sender = stack.enter_context(Sender())
        images = [stack.enter_context(RamImage.create(spec, options.backing)) for spec in specs]
        for image in images:
            sender.add_block(image.spec.name, image.addr, image.spec.len_bytes, image.spec.page_size)
        machine = make_machine(options.kind, rams_of_images(images), work, sender.mark_dirty)
        stack.callback(machine.close)
        self.pvm = Pvm(machine, sender)
        self.memory = stack.enter_context(Memory.create(None, specs, backing=options.backing))
        self.cache = stack.enter_context(Cache.create(self.memory))
        machine = make_machine(options.kind, rams_of_blocks(self.cache.blocks.values()), work, self.cache.mark_dirty)
        stack.callback(machine.close)
        self.svm = Svm(self.cache, machine, Events("lesson", machine_readable=False, quiet=True))
        self._ours, self._theirs = (stack.enter_context(end) for end in socket.socketpair())
        self.pvm.boot()
        self.pvm.send_all()

    def run(self, seconds: float) -> None:
        """Let both run, the secondary first, as the conversation has it."""
        self.svm.resume()
        self.pvm.resume()
        time.sleep(seconds)

    def checkpoint(self) -> EpochRecord:
        """Make the secondary the primary; both stand afterwards."""
        epoch = self.pvm.open_epoch()
        self.pvm.sync()
        self._send()  # in the background: both run
        self.svm.pause()
        self.pvm.pause()
        for machine in (self.svm.machine, self.pvm.machine):
            if machine.failure is not None:
                raise MachineError(f"the guest stopped: {machine.failure}")
        self.pvm.sync()
        self._send()
        self.pvm.in_flight()
        self.svm.put_device_state(epoch, self.pvm.machine.save_device_state(with_hashes=True))
        self.svm.sync()
        pvm, svm = (self._runs(name) for name in ("pvm_bitmap", "svm_bitmap"))
        sealed = self.svm.seal(epoch, self.pvm.sent.n_pages)
        self.pvm.received()
        flushed = self.svm.flush()
        loaded, _ = self.svm.load(epoch)
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

    def _send(self) -> None:
        """Pending pages into the cache. The sender has a thread of its own, as it would have a host."""
        failed: list[ColocacheError] = []

        def primary() -> None:
            try:
                self.pvm.send(OneSocket(self._ours), timeout=WAIT_SECONDS)
            except ColocacheError as error:
                failed.append(error)

        thread = threading.Thread(target=primary, name="lesson-primary")
        thread.start()
        try:
            self.cache.receive_stream(self._theirs, timeout=WAIT_SECONDS, epoch=self.pvm.epoch)
        except BaseException:
            self._theirs.shutdown(socket.SHUT_RDWR)  # so that the other side gives up at once
            raise
        finally:
            thread.join()
        if failed:
            raise failed[0]

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
