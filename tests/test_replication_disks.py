# SPDX-License-Identifier: Apache-2.0
"""A pair whose guest writes a disk beside its memory: at every moment the secondary's disk and memory are of one epoch,
over epochs that are given up, connections that break anywhere, and a log that is full; and each mutant is found."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy import QUICK, TOY_BLOCKS, Pair, ToyMachine, no_page_wrong, once, pair_of

from colocache import FlushResult
from colocache.disks.apart import ApartDisks, NoDisks, open_disks
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.write import RESERVE_BYTES, Kind, Write, unpack
from colocache.errors import VetoError
from colocache.replication.messages import MessageType as M
from colocache.replication.mirrors import NoMirrors
from colocache.replication.svm import Svm
from colocache.vmm import LoadReport

SIZE = 1 << 20
STEP = 4096


class Truth:
    """What disk and image hold; `wrong` has a sentence for each moment at which they were not of one epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epoch_sum: int | None = None  # of the newest sealed epoch's disk
        self.wrong: list[str] = []
        self.checks = 0

    def image_sum(self) -> int:
        return zlib.crc32(self.path.read_bytes())

    def compare(self, when: str, expected: int | None) -> None:
        self.checks += 1
        if expected is not None and self.image_sum() != expected:
            self.wrong.append(when)


class DiskMachine(ToyMachine):
    """A guest that writes a page of memory and a block of its disk in each step, and stands only between two."""

    truth: Truth
    disk: bytearray
    on_full: Callable[[], None] = staticmethod(lambda: None)
    mirrored: MirroredDisks | None = None
    pace = 0.002  # seconds between two steps: an epoch writes a part of the disk

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.disk = bytearray(SIZE)
        self._stepping = threading.Condition()
        self._ended = False

    def work(self) -> None:
        """The guest: until it is ended."""
        n = 0
        while not self._ended:
            time.sleep(self.pace)
            with self._stepping:
                if not self.running:
                    self._stepping.wait(0.01)
                    continue
                n += 1
                self.step(n)

    def step(self, n: int) -> None:
        """One block is written in every step, and one in each is not written again soon."""
        self.write(1, n % 300, n)
        assert self.mirrored is not None
        for block in (0, 1 + n * 7 % (SIZE // STEP - 1)):
            offset, data = block * STEP, n.to_bytes(4, "little") * (STEP // 4)
            self.disk[offset : offset + STEP] = data
            self.mirrored.write(Write(0, Kind.WRITE, offset, STEP, data))

    def full(self) -> None:
        self.on_full()

    def pause(self) -> None:
        with self._stepping:
            super().pause()

    def resume(self) -> None:
        with self._stepping:
            super().resume()

    def end(self) -> None:
        self._ended = True

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        fields = json.loads(super().save_device_state(with_hashes=with_hashes))
        return json.dumps({**fields, "disk": zlib.crc32(self.disk)}).encode()

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Before the seal the image is the epoch before."""
        self.truth.compare("before the seal", self.truth.epoch_sum)
        super().check_device_state(state)
        self.coming = json.loads(bytes(state))["disk"]

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        self.truth.epoch_sum = json.loads(bytes(state))["disk"]
        self.truth.compare("at the load", self.truth.epoch_sum)
        return super().load_device_state(state)


class ToyMirrors(NoMirrors):
    """What QEMU's mirror jobs do, for a disk in memory."""

    def __init__(self, machine: DiskMachine) -> None:
        self.disks = self._mirrored = machine.mirrored = MirroredDisks([SIZE], on_full=machine.full)
        self._machine = machine

    def connected(self, send: Callable[[Write], None], *, fresh: bool, limit_bytes: int) -> None:
        self._mirrored.connect(send, limit_bytes=limit_bytes)
        for offset, length in [(0, SIZE)] if fresh else self._mirrored.unacked_runs(0):
            self._mirrored.send_again(0, offset, length, lambda at, n: self._machine.disk[at : at + n])

    def disconnected(self) -> None:
        self._mirrored.disconnect()


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    return Truth(path)


@contextlib.contextmanager
def pair_with_a_disk(
    make_memory: Callable[..., Any],
    tmp_path: Path,
    truth: Truth,
    *,
    limit: int = 1 << 30,
    interval: float = 0.05,
    spoil: Any = None,
) -> Iterator[Pair]:
    """Both sides run; the guest writes until the end."""
    disks = open_disks([str(truth.path)], "", "toy", limit_bytes=limit)
    assert not isinstance(disks, NoDisks)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=QUICK) as pair:
        pair.make_secondary(disks=disks, machine=DiskMachine)
        flush = pair.cache.flush

        def flushed() -> FlushResult:
            result = flush()
            truth.compare("when it was called committed", pair.svm.coming)  # type: ignore[attr-defined]
            return result

        pair.cache.flush = flushed  # type: ignore[method-assign]
        if spoil:
            spoil(disks)
        machine = pair.make_primary(machine=DiskMachine, mirrors=ToyMirrors, interval=interval).pvm.machine
        pair.svm.truth = machine.truth = truth  # type: ignore[attr-defined]
        guest = threading.Thread(target=machine.work, daemon=True)  # type: ignore[attr-defined]
        guest.start()
        pair.run_secondary()
        pair.run_primary()
        try:
            yield pair
        finally:
            machine.end()  # type: ignore[attr-defined]
            guest.join(10)
            pair.close()
            disks.close()


def give_up_one(pair: Pair) -> None:
    """An epoch is given up by the secondary, one by the primary, and the next ones go on."""
    pair.events_s.wait("checkpoint", 2)
    pair.svm.veto = "the test does not like it"
    pair.events_s.wait("aborted", 2)
    pair.svm.veto = None
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    pair.pvm.fail_save = "the test wants it"
    pair.events_p.wait("aborted", len(pair.events_p.all("aborted")) + 1)
    pair.pvm.fail_save = None
    pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 3)


def check(pair: Pair, truth: Truth) -> None:
    assert truth.wrong == []
    assert truth.checks > 6
    no_page_wrong(pair)


def test_disk_and_memory_are_of_one_epoch(make_memory: Callable[..., Any], tmp_path: Path, truth: Truth) -> None:
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        give_up_one(pair)
    check(pair, truth)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        (M.VMSTATE_SEND, "cut"),
        (M.DISKS, "cut"),
        (M.VMSTATE_SIZE, "half-cut"),
        (M.VMSTATE_SIZE, "pass-cut"),
        (M.VMSTATE_RECEIVED, "cut"),
        (M.VMSTATE_LOADED, "cut"),
        (M.DISK, "half-cut"),
        (M.DISK, "pass-cut"),
    ],
)
def test_a_connection_may_break_anywhere(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth, kind: M, verdict: str
) -> None:
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)
        for n in range(3):
            pair.link.rule = once(kind, verdict, after=2)
            pair.events_p.wait("connected", 2 + n)
            pair.link.rule = lambda *_: "pass"
            pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 2)
    check(pair, truth)
    assert all(not event["fresh"] for event in pair.events_p.all("connected")[1:])


