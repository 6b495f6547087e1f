# SPDX-License-Identifier: Apache-2.0
"""The process that runs the secondary's virtual machine. Its parent, the keeper, holds the memory and starts it anew
if it is killed; it then attaches to what it finds. It dies with its keeper."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from colocache import Cache, Memory
from colocache.children import die_with_parent
from colocache.disk_files import disk_files
from colocache.disks.apart import ApartDisks, NoDisks, open_disks
from colocache.disks.mark import Mark, Was
from colocache.errors import ColocacheError, LoadFailedError, NoStateError, NotColocacheError, PeerLostError
from colocache.outputs.apart import ApartOutput
from colocache.outputs.connect import connect
from colocache.outputs.front import Front
from colocache.outputs.fronts import make_front
from colocache.outputs.typed import TypedInput
from colocache.replication.arbiter import LeaseLostError, make_arbiter
from colocache.replication.blocks import rams_of_blocks
from colocache.replication.errors import RefusedError, SecondaryLostError
from colocache.replication.events import Events
from colocache.replication.options import SecondaryOptions, Timing
from colocache.replication.secondary import Secondary
from colocache.replication.security import Security, make_wrap
from colocache.replication.signals import Wakeup, end_as_by, stop_on_signals
from colocache.replication.trace import Trace
from colocache.vmm.guests import disks_of_machine, make_machine
from colocache.vmm.qemu.disk import disks_of
from colocache.vmm.workload import GuestOptions

EXIT_OK, EXIT_FAILED, EXIT_LOAD_FAILED = 0, 1, 4
EXIT_AGAIN = 75  # something broke that a fresh process may not have: the keeper starts one, which attaches

# What ends a secondary for good: a fresh process would find the same.
FINAL = (RefusedError, PeerLostError, NoStateError, LoadFailedError, SecondaryLostError, LeaseLostError)


@dataclass(frozen=True)
class ChildConfig:
    """What the keeper tells its child, as JSON on its stdin: 256 long names of blocks are too much for an argument."""

    manifest: str
    listener_fd: int
    keeper_pid: int
    guest: str
    guest_options: dict[str, Any]
    options: dict[str, Any]
    arbiter: str
    security: dict[str, Any]
    threads: int
    copy: str
    device_state_max: int
    machine_readable: bool
    as_json: bool
    stdin_fd: int = -1  # of the keeper's standard input, for a console that is that
    trace: str = ""  # a file that was begun; "" = none
    disk_log_limit: int = 0

    def as_file(self) -> BinaryIO:
        """A file without a name, at its beginning, for subprocess's stdin; the caller closes it."""
        file = os.fdopen(os.memfd_create("colocache.config"), "w+b")
        file.write(json.dumps(dataclasses.asdict(self)).encode())
        file.seek(0)
        return file

    @classmethod
    def read(cls, file: TextIO) -> ChildConfig:
        """The same again, from such a file."""
        return cls(**json.load(file))


def main() -> None:
    """Entry of the child process."""
    config = ChildConfig.read(sys.stdin)
    die_with_parent(config.keeper_pid)
    events = Events("secondary", machine_readable=config.machine_readable)
    failover_wanted = Wakeup()
    secondary: list[Secondary] = []

    def ask_for_checkpoint() -> None:
        for one in secondary:
            one.request_checkpoint()

    actions: dict[int, Callable[[], object]] = {
        signal.SIGUSR1: ask_for_checkpoint,
        signal.SIGUSR2: failover_wanted.set,
    }
    # One that comes while this process ends must not end it by its default: the keeper would take it for killed and
    # start another. First a handler, because SIG_IGN would drop a signal that waits for us already.
    for signum in actions:
        signal.signal(signum, lambda *_: None)
    with stop_on_signals(actions) as stop:
        try:
            status = _run(config, events, stop, failover_wanted, secondary)
        except SecondaryLostError as error:
            events.emit("error", str(error))
            status = EXIT_LOAD_FAILED
        except ColocacheError as error:
            events.emit("error", str(error))
            status = EXIT_FAILED
    for signum in actions:
        signal.signal(signum, signal.SIG_IGN)
    events.close()
    if stop.signum:
        end_as_by(stop.signum)
    sys.exit(status)


