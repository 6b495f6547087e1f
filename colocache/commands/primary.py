# SPDX-License-Identifier: Apache-2.0
"""`colocache primary`: a virtual machine that keeps its secondary in step."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
from typing import Any

import click

from colocache.commands.guest_choice import chosen_guest
from colocache.commands.options import (
    arbiter_option,
    background_options,
    disk_option,
    foreseen,
    guest_options,
    interval_option,
    net_options,
    pair_option,
    print_json,
    report_options,
    resume_option,
    seconds_option,
    security_of,
    security_options,
    size_option,
    streams_option,
    timing_options,
    trace_option,
    verify_option,
)


@click.command()
@click.option(
    "--connect", required=True, metavar="ADDRESS", help="Where the secondary listens: HOST:PORT or unix:PATH."
)
@pair_option
@guest_options
@net_options
@disk_option
@size_option(
    "--disk-speed",
    default="0",
    show_default="as fast as it goes",
    help="The most bytes a second that the first copy of the disks may take.",
)
@interval_option(0.5)
@click.option(
    "--checkpoints",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="End after this many checkpoints; 0 = go on until stopped.",
)
@size_option(
    "--dirty-limit",
    default="0",
    show_default="none",
    help="Take a checkpoint before its time when the guest has written this much memory since the last one.",
)
@background_options
@resume_option
@click.option(
    "--output-delay",
    type=click.FloatRange(0, 86_400_000),
    default=0.0,
    show_default="until the next checkpoint",
    metavar="MS",
    help="The longest that output may be held before a checkpoint is taken for it, in milliseconds. With a long "
    "--interval an idle pair then takes few checkpoints, and a busy one answers fast.",
)
@verify_option
@streams_option
@timing_options
@seconds_option(
    "--reconnect-limit",
    default=10.0,
    help="How long to try to reconnect to a secondary that was lost, before the arbiter is asked.",
)
@seconds_option(
    "--connect-limit", default=30.0, least=0.01, help="How long to try to reach the secondary for the first time."
)
@arbiter_option
@click.option(
    "--rejoin",
    is_flag=True,
    help="If the secondary is gone for good, let a fresh one at ADDRESS take its place. This is your consent to give "
    "the old one up: it must never take over, and the arbiter is asked to see to that.",
)
@security_options
@trace_option
@report_options
@click.option("--hold", is_flag=True, hidden=True)
@click.option("--hash-at", type=int, default=0, hidden=True)
@click.option("--die-at", default="", hidden=True)
@click.option("--die-at-checkpoint", type=int, default=0, hidden=True)
@foreseen
def primary(**given: Any) -> None:
    """Run a primary virtual machine and keep the secondary at ADDRESS in step.

    SIGUSR1 takes a checkpoint at once. Ctrl-C ends both sides in order. Exit status 0: it ended in order, and
    every page of its memory was what the guest's history says.

    TCP beyond this machine needs certificates; `colocache doctor --help` tells how to make them.
    """
    from colocache import RamImage, Sender
    from colocache.children import die_with_parent, keep_to_cores
    from colocache.demo.checks import Checks
    from colocache.disks.mirrored import MirroredDisks
    from colocache.outputs.connect import connect
    from colocache.outputs.fronts import make_front
    from colocache.outputs.held import HeldOutput
    from colocache.outputs.typed import TypedInput
    from colocache.replication.address import Address
    from colocache.replication.arbiter import make_arbiter
    from colocache.replication.blocks import rams_of_images
    from colocache.replication.events import Events
    from colocache.replication.mirrors import Mirrors, NoMirrors
    from colocache.replication.options import PrimaryOptions, Timing
    from colocache.replication.primary import Primary
    from colocache.replication.security import make_wrap
    from colocache.replication.signals import end_as_by, stop_on_signals
    from colocache.replication.trace import Trace, begin_trace, end_trace
    from colocache.vmm.guests import disks_of_machine, make_machine

    if given["die_with_parent"]:
        die_with_parent(given["die_with_parent"], signal.SIGTERM)
    if given["own_cores"]:
        keep_to_cores(given["own_cores"])
    address = Address.parse(given["connect"])
    options = PrimaryOptions(
        pair=given["pair"],
        timing=Timing(
            peer_timeout=given["peer_timeout"],
            reconnect_limit=given["reconnect_limit"],
            connect_limit=given["connect_limit"],
            run_on=given["run_on"],
        ),
        interval=given["interval"],
        checkpoints=given["checkpoints"],
        background=given["background"],
        round_delay=given["round_delay"],
        output_delay=given["output_delay"] / 1e3,
        round_pages=given["round_pages"],
        dirty_limit_pages=-(-given["dirty_limit"] // 4096),
        streams=given["streams"],
        rejoin=given["rejoin"],
        resume_at=given["resume_at"],
        own_cores=bool(given["own_cores"]),
    )
    arbiter = make_arbiter(given["arbiter"])
    events = Events("primary", machine_readable=given["events"])
    security = security_of(given, events.emit)
    wrap = make_wrap(security, pair=given["pair"], role="primary", timeout=given["peer_timeout"])
    guest = chosen_guest(given)
    if given["trace"]:
        begin_trace(given["trace"])
    made: list[Primary] = []

    def request_checkpoint() -> None:
        for one in made:
            one.request_checkpoint()

    with contextlib.ExitStack() as stack:
        stack.callback(events.close)
        stop = stack.enter_context(stop_on_signals({signal.SIGUSR1: request_checkpoint}))
        images = [stack.enter_context(RamImage.create(spec, guest.backing)) for spec in guest.blocks]
        sender = stack.enter_context(Sender())
        for image in images:
            sender.add_block(image.spec.name, image.addr, image.spec.len_bytes, image.spec.page_size)

        def mark_dirty(block: int, first_pfn: int, n_pages: int) -> None:
            made[0].mark_dirty(block, first_pfn, n_pages)

        if given["trace"]:
            stack.callback(end_trace, given["trace"])
        trace = stack.enter_context(
            Trace(given["trace"], "primary", failed=lambda sentence: events.emit("trace_error", sentence))
        )
        front = make_front(guest.options.console, guest.options.net)
        front.show()
        stack.callback(front.close)
        machine = make_machine(guest.kind, rams_of_images(images), guest.options, mark_dirty)
        stack.callback(machine.close)
        backing = images[0].backing
        sentence = f"guest {guest.kind} ({guest.why}), memory {backing}"
        events.emit("start", sentence, guest=guest.kind, backing=backing, why=guest.why)
        output = HeldOutput(front.emit, on_full=request_checkpoint, origin=front.origin)
        typed = TypedInput(live=True, on_full=request_checkpoint)
        stack.callback(typed.close)
        if guest.options.console or guest.options.net:
            connect(machine, output, front, typed)
        disks = disks_of_machine(machine)
        mirrors = (
            Mirrors(disks, MirroredDisks(disks.sizes, on_full=request_checkpoint), events, speed=given["disk_speed"])
            if disks
            else NoMirrors()
        )
        made.append(
            Primary(
                address=address,
                machine=machine,
                sender=sender,
                machine_name=machine.identity,
                options=options,
                events=events,
                stop=stop,
                arbiter=arbiter,
                observer=Checks(
                    events,
                    verify=given["verify"],
                    hash_at=given["hash_at"] or given["checkpoints"],
                    die_at=given["die_at"],
                    die_at_checkpoint=given["die_at_checkpoint"],
                    hold=given["hold"],
                ),
                output=output,
                typed=typed,
                mirrors=mirrors,
                wrap=wrap,
                trace=trace,
            )
        )
        gc.freeze()  # a look through all that was imported would take milliseconds, in the middle of a pause
        summary = made[0].run()
    if given["as_json"]:
        print_json(dataclasses.asdict(summary))
    if stop.signum:
        end_as_by(stop.signum)
    if summary.alone or summary.wrong_pages:
        raise SystemExit(1)
