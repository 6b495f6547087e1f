# SPDX-License-Identifier: Apache-2.0
"""One QEMU process: started on an image, spoken to, seen to die.

    started -> (load ->) cont -> stop -> save -> cont ... -> kill

It dies with this process (preload.c), and kill() comes back only when its death was seen: until then it may still write
what it maps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from colocache.errors import SystemCallError
from colocache.private import private_bytes, private_write_back
from colocache.vmm.qemu import inside, mapping, memory_access
from colocache.vmm.qemu.command_line import CommandLine
from colocache.vmm.qemu.disk import Nodes
from colocache.vmm.qemu.driver import driver
from colocache.vmm.qemu.ends import Card, Console
from colocache.vmm.qemu.errors import QemuDiedError, QemuError, QemuLoadError, QemuSlowError
from colocache.vmm.qemu.events import DEATH, Mailbox
from colocache.vmm.qemu.last_words import LastWords
from colocache.vmm.qemu.qmp import Event, Qmp
from colocache.vmm.qemu.quick import Quick
from colocache.vmm.qemu.readers import OnOutput, Readers
from colocache.vmm.qemu.saving import Saving
from colocache.vmm.qemu.wiring import Wiring, arguments

T = TypeVar("T")
START_SECONDS = 30.0
LOAD_SECONDS = 10.0
DEATH_SECONDS = 10.0  # of a process that was sent SIGKILL


class QemuProcess:
    """A QEMU that has come up and stands.

    line         the guest
    image        descriptor of the file of guest memory; stays the caller's
    shared       True: it writes the image; False: private copies
    incoming     True: it waits for load()
    nodes        the guest's disks, forgotten when it has come up
    on_output    is called with what the guest writes to its console, in the thread of driver.py; None: nobody listens
    on_packet    likewise with each packet that its network card sends
    output_full  whether to read no more of it now, which holds the guest up
    """

    def __init__(
        self,
        line: CommandLine,
        image: int,
        *,
        shared: bool,
        incoming: bool = False,
        nodes: Nodes | None = None,
        on_output: OnOutput | None = None,
        on_packet: OnOutput | None = None,
        output_full: Callable[[], bool] = lambda: False,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._driver = driver()
        self._file = os.fstat(image)
        self._incoming = incoming
        self._nodes = nodes or Nodes()
        self._len_bytes = line.ram_bytes
        self._events = Mailbox(on_event)
        self._words = LastWords()
        self._qmp: Qmp | None = None
        self._quick: Quick | None = None
        self._open: list[socket.socket | int] = []  # what close() closes
        self._ends: list[Console | Card] = []
        self._readers = Readers(self._driver)
        self._state = self._mine(os.memfd_create("colocache-device-state", os.MFD_CLOEXEC))
        self._stream: socket.socket | None = None
        self._preloaded: socket.socket | None = None
        self.pidfd = -1
        self._address: int | None = None
        self.userfault = -1
        try:
            self._output_full = output_full
            self._start(line, image, shared, on_output, on_packet)
        except BaseException:
            self.kill()
            raise

    # ---- start ---------------------------------------------------------------------------------------------------

    def _start(
        self, line: CommandLine, image: int, shared: bool, on_output: OnOutput | None, on_packet: OnOutput | None
    ) -> None:
        ends = {name: self._pair() for name in ("qmp", "quick", "handoff", "console", "stream")}
        ends["card"] = self._pair(socket.SOCK_DGRAM)
        theirs = {name: pair[1].fileno() for name, pair in ends.items()}
        self.console = Console(ends["console"][0], self._mine(ends["console"][1]))
        self.card = Card(ends["card"][0])
        self._ends = [self.console, self.card]
        wiring = Wiring(
            image,
            shared,
            theirs["qmp"],
            theirs["quick"],
            theirs["console"],
            theirs["card"],
            self._incoming,
            tuple(self._nodes.words),
        )
        environment, needed = inside.environment(theirs["handoff"], self._file)
        needed = [self._mine(one) for one in needed]
        read, write = os.pipe2(os.O_CLOEXEC)
        self._mine(read)
        try:
            self._process = self._driver.start(
                arguments(line, wiring),
                [image, self._state, *theirs.values(), *line.descriptors, *self._nodes.descriptors, *needed],
                environment,
                write,
            )
        except OSError as error:
            raise QemuError(f"{line.program} does not start: {error.strerror}") from error
        finally:
            os.close(write)
            for name, (_, end) in ends.items():
                if name != "console":
                    end.close()
            self._nodes.close()
        self.pid = self._process.pid
        self.pidfd = self._mine(os.pidfd_open(self.pid))
        pidfd = self.pidfd
        self._readers.watch(pidfd, lambda: self._dead(pidfd))
        self._readers.read(read, self._words.add)
        self.userfault = self._mine(self._take_userfault(ends["handoff"][0]))
        self._stream, self._preloaded = ends["stream"][0], ends["handoff"][0]
        for name, sink in ("console", on_output), ("card", on_packet):
            self._readers.read(ends[name][0].fileno(), sink or (lambda _: None), self._output_full)
        try:
            self._quick = Quick(ends["quick"][0], START_SECONDS)
            self._qmp = Qmp(ends["qmp"][0], self._told, START_SECONDS)
        except QemuDiedError:
            raise self._death("ended before it came up") from None
        if self._incoming:
            self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            self.qmp.execute("migrate-incoming", uri=f"fd:{theirs['stream']}")

    def _pair(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._mine(ours)
        return ours, theirs

    def _mine(self, descriptor: Any) -> Any:
        self._open.append(descriptor)
        return descriptor

    def _take_userfault(self, handoff: socket.socket) -> int:
        handoff.settimeout(START_SECONDS)
        try:
            return inside.take_userfault(handoff)
        except TimeoutError:
            raise QemuSlowError(f"QEMU did not start within {START_SECONDS:g} s") from None
        except EOFError:
            raise self._death("ended before it came up") from None

    # ---- what it says --------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Back when all that it wrote before it stood has been handed on, also if that is more than there is room."""
        self._readers.drain()

    def _dead(self, pidfd: int) -> None:
        self._driver.loop.remove_reader(pidfd)
        self._events.put({"event": DEATH, "data": {}})

    def _told(self, event: Event) -> None:
        if self._quick is not None:
            self._quick.forget_events()
        self._events.put(event)

    def _death(self, what: str) -> QemuDiedError:
        """The error that says how it ended; waits a moment for its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._driver.call(_nothing(), "answer", DEATH_SECONDS)  # what it wrote before it died has been read after this
        return QemuDiedError(f"QEMU (process {self.pid}) {what}, {self._words.of(self._process.poll())}")

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise QemuDiedError("this QEMU was closed")
        return self._qmp

    @property
    def quick(self) -> Quick:
        if self._quick is None:
            raise QemuDiedError("this QEMU was closed")
        return self._quick

    @property
    def alive(self) -> bool:
        """Whether the process has not ended. Any thread."""
        pidfd = self.pidfd
        if pidfd < 0:
            return False
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0)

    def address(self) -> int:
        """Where it maps guest memory, from its coming up to its end."""
        if self._address is None:
            self._address = mapping.find(self.pid, self._file, self._len_bytes)
        return self._address

    def private_bytes(self) -> int:
        """Bytes of guest memory of which it has copies of its own."""
        with self._told_if_it_died():
            return private_bytes(self.pid, self.address(), self._len_bytes)

    @contextlib.contextmanager
    def _told_if_it_died(self) -> Iterator[None]:
        """A look at its memory that fails because it has ended is QemuDiedError."""
        try:
            yield
        except SystemCallError as error:
            if self.alive and error.errno not in (errno.ESRCH, errno.ENOENT):  # of one that dies, and is not dead yet
                raise
            raise QemuDiedError(f"QEMU (process {self.pid}) has ended") from error

    def guest_memory(self, offset: int, len_bytes: int) -> bytearray:
        """Guest memory as the guest sees it, its private copies included."""
        return memory_access.read(self.pid, self.address() + offset, len_bytes)

    def fold(self, image: int, offset: int, len_bytes: int) -> int:
        """Its copies of this part of guest memory go into the image, which it maps shared from then on; bytes that
        were copies. It stands."""
        with self._told_if_it_died():
            n_bytes = private_write_back(self.pid, self.address() + offset, len_bytes, image, offset)
        self.ask_inside(lambda it: inside.map_shared(it, image, self.address() + offset, offset, len_bytes))
        return n_bytes

    def ask_inside(self, question: Callable[[socket.socket], T]) -> T:
        """What preload.c says to one of the questions of inside.py."""
        if self._preloaded is None:
            raise QemuDiedError("this QEMU was closed")
        try:
            return question(self._preloaded)
        except (EOFError, OSError) as error:  # TimeoutError is one
            raise self._death("did not do what was asked inside it") from error

    # ---- running -------------------------------------------------------------------------------------------------

    def cont(self) -> int | None:
        """Let it run: since when it does (CLOCK_MONOTONIC), which is known here later; None: it ran before."""
        self.quick.execute_all([("cont", {})])
        self._driver.let_go()
        return self.quick.when("RESUME")

    def announce(self) -> None:
        """Tell the network where its card's address is now. While it runs."""
        self.qmp.execute("announce-self", initial=50, max=550, rounds=5, step=50)

    def stop(self) -> None:
        """Stop it; back when no vCPU runs and no device writes any more."""
        self.quick.execute_all([("stop", {})])

    def monitor(self, command: str) -> str:
        """What the human monitor says to `command`: for the few things that QMP does not tell."""
        return str(self.qmp.execute("human-monitor-command", command_line=command))

    def status(self) -> str:
        """QEMU's own word: "running", "paused", "shutdown", "inmigrate", ..."""
        return str(self.qmp.execute("query-status")["status"])

    def save(self, limit_bytes: int) -> bytes:
        """See Saving.save."""
        return self._saving.save(limit_bytes)

    def stop_and_save(self, limit_bytes: int, meanwhile: Callable[[], None] = lambda: None) -> tuple[bytes, int | None]:
        """See Saving.stop_and_save."""
        return self._saving.stop_and_save(limit_bytes, meanwhile)

    @property
    def _saving(self) -> Saving:
        return Saving(self.quick, self._readers, self._driver, self._state)

    def load(self, state: bytes | memoryview) -> None:
        """Become the machine that `state` is of; it stands. QemuLoadError: this process is good for nothing any more.

        QEMU is not asked how far it is: a question would wait for a lock that the load holds. It tells.
        """
        if self._stream is None or not self._incoming:
            raise QemuError("this QEMU does not wait for a device state")
        stream, self._stream = self._stream, None
        try:
            stream.settimeout(LOAD_SECONDS)
            stream.sendall(state)
            stream.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise QemuLoadError(f"QEMU (process {self.pid}) did not take the device state: {error}") from error
        event = self._events.wait(
            lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed"),
            LOAD_SECONDS,
        )
        if event is None:
            raise QemuLoadError(f"QEMU (process {self.pid}) did not load the device state within {LOAD_SECONDS:g} s")
        if event["event"] == DEATH:
            raise QemuLoadError(str(self._death("ended while it loaded the device state")))
        if event["data"]["status"] != "completed":
            raise QemuLoadError(str(self._death("refused the device state")))
        self._incoming = False

    # ---- the end -------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill it, see it dead, and give back what belonged to it. May be called twice; QemuSlowError."""
        self.begin_death()
        self.see_dead()
        self.close()

    def begin_death(self) -> None:
        """Kill it and wait for nothing."""
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()  # not one that was waited for: its number may be another's

    def see_dead(self) -> None:
        """Back when it is dead: it writes nothing any more. QemuSlowError if the kernel keeps it."""
        process = getattr(self, "_process", None)
        if process is None or process.poll() is not None:
            return
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(DEATH_SECONDS * 1000):
            raise QemuSlowError(f"QEMU (process {process.pid}) did not die within {DEATH_SECONDS:g} s")
        process.wait()

    def close(self) -> None:
        """Give back what belonged to it; it is dead. May be called twice."""
        qmp, self._qmp, self._quick = self._qmp, None, None
        if qmp is not None:
            qmp.close()
        reading = self._readers.let_go()
        opened, self._open = self._open, []
        self._stream = self._preloaded = None
        for end in self._ends:
            end.close()
        self.pidfd = -1

        async def close() -> None:  # in the thread that reads them: never while it does, never a number used anew
            for fd in reading:
                self._driver.loop.remove_reader(fd)
            for one in opened:
                if isinstance(one, socket.socket):
                    one.close()
                else:
                    os.close(one)

        self._driver.call(close(), "let go", DEATH_SECONDS)


async def _nothing() -> None:
    """For whoever waits until the thread of driver.py has done what came before."""
