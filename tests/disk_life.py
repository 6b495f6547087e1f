# SPDX-License-Identifier: Apache-2.0
"""A secondary's memory and disks over some epochs, in processes that die at each point of them, or whose system calls
fail: what the next process attaches to is disk and memory of one epoch, and the pair goes on from there.

    LD_LIBRARY_PATH=(a build with crash points) python disk_life.py FOLDER mirror|bounded engine|calls|failing [STRIDE]

The last line has the counts, as JSON. Exit status 0: nothing was wrong.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from disk_calls import Calls, dies_after, dies_before, dies_half, failing
from toy import PAGE, Recorder, ToyMachine

from colocache import BlockSpec, Memory
from colocache.disks.apart import ApartDisks, open_disks
from colocache.disks.write import Kind, Total, Write
from colocache.errors import ColocacheError, OrderError, VetoError
from colocache.replication.blocks import rams_of_blocks
from colocache.replication.child import open_cache
from colocache.replication.svm import Svm

SIZE = 64 << 10  # of each of two disks
PART = 32 << 10
N_PAGES = 16
STEPS = 4
VETOED = 3  # what this step brought is sealed with the epoch after it
ENDED_WELL, ENDED_BY_ERROR, BROKEN = 0, 3, 4
FAILURES = (errno.ENOSPC, errno.EIO, 0)  # 0: it does a half


def writes_of(step: int) -> list[Write]:
    """Step 1 is the copy of both disks whole; the others write over each other, so that their order matters."""
    bits = random.Random(step)
    if step == 1:
        return [Write(disk, Kind.WRITE, at, PART, bits.randbytes(PART)) for disk in (0, 1) for at in (0, PART)]
    made = []
    for n in range(3):
        disk, at = n % 2, bits.randrange(8) * 512
        made.append(Write(disk, Kind.WRITE, at, 2048, bits.randbytes(2048)))
    return [
        *made,
        Write(1, Kind.ZERO, bits.randrange(8) * 512, 1024),
        Write(0, Kind.WRITE, 512 * step, 512, made[0].data[:512]),
    ]


def pages_of(step: int) -> dict[int, int]:
    """What each page becomes."""
    return {pfn: 10 * step + pfn for pfn in (range(N_PAGES) if step == 1 else (step, step + 5, 12))}


def truths() -> list[tuple[list[bytes], list[int]]]:
    """Both disks and the first byte of each page, after each step from 0 on."""
    disks, ram = [bytearray(SIZE), bytearray(SIZE)], [0] * N_PAGES
    found = [([bytes(disk) for disk in disks], list(ram))]
    for step in range(1, STEPS + 1):
        for write in writes_of(step):
            data = bytes(write.data) if write.kind is Kind.WRITE else bytes(write.length)
            disks[write.disk][write.offset : write.offset + write.length] = data
        for pfn, value in pages_of(step).items():
            ram[pfn] = value
        found.append(([bytes(disk) for disk in disks], list(ram)))
    return found


TRUTHS = truths()


class WrongError(Exception):
    """What the promise excludes."""


class Life:
    """A process of a secondary, from its attach on."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory = memory
        self.cache = open_cache(memory, threads=1, copy="auto", device_state_max=PAGE)
        self.disks = self._open_disks(folder)
        rams = rams_of_blocks(self.cache.blocks.values(), private=memory.memory_mode == "bounded")
        self.machine = ToyMachine(rams, self.cache.mark_dirty, own=1)
        self.svm = Svm(self.cache, self.machine, Recorder("secondary"), disks=self.disks)  # type: ignore[arg-type]
        self._total = Total()
        self._carried: list[int] = []  # steps that this connection has brought and no seal has taken

    def _open_disks(self, folder: Path) -> ApartDisks:
        disks = open_disks([str(folder / "a"), str(folder / "b")], "", "life")
        assert isinstance(disks, ApartDisks)
        status = self.cache.status()
        try:
            disks.attach(status.sealed_epoch, status.attachment)
        except BaseException:
            disks.close()
            raise
        return disks

    @property
    def step(self) -> int:
        """The newest that is sealed."""
        return json.loads(bytes(self.cache.device_state()))["steps"] if self.cache.status().sealed_epoch else 0

    def check(self) -> None:
        """Disk and memory are of that step. Before the first there is nothing that they must be."""
        step = self.step
        if not step:
            return
        disks, ram = TRUTHS[step]
        for number, one in enumerate(self.disks.images):
            found = os.pread(one.fd, SIZE, 0)
            if found != disks[number]:
                raise WrongError(f"disk {number} is not of step {step}, but of {self.like(number, found)}")
        found_ram = [int(value) for value in self.cache.blocks["pc.ram"].guest[:, 0]]
        if found_ram != ram:
            raise WrongError(f"memory is not of step {step}: {found_ram} where {ram} must be")

    @staticmethod
    def like(number: int, found: bytes) -> str:
        """For the report."""
        return str([step for step in range(STEPS + 1) if TRUTHS[step][0][number] == found] or "none")

    def connect(self) -> None:
        """A connection begins; what the one before carried for no sealed epoch comes again."""
        self.svm.abort_open("the connection broke")
        self.disks.lost()
        self._total, self._carried = Total(), []

    def run(self) -> None:
        """To the last step, over connections that an error ends. ColocacheError: this process can't go on."""
        self.connect()
        tries = 0
        while (step := self.step) < STEPS:
            wanted = step + 1 + len(self._carried)
            try:
                self._epoch(wanted)
            except VetoError:
                continue
            except (OrderError, WrongError):
                raise
            except ColocacheError:
                tries += 1
                if tries > 2 or self.cache.status().phase.name == "SEALING":
                    raise  # a fresh process replays it
                self.connect()
                continue
            self.check()

    def _epoch(self, step: int) -> None:
        """What `step` brings, with what an epoch that was given up has brought."""
        status = self.cache.status()
        epoch = max(status.sealed_epoch, status.receiving_epoch) + 1
        pages: dict[int, int] = {}
        for one in [*self._carried, step]:
            pages |= pages_of(one)
        self._carried.append(step)
        bring = iter(writes_of(step))
        for pfn, value in pages.items():
            self.cache.receive(epoch, "pc.ram", pfn, np.full(PAGE, value, np.uint8))
            self._come(next(bring, None))
        for write in bring:
            self._come(write)
        self.svm.put_device_state(epoch, json.dumps({"steps": step, "sums": None}).encode())
        self.disks.told(self._total)
        self.svm.sync()
        self.machine.veto = "as wanted" if step == VETOED else None
        self.svm.seal(epoch, len(pages))
        self._carried = []
        self.svm.flush()
        self.svm.load(epoch)
        self.svm.tidy()

    def _come(self, write: Write | None) -> None:
        if write is not None:
            self._total = self._total.plus(write)
            self.disks.come(write.pack())

    def close(self) -> None:
        """Forget all."""
        self.disks.close()
        self.cache.close()