def _run(
    config: ChildConfig,
    events: Events,
    stop: threading.Event,
    failover_wanted: Wakeup,
    made: list[Secondary],
) -> int:
    timing = Timing(**config.options.pop("timing"))
    options = SecondaryOptions(timing=timing, **config.options)
    security = Security(**config.security)
    wrap = make_wrap(security, pair=options.pair, role="secondary", timeout=timing.peer_timeout)
    # The memory stays open until this process ends: the keeper owns it.
    memory = Memory.from_manifest(config.manifest)
    listener = socket.socket(fileno=config.listener_fd)
    trace = Trace(config.trace, "secondary", failed=lambda sentence: events.emit("trace_error", sentence))
    guest_options = GuestOptions(**config.guest_options)
    with (
        listener,
        closing(make_front(guest_options.console, guest_options.net, takes_over=True, stdin=config.stdin_fd)) as front,
        closing(TypedInput()) as typed,
        trace,
        open_cache(memory, threads=config.threads, copy=config.copy, device_state_max=config.device_state_max) as cache,
        closing(_open_disks(config, guest_options, memory, cache, events)) as disks,
    ):
        rams = rams_of_blocks(cache.blocks.values(), memory.images, private=memory.memory_mode == "bounded")
        machine = make_machine(config.guest, rams, guest_options, cache.mark_dirty)
        machine_disks = disks_of_machine(machine)
        try:
            output = ApartOutput(front.emit, seen=front.seen, show=lambda: _show(front, events))
            if guest_options.console or guest_options.net:
                connect(machine, output, front, typed)
            secondary = Secondary(
                cache=cache,
                machine=machine,
                listener=listener,
                machine_name=machine.identity,
                options=options,
                events=events,
                stop=stop,
                arbiter=make_arbiter(config.arbiter),
                output=output,
                typed=typed,
                disks=disks,
                fold_disks=machine_disks.fold if machine_disks else lambda: True,
                wrap=wrap,
                trace=trace,
                control_fd=memory.control_fd,
                spill_fd=memory.spill_fd,
            )
            made.append(secondary)
            _obey_operator(secondary, failover_wanted)
            gc.freeze()  # a look through all that was imported would take milliseconds, in the middle of a pause
            summary = secondary.run()
        except FINAL:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it is, the memory holds the newest sealed epoch
            events.emit("error", f"the secondary's process gives up: {type(error).__name__}: {error}")
            return EXIT_AGAIN
        finally:
            machine.close()
    if config.as_json:
        events.report(dataclasses.asdict(summary))
    return EXIT_OK if summary.wrong_pages == 0 else EXIT_FAILED


def _show(front: Front, events: Events) -> None:
    """This side takes over: a console that can't be shown keeps no machine from running."""
    try:
        front.show()
    except ColocacheError as error:
        events.emit("console_error", f"nobody sees the console: {error}", error=str(error))


def open_cache(memory: Memory, *, threads: int, copy: str, device_state_max: int) -> Cache:
    """A fresh region in fresh memory; what an earlier child left, otherwise."""
    fresh = os.fstat(memory.control_fd).st_size == 0
    if not fresh:
        try:
            found = Cache.attach(memory, threads=threads, copy=copy)
        except NotColocacheError:
            pass
        else:
            if found.status().sealed_epoch or len(found.blocks) == len(memory.images):
                return found
            found.close()
        # The child before died while it made the region, or added its blocks: nothing was ever received, so the images
        # are still zero.
        os.ftruncate(memory.control_fd, 0)
    return Cache.create(memory, threads=threads, copy=copy, device_state_max=device_state_max)


def _open_disks(
    config: ChildConfig, options: GuestOptions, memory: Memory, cache: Cache, events: Events
) -> ApartDisks | NoDisks:
    """The images, which are of the newest sealed epoch afterwards: what an earlier child left is finished."""
    paths = [disk.path for disk in disks_of(options.disks)] if options.disks else []
    files = disk_files(memory.name)
    pair = str(config.options.get("pair", ""))
    mark = Mark(Was.COPYING, pair, region=memory.name, region_id=files.identity) if files else None
    disks = open_disks(paths, options.disk_log, memory.name, limit_bytes=config.disk_log_limit, mark=mark)
    try:
        for path, was in zip(paths, disks.were, strict=True):
            if was and not cache.status().sealed_epoch:
                events.emit("disk", f"{path} {was}; it takes a whole copy", path=path, mark=was.as_json())
        status = cache.status()
        disks.attach(status.sealed_epoch, status.attachment)
    except BaseException:
        disks.close()
        raise
    return disks


def _obey_operator(secondary: Secondary, wanted: Wakeup) -> None:
    """SIGUSR2 is the operator's word that the primary is dead. In a thread of its own, as the main one may be in C.

    It may have been given before this process was born: the keeper passes it on when it starts a fresh machine.
    """

    def wait() -> None:
        while True:
            wanted.wait()
            wanted.clear()
            try:
                secondary.request_failover()
            except ColocacheError as error:
                secondary.events.emit("refused", f"no takeover: {error}", reason=str(error))

    threading.Thread(target=wait, name="colocache-operator", daemon=True).start()
