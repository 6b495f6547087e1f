# SPDX-License-Identifier: Apache-2.0
"""`colocache secondary`: the keeper of a secondary's memory, and the options of the process that runs its machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from colocache.choices import COPIES, DEVICE_STATE_MAX
from colocache.commands.guest_choice import GuestChoice, chosen_guest
from colocache.commands.options import (
    arbiter_option,
    disk_log_options,
    disk_option,
    foreseen,
    guest_options,
    memory_limit_option,
    memory_option,
    memory_spill_option,
    net_options,
    pair_option,
    report_options,
    seconds_option,
    security_of,
    security_options,
    size_option,
    streams_option,
    timing_options,
    trace_option,
)

if TYPE_CHECKING:
    from colocache import Memory
    from colocache.replication.child import ChildConfig
    from colocache.replication.security import Security


@click.command()
@click.option(
    "--listen", required=True, metavar="ADDRESS", help="Where to wait for the primary: HOST:PORT or unix:PATH."
)
@pair_option
@click.option(
    "--name", default=None, help="Name of the region of shared memory; a free one is chosen if none is given."
)
@click.option("--attach", is_flag=True, help="Go on with the region NAME that a killed secondary left.")
@guest_options
@net_options
@disk_option
@disk_log_options
@memory_option
@memory_limit_option
@memory_spill_option
@click.option(
    "--threads",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="one per core",
    help="Number of threads that copy pages in a flush.",
)
@click.option(
    "--copy",
    "copy_variant",
    default="auto",
    show_default=True,
    type=click.Choice(COPIES),
    help="How the flush copies pages; auto takes what is best for this CPU.",
)
@size_option(
    "--dirty-limit",
    default="0",
    show_default="none",
    help="Ask the primary for a checkpoint when the guest has written this much memory since the last one.",
)
@size_option(
    "--device-state-max",
    most=DEVICE_STATE_MAX,
    default="64M",
    show_default=True,
    help="Largest device state that is taken from the primary.",
)
@streams_option
@timing_options
@seconds_option(
    "--reconnect-limit",
    default=1.0,
    help="How long a lost primary has to come back before this side asks its arbiter and takes over.",
)
@seconds_option(
    "--connect-limit", default=300.0, least=0.01, help="How long to wait for the primary to come for the first time."
)
@arbiter_option
@security_options
@trace_option
@report_options
@foreseen
def secondary(**given: Any) -> None:
    """Wait for a primary at ADDRESS, follow it, and take over when it is lost.

    SIGUSR1 asks the primary for a checkpoint. SIGUSR2 is the operator's word that the primary is dead: take over now.
    Exit status 0: no page was ever wrong, and the primary ended in order or this machine took over and ran on.

    If a device state does not load, the primary is told and runs on alone, and no machine starts here by itself. Memory
    that outlives its process stays as region NAME, for `--attach`: exit status 4. Other memory is held by this command,
    which waits (event `held`): SIGUSR2, the word that the primary is dead, loads the epoch into a fresh machine, which
    takes over; Ctrl-C or SIGTERM gives the memory up. A SIGUSR2 that came before the load failed does not count.

    TCP beyond this machine needs certificates; `colocache doctor --help` tells how to make them.
    """
    from colocache.children import die_with_parent, keep_to_cores
    from colocache.disk_files import KeptDiskFiles
    from colocache.disks.apart import log_paths
    from colocache.replication.address import Address
    from colocache.replication.arbiter import make_arbiter
    from colocache.replication.events import Events
    from colocache.replication.keeper import Keeper
    from colocache.replication.memory_limit import check_limit
    from colocache.replication.security import check_plain, make_wrap
    from colocache.replication.signals import end_as_by, stop_on_signals
    from colocache.replication.trace import begin_trace, end_trace
    from colocache.vmm.qemu.disk import disks_of

    if given["die_with_parent"]:
        die_with_parent(given["die_with_parent"], signal.SIGTERM)
    if given["own_cores"]:
        keep_to_cores(given["own_cores"])
    if given["attach"] and not given["name"]:
        raise click.UsageError("--attach needs --name: which region?")
    make_arbiter(given["arbiter"])  # one that can't be made is said before anything else is
    events = Events("secondary", machine_readable=given["events"])
    security = security_of(given, events.emit)
    make_wrap(security, pair=given["pair"], role="secondary", timeout=given["peer_timeout"])  # or say why not
    guest = chosen_guest(given)
    keeper: list[Keeper] = []

    def pass_on(signum: int) -> None:
        for one in keeper:
            one.pass_on(signum)

    actions: dict[int, Callable[[], object]] = {
        signum: functools.partial(pass_on, signum) for signum in (signal.SIGUSR1, signal.SIGUSR2)
    }
    if not given["attach"]:
        check_limit(given["memory_limit"], guest.blocks, guest.memory_mode, spills=bool(given["memory_spill"]))
    config = _config(given, guest, security)  # what is out of bounds is refused before anything is made
    with contextlib.ExitStack() as stack:
        stack.callback(events.close)
        if given["trace"]:
            begin_trace(given["trace"])
            stack.callback(end_trace, given["trace"])
        stop = stack.enter_context(stop_on_signals(actions))
        # The address first: a region that was attached must not go because a port is in use.
        listener, address = Address.parse(given["listen"]).listen()
        stack.callback(address.remove)
        stack.enter_context(listener)
        if not (security.certificates or security.insecure):
            check_plain(listener.family, listener.getsockname())
        memory = _memory(given, guest, stack)
        images = [disk.path for disk in disks_of(guest.options.disks)]
        logs = log_paths(images, guest.options.disk_log, memory.name) if images else ()
        blocks, spills = [image.spec for image in memory.images], memory.spill_fd >= 0 and bool(given["memory_limit"])
        check_limit(given["memory_limit"], blocks, memory.memory_mode, spills=spills)
        kept = KeptDiskFiles(memory.name, images, logs)
        if given["attach"]:
            # From here on it goes with this process, but not when its machine failed (`kept` below). Not before this: a
            # wrong option must not cost the only checkpoint that there is.
            stack.callback(memory.unlink)
        stack.enter_context(kept)
        events.emit(
            "start",
            f"guest {guest.kind} ({guest.why}); "
            f"memory {memory.backing}, {memory.memory_mode}, region {memory.name} ({memory.why})",
            guest=guest.kind,
            why=guest.why,
            backing=memory.backing,
            memory=memory.memory_mode,
            region=memory.name,
            persistent=memory.persistent,
            spill=str(memory.spill_path or ""),
        )
        events.emit("listening", f"waiting for a primary at {address}", address=str(address), pid=os.getpid())
        keeper.append(Keeper(memory, listener, config, events, stop))
        status = keeper[0].run()
        failed = status != 0 and not stop.signum
        if memory.persistent and (keeper[0].load_failed or (given["attach"] and failed)):
            # What is sealed is whole in memory; only this machine could not go on with it. A fresh one may.
            events.emit(
                "kept",
                f"its memory stays as region {memory.name}: `colocache secondary --attach --name {memory.name}` loads "
                f"it into a fresh machine, `colocache clean {memory.name}` removes it",
            )
            address.remove()
            events.close()
            os._exit(status)  # without the clean-up that would take the memory away
    if stop.signum:
        end_as_by(stop.signum)
    sys.exit(status if status >= 0 else 128 - status)


def _memory(given: dict[str, Any], guest: GuestChoice, stack: contextlib.ExitStack) -> Memory:
    """The region: fresh, which goes with this process however that ends, or one that a killed secondary left."""
    from colocache import Memory

    if not given["attach"]:
        return stack.enter_context(
            Memory.create(
                given["name"],
                guest.blocks,
                backing=guest.backing,
                memory_mode=guest.memory_mode,
                spill=given["memory_spill"] or None,
            )
        )
    memory = Memory.open(given["name"])
    stack.callback(memory.close)
    if given["memory_spill"]:
        memory.add_spill(given["memory_spill"])  # unless it has one
    return memory


def _config(given: dict[str, Any], guest: GuestChoice, security: Security) -> Any:
    from colocache.replication.child import ChildConfig
    from colocache.replication.options import SecondaryOptions, Timing

    options = SecondaryOptions(
        pair=given["pair"],
        timing=Timing(
            peer_timeout=given["peer_timeout"],
            reconnect_limit=given["reconnect_limit"],
            connect_limit=given["connect_limit"],
            run_on=given["run_on"],
        ),
        ask_at_dirty_pages=-(-given["dirty_limit"] // 4096),
        streams=given["streams"],
        memory_limit=given["memory_limit"],
        own_cores=bool(given["own_cores"]),
    )

    # Its own standard input is the configuration. Open until this process ends, for each child.
    stdin = -1
    if given["console"] == "-":
        with contextlib.suppress(OSError):  # it was started without one
            stdin = os.dup(0)

    def make(memory: Memory, listener_fd: int) -> ChildConfig:
        return ChildConfig(
            manifest=memory.manifest(),
            listener_fd=listener_fd,
            keeper_pid=os.getpid(),
            guest=guest.kind,
            guest_options=guest.as_json,
            options=dataclasses.asdict(options),
            arbiter=given["arbiter"],
            security=dataclasses.asdict(security),
            threads=given["threads"],
            copy=given["copy_variant"],
            device_state_max=given["device_state_max"],
            machine_readable=given["events"],
            as_json=given["as_json"],
            trace=given["trace"],
            stdin_fd=stdin,
            disk_log_limit=given["disk_log_limit"],
        )

    return make