def test_a_write_that_was_lost_on_its_way_seals_nothing(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth
) -> None:
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)
        pair.link.rule = once(M.DISK, "drop")
        lost = pair.events_s.wait("lost", 1)
        assert "the primary told of" in lost["cause"]
        pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 3)
    check(pair, truth)


def test_a_log_that_is_full_takes_a_checkpoint_and_holds_the_guest_up(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint would come by itself."""
    monkeypatch.setattr(DiskMachine, "pace", 0)
    with pair_with_a_disk(make_memory, tmp_path, truth, limit=2 * RESERVE_BYTES, interval=3600) as pair:
        pair.pvm.on_full = pair.primary.request_checkpoint  # type: ignore[attr-defined]
        pair.events_s.wait("checkpoint", 4)
        assert pair.pvm.mirrored.held_up  # type: ignore[attr-defined]
    check(pair, truth)


def test_a_machine_that_ends_after_its_takeover_waits_until_its_disks_are_folded(
    make_memory: Callable[..., Any], tmp_path: Path
) -> None:
    asked: list[int] = []

    def fold() -> bool:
        asked.append(len(asked))
        return len(asked) > 20

    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=QUICK) as pair:
        pair.make_secondary(fold_disks=fold)
        pair.make_primary()
        secondary = pair.run_secondary()
        pair.run_primary()
        pair.events_s.wait("checkpoint", 2)
        pair.secondary.request_failover()
        assert secondary.join().took_over
    assert len(asked) == 21


# ---- mutants ----


def applied_before_the_seal(disks: ApartDisks) -> None:
    real = disks.come

    def come(body: bytes) -> None:
        real(body)
        disks.images[0].apply(unpack(body, disks.sizes))

    disks.come = come  # type: ignore[method-assign]


def the_older_log_once_more(disks: ApartDisks) -> None:
    older: list[Write] = []
    sealed, apply = disks.sealed, disks.apply

    def sealed_and_kept() -> None:
        older[:] = disks.sealed_log.read(disks.sealed_log.extent, disks.sizes)
        sealed()

    def applied_twice() -> None:
        apply()
        for write in older:
            disks.images[0].apply(write)

    disks.sealed, disks.apply = sealed_and_kept, applied_twice  # type: ignore[method-assign]


def without_the_aborted_epochs_writes(_disks: ApartDisks) -> Callable[[Svm, int, int | None], Any]:
    real = Svm.seal

    def seal(self: Svm, epoch: int, n_pages: int | None = None) -> Any:
        try:
            return real(self, epoch, n_pages)
        except VetoError:
            assert isinstance(self.disks, ApartDisks)
            self.disks.open.empty()
            raise

    return seal


def applied_after_committed(_disks: ApartDisks) -> Callable[[Svm], FlushResult]:
    def flush(self: Svm) -> FlushResult:
        result = self.cache.flush()
        self.disks.apply()
        return result

    return flush


@pytest.mark.parametrize(
    ("mutant", "replaced"),
    [
        (applied_before_the_seal, ""),
        (the_older_log_once_more, ""),
        (without_the_aborted_epochs_writes, "seal"),
        (applied_after_committed, "flush"),
    ],
)
def test_disk_and_memory_of_two_epochs_are_found(
    make_memory: Callable[..., Any],
    tmp_path: Path,
    truth: Truth,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[ApartDisks], Any],
    replaced: str,
) -> None:
    def spoil(disks: ApartDisks) -> None:
        made = mutant(disks)
        if replaced:
            monkeypatch.setattr(Svm, replaced, made)

    with pair_with_a_disk(make_memory, tmp_path, truth, spoil=spoil) as pair:
        give_up_one(pair)
    assert truth.wrong
