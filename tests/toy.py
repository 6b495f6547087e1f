# SPDX-License-Identifier: Apache-2.0
"""A pair in one process: machines that do only what a test tells them, and a wire between them that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colocache import BlockSpec, Cache, ColocacheError, Memory, RamImage, Sender, private_bytes, private_forget
from colocache.demo.checks import Checks
from colocache.disks.apart import Disks
from colocache.outputs.held import NoOutput
from colocache.replication.address import Address
from colocache.replication.arbiter import Arbiter
from colocache.replication.blocks import hello_blocks, rams_of_blocks, rams_of_images
from colocache.replication.events import Events
from colocache.replication.messages import MessageType
from colocache.replication.mirrors import NoMirrors
from colocache.replication.options import PrimaryOptions, SecondaryOptions, Timing
from colocache.replication.primary import Primary
from colocache.replication.secondary import Secondary
from colocache.replication.transport import PlainTransport, Wrap
from colocache.vmm import DeviceStateError, LoadReport, Ram, VerifyReport

Rule = Callable[[str, MessageType, int], str]  # direction, type, epoch: what shall become of the message

PAGE = 4096
TOY_BLOCKS = (BlockSpec("boot", 13 * PAGE), BlockSpec("pc.ram", 300 * PAGE))
TOY_PAGES = 313
HEADER = struct.Struct("<IHHQQIIQ")
QUICK = Timing(peer_timeout=2.0, reconnect_limit=10.0, connect_limit=20.0, checkpoint_timeout=20.0, run_on=0.05)


class ToyMachine:
    """Memory that a test writes, a dirty log of it, and a device state with a checksum per page. No vCPU."""

    kind = "toy"
    failure: str | None = None

    def __init__(self, rams: Sequence[Ram], mark_dirty: Callable[[int, int, int], None], *, own: int) -> None:
        self.views = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (ram.n_pages * PAGE)).from_address(ram.addr)).reshape(-1, PAGE)
            for ram in rams
        ]
        self._rams = rams
        self._log = [np.zeros((ram.n_pages + 63) // 64, np.uint64) for ram in rams]
        self._lock = threading.Lock()
        self._mark_dirty = mark_dirty
        self._own = own  # what this machine writes into pages while it runs, so that the two drift apart
        self.running = False
        self.steps = 0
        self.resumes = 0
        self.veto: str | None = None
        self.fail_load: str | None = None
        self.fail_save: str | None = None
        self.on_load: Callable[[], None] = lambda: None
        self.wrong: tuple[tuple[str, int], ...] = ()

    def write(self, block: int, pfn: int, value: int) -> None:
        """A guest's write: the page, then the log. Not for a machine that may be stopped meanwhile: see write_all."""
        with self._lock:
            self._store(block, pfn, value)

    def write_all(self, block: int, pfns: Iterable[int], value: int) -> None:
        """Writes of another thread than the pair's: between two pauses, and so all of them in one epoch."""
        while True:
            with self._lock:
                if self.running:
                    for pfn in pfns:
                        self._store(block, pfn, value)
                    return
            time.sleep(0.0005)

    def _store(self, block: int, pfn: int, value: int) -> None:
        self.views[block][pfn] = value % 251
        self._log[block][pfn // 64] |= np.uint64(1 << pfn % 64)
        self.steps += 1

    def boot(self) -> None:
        for block, view in enumerate(self.views):
            view[::2] = 7
            self._mark_dirty(block, 0, len(view))

    def resume(self) -> None:
        self.running = True
        self.resumes += 1
        # Each machine writes its own pages as soon as it runs: they are wrong after the next checkpoint unless flushed.
        for step in range(20):
            pfn = (self.resumes * 7 + step * 11 + self._own * 3) % 300 * (len(self.views[1]) // 300)
            self.write(1, pfn, self._own + step + self.resumes)

    def pause(self) -> None:
        with self._lock:
            self.running = False

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        with self._lock:
            for block, words in enumerate(self._log):
                target.sync_words(block, words.copy(), 0, self._rams[block].n_pages)
                words[:] = 0

    def discard_dirty_log(self) -> None:
        with self._lock:
            for words in self._log:
                words[:] = 0

    @property
    def powered_off(self) -> bool:
        """Never."""
        return False

    @property
    def identity(self) -> str:
        """Its kind says it all."""
        return self.kind

    def promoted(self) -> None:
        """It is what it was."""

    def dirty_hint(self) -> int:
        return int(sum(int(word).bit_count() for words in self._log for word in words))

    def private_bytes(self) -> int:
        """As the kernel counts them."""
        return sum(private_bytes(0, ram.addr, ram.len_bytes) for ram in self._rams if ram.private)

    def give_up_private(self) -> None:
        """Its memory is the image's again."""
        assert not self.running
        for ram in self._rams:
            private_forget(ram.addr, ram.len_bytes)

    def fold(self, cache: Cache, block: int, first_pfn: int, n_pages: int) -> int:
        """It stands, and has nothing but its memory."""
        return cache.fold(block, first_pfn, n_pages)

    def sums(self) -> list[int]:
        """A checksum per page of all blocks."""
        return [zlib.crc32(page) for view in self.views for page in view]

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        assert not self.running
        if self.fail_save:
            raise ColocacheError(self.fail_save)
        return json.dumps({"steps": self.steps, "sums": self.sums() if with_hashes else None}).encode()

    def check_device_state(self, state: memoryview | bytes) -> None:
        json.loads(bytes(state))
        if self.veto:
            raise DeviceStateError(self.veto)

    def rehearse(self, state: bytes) -> None:
        self.check_device_state(state)

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        assert not self.running
        self.on_load()
        if self.fail_load:
            raise DeviceStateError(self.fail_load)
        fields = json.loads(bytes(state))
        self.steps = fields["steps"]
        if fields["sums"] is None:
            return LoadReport(0, (), 0)
        names = [(ram.name, pfn) for ram in self._rams for pfn in range(ram.n_pages)]
        both = zip(names, self.sums(), fields["sums"], strict=True)
        wrong = tuple(name for name, mine, theirs in both if mine != theirs)
        return LoadReport(len(names), wrong, 0)

    def verify(self) -> VerifyReport:
        return VerifyReport(sum(ram.n_pages for ram in self._rams), self.wrong, 0.0)

    def close(self) -> None:
        self.running = False


class Recorder(Events):
    """Events kept in a list, and waited for."""

    def __init__(self, side: str) -> None:
        super().__init__(side, machine_readable=False, quiet=True)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda *_: None

    def emit(self, event: str, sentence: str = "", /, **fields: Any) -> None:
        with self._changed:
            self.seen.append((event, {**fields, "sentence": sentence}))
            self._changed.notify_all()
        self.on_event(event, fields)

    def all(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in list(self.seen) if name == event]

    def wait(self, event: str, count: int = 1, timeout: float = 20.0) -> dict[str, Any]:
        """The count-th event of this name."""
        with self._changed:
            found = self._changed.wait_for(lambda: len(self.all(event)) >= count, timeout)
        assert found, f"no {event} number {count} of {self.side} within {timeout} s; there was {self.seen}"
        return self.all(event)[count - 1]


class Link:
    """A wire that reads along: `rule(direction, type, epoch)` says "pass", "drop", "cut" (before it), "half-cut"
    (inside it), "pass-cut", "flip" (the last bit of its body) or "stall". In a rule `here.stream` is the index of the
    connection's stream."""

    def __init__(self, folder: Path, target: Address) -> None:
        self.address = Address.parse(f"unix:{folder}/link")
        self._listener, _ = self.address.listen()
        self._target = target
        self.rule: Rule = lambda *_: "pass"
        self.log: list[tuple[str, MessageType, int, int]] = []  # direction, type, epoch, pages
        self.here = threading.local()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = self._target.connect(1.0)
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            self._start(self._forward, "P→S", near, far)
            self._start(self._forward, "S→P", far, near)

    def _forward(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        self.here.stream = 0
        with contextlib.suppress(OSError, ValueError):
            while True:
                header = self._read(source, HEADER.size)
                _, _, kind, epoch, length, first, n_runs, _ = HEADER.unpack(header)
                body = self._read(source, length)
                n_pages = 0
                if kind == MessageType.PAGES:
                    n_pages = sum(struct.unpack_from("<QII", body, 16 * run)[1] for run in range(n_runs))
                if kind == MessageType.STREAM:
                    self.here.stream = first
                verdict = self.rule(direction, MessageType(kind), epoch)
                if verdict == "stall":
                    self._closed.wait()
                if verdict in ("cut", "half-cut"):
                    target.sendall((header + body)[: (len(header) + length) // 2 if verdict == "half-cut" else 0])
                    break
                if verdict == "drop":
                    continue
                if verdict == "flip":
                    body = body[:-1] + bytes([body[-1] ^ 1])
                self.log.append((direction, MessageType(kind), epoch, n_pages))
                target.sendall(header + body)
                if verdict == "pass-cut":
                    break
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _read(source: socket.socket, n: int) -> bytes:
        data = source.recv(n, socket.MSG_WAITALL) if n else b""
        if len(data) < n:
            raise ValueError("closed")
        return data

    def pages(self, direction: str = "P→S") -> int:
        """Pages that went over the wire."""
        return sum(n for way, _, _, n in list(self.log) if way == direction)

    def cut(self) -> None:
        """Break every connection now."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for one in [self._listener, *self._open]:
            one.close()
        self.address.remove()


class Released(NoOutput):
    """Keeps what may leave: numbers of epochs, None for all of it and then up to which number."""

    def __init__(self, released: list[int | None]) -> None:
        self._released = released

    def move(self, epoch: int) -> None:
        if self._released[-1:] == [None]:
            self._released.append(epoch - 2)

    def received(self, epoch: int) -> None:
        self._released.append(epoch)

    def free(self) -> None:
        self._released.append(None)


class Running:
    """A thread with what its function returned or raised."""

    def __init__(self, target: Callable[[], Any]) -> None:
        self._target = target
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._target()
        except BaseException as error:  # noqa: BLE001 -- handed to the test
            self.error = error

    def join(self, timeout: float = 20.0) -> Any:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self.result


class Pair:
    """A primary and a secondary in threads, over a Link. Each part is started by the test."""

    def __init__(self, memory: Memory, folder: Path, *, timing: Timing = QUICK, arbiter: Arbiter | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self.memory, self.timing, self.arbiter, self.streams = memory, timing, arbiter, 1
        self.wraps: dict[str, Wrap] = {}  # by role; then there is no wire between that reads along
        self.blocks = hello_blocks(image.spec for image in memory.images)
        self.listener, self.address = Address.parse(f"unix:{folder}/s").listen()
        self._stack.callback(self.address.remove)
        self._stack.enter_context(self.listener)
        self.link = Link(folder, self.address)
        self._stack.callback(self.link.close)
        self.stop_s, self.stop_p = threading.Event(), threading.Event()
        self.events_s, self.events_p = Recorder("secondary"), Recorder("primary")
        self.released: list[int | None] = []
        self._running: list[Running] = []

    def make_secondary(
        self,
        *,
        attach: bool = False,
        pair: str = "toy",
        ask_at: int = 0,
        memory_limit: int = 0,
        disks: Disks | None = None,
        fold_disks: Callable[[], bool] = lambda: True,
        machine: type[ToyMachine] = ToyMachine,
    ) -> Secondary:
        """A secondary on fresh memory, or on what the one before left."""
        self.cache = Cache.attach(self.memory, threads=1) if attach else Cache.create(self.memory, threads=1)
        self._stack.callback(self.cache.close)
        rams = rams_of_blocks(self.cache.blocks.values(), private=self.memory.memory_mode == "bounded")
        self.svm = machine(rams, self.cache.mark_dirty, own=100)
        self.secondary = Secondary(
            cache=self.cache,
            machine=self.svm,  # type: ignore[arg-type]
            listener=self.listener,
            machine_name="toy",
            options=SecondaryOptions(
                pair=pair,
                timing=self.timing,
                ask_at_dirty_pages=ask_at,
                streams=self.streams,
                memory_limit=memory_limit,
            ),
            control_fd=self.memory.control_fd,
            spill_fd=self.memory.spill_fd,
            events=self.events_s,
            stop=self.stop_s,
            arbiter=self.arbiter,
            disks=disks,
            fold_disks=fold_disks,
            wrap=self.wraps.get("secondary", PlainTransport),
        )
        return self.secondary

    def make_primary(
        self,
        *,
        machine: type[ToyMachine] = ToyMachine,
        mirrors: Callable[[Any], NoMirrors] | None = None,
        **options: Any,
    ) -> Primary:
        """A primary with a sender of its own; `mirrors` are made for its machine."""
        images = [self._stack.enter_context(RamImage.create(image.spec, "shm")) for image in self.memory.images]
        self.sender = self._stack.enter_context(Sender())
        for image in images:
            self.sender.add_block(image.spec.name, image.addr, image.spec.len_bytes)

        def mark_dirty(block: int, first_pfn: int, n_pages: int) -> None:
            self.primary.mark_dirty(block, first_pfn, n_pages)

        self.pvm = machine(rams_of_images(images), mark_dirty, own=1)
        checks = {name: options.pop(name) for name in ("verify", "hold", "die_at") if name in options}
        given = {"pair": "toy", "timing": self.timing, "interval": 0.05, "streams": self.streams, **options}
        self.primary = Primary(
            address=self.address if self.wraps else self.link.address,
            machine=self.pvm,  # type: ignore[arg-type]
            sender=self.sender,
            machine_name="toy",
            options=PrimaryOptions(**given),
            events=self.events_p,
            stop=self.stop_p,
            arbiter=self.arbiter,
            observer=Checks(self.events_p, **checks),
            output=Released(self.released),
            mirrors=mirrors(self.pvm) if mirrors else None,
            wrap=self.wraps.get("primary", PlainTransport),
        )
        return self.primary

    def start(self, **options: Any) -> tuple[Running, Running]:
        """Both sides, running."""
        self.make_secondary()
        self.make_primary(**options)
        return self.run_primary(), self.run_secondary()

    def run_primary(self) -> Running:
        self._running.append(Running(self.primary.run))
        return self._running[-1]

    def run_secondary(self) -> Running:
        self._running.append(Running(self.secondary.run))
        return self._running[-1]

    def guest_ram(self) -> list[npt.NDArray[np.uint8]]:
        """The secondary's guest RAM, as it is now."""
        return [np.array(block.guest) for block in self.cache.blocks.values()]

    def close(self) -> None:
        self.stop_p.set()
        self.stop_s.set()
        self.link.cut()
        for running in self._running:
            running.thread.join(20)  # before its memory is unmapped
        self._stack.close()


@contextlib.contextmanager
def pair_of(memory: Memory, folder: Path, **options: Any) -> Iterator[Pair]:
    """A Pair that is closed at the end."""
    pair = Pair(memory, folder, **options)
    try:
        yield pair
    finally:
        pair.close()


def once(kind: MessageType, verdict: str, *, after: int = 1, direction: str = "") -> Rule:
    """A rule for Link: the `after`-th message of this kind gets the verdict, all others pass."""
    seen = [0]

    def rule(way: str, found: MessageType, _epoch: int) -> str:
        if found is kind and direction in ("", way):
            seen[0] += 1
            if seen[0] == after:
                return verdict
        return "pass"

    return rule


def while_set(event: threading.Event, verdict: str) -> Rule:
    """A rule for Link: everything gets the verdict while the event is set."""

    def rule(_way: str, _kind: MessageType, _epoch: int) -> str:
        return verdict if event.is_set() else "pass"

    return rule


def no_page_wrong(pair: Pair) -> None:
    """No flush was ever wrong, and each was compared with the primary's checksums."""
    done = pair.events_s.all("checkpoint")
    assert [event["wrong_pages"] for event in done] == [0] * len(done)
    assert {event["verified_pages"] for event in done} <= {TOY_PAGES}