# ---- the sweeps ----


def engine() -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
    """Where the crash points of this build are counted: die at, passed."""
    library = ctypes.CDLL("libcolocache.so.0")
    return tuple(ctypes.c_uint64.in_dll(library, f"colocache_fault_{name}") for name in ("crash_at", "passed"))  # type: ignore[return-value]


class Sweep:
    """One life after the other, each on memory and files of its own."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.counts: Counter[str] = Counter()
        self._names = 0

    def world(self) -> Memory:
        self._names += 1
        for name in ("a", "b"):
            (self.folder / name).write_bytes(os.urandom(SIZE))  # whatever an operator's image held
        for path in self.folder.glob("*.disk-log.*"):
            path.unlink()
        name = f"life-{os.getpid()}-{self._names}"
        return Memory.create(name, (BlockSpec("pc.ram", N_PAGES * PAGE),), backing="shm", memory_mode=self.mode)

    def in_a_process(self, live: Callable[[], None]) -> int | None:
        """Its exit status; None: it was killed."""
        pid = os.fork()
        if not pid:
            status = BROKEN
            try:
                live()
                status = ENDED_WELL
            except ColocacheError as error:
                (self.folder / "error").write_text(f"{type(error).__name__}: {error}")
                status = ENDED_BY_ERROR
            except BaseException:  # noqa: BLE001 -- told, and then this process is over
                traceback.print_exc()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)

    def life(self, memory: Memory, arm: Callable[[], Any]) -> int | None:
        def live() -> None:
            arm()
            one = Life(memory, self.folder)
            one.check()
            one.run()
            one.check()

        return self.in_a_process(live)

    def settle(self, memory: Memory, where: str, arm_attach: Callable[[], Any] | None = None) -> None:
        """The next process finds one epoch, and goes on from it; it may die on its way, too."""
        if arm_attach is not None:
            self.counts["deaths of one that attaches"] += self.life(memory, arm_attach) is None
        status = self.life(memory, lambda: None)
        if status != ENDED_WELL:
            why = (self.folder / "error").read_text() if status == ENDED_BY_ERROR else ""
            raise WrongError(f"{where}: the next process ended with {status}: {why}")
        self.counts["recoveries"] += 1

    def close(self, memory: Memory) -> None:
        memory.unlink()
        memory.close()

    def deaths(self, arm: Callable[[int], Callable[[], Any]], stride: int) -> None:
        """At each point until a life has no more of them."""
        at = 1
        while True:
            memory = self.world()
            try:
                status = self.life(memory, arm(at))
                if status is None:
                    self.counts["deaths"] += 1
                    again = arm(random.Random(at).randrange(1, 40)) if at % 3 == 0 else None
                    self.settle(memory, f"death {at}", again)
                elif status == ENDED_WELL:
                    return
                else:
                    raise WrongError(f"life {at} ended with {status}")
            finally:
                self.close(memory)
            at += stride

    def fails(self, stride: int) -> None:
        """Each call, with each failure, in a life that goes on or ends in order."""
        for number in FAILURES:
            at = 1
            while True:
                memory = self.world()
                try:
                    passed = Path(self.folder / "passed")

                    def live(
                        at: int = at, number: int = number, passed: Path = passed, memory: Memory = memory
                    ) -> None:
                        with Calls(at, failing(number)) as calls:
                            try:
                                one = Life(memory, self.folder)
                                one.run()
                            finally:
                                n = calls.n
                        passed.write_text(str(n))
                        one.check()

                    passed.write_text("")
                    status = self.in_a_process(live)
                    if status not in (ENDED_WELL, ENDED_BY_ERROR):
                        raise WrongError(f"call {at} with {errno.errorcode.get(number, 'a half')}: ended with {status}")
                    if status == ENDED_WELL and int(passed.read_text()) < at:
                        break
                    self.counts[f"failed, {'went on' if status == ENDED_WELL else 'another process'}"] += 1
                    self.settle(memory, f"call {at} with {errno.errorcode.get(number, 'a half')}")
                finally:
                    self.close(memory)
                at += stride


def main() -> None:
    folder, mode, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    stride = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    sweep = Sweep(folder, mode)
    try:
        if what == "engine":
            crash_at, passed = engine()

            def arm(at: int) -> Callable[[], None]:
                def armed() -> None:
                    passed.value, crash_at.value = 0, at

                return armed

            sweep.deaths(arm, stride)
        elif what == "calls":
            for how in (dies_before, dies_half, dies_after):
                sweep.deaths(lambda at, how=how: lambda: Calls(at, how).__enter__(), stride)  # type: ignore[misc]
        else:
            sweep.fails(stride)
    except WrongError as error:
        print(f"{mode}, {what}: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(sweep.counts))


if __name__ == "__main__":
    main()
