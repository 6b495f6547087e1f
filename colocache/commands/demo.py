# SPDX-License-Identifier: Apache-2.0
"""`colocache demo`: a pair of virtual machines, a primary killed by SIGKILL, and a takeover with every page checked."""

from __future__ import annotations

import sys
from typing import Any

import click

from colocache.choices import KILL_POINTS, TRANSPORTS
from colocache.commands.guest_choice import chosen_guest
from colocache.commands.options import (
    background_options,
    disk_option,
    foreseen,
    guest_options,
    interval_option,
    json_option,
    memory_limit_option,
    memory_option,
    memory_spill_option,
    print_json,
    resume_option,
    seconds_option,
    streams_option,
    trace_option,
    verify_option,
)


@click.command()
@guest_options
@disk_option
@memory_option
@memory_limit_option
@memory_spill_option
@click.option(
    "--checkpoints",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="How many checkpoints are taken before the primary is killed.",
)
@interval_option(0.2)
@click.option(
    "--kill-primary-at",
    type=click.Choice(KILL_POINTS),
    default="running",
    show_default=True,
    help="When the primary is killed. running: between checkpoints; receiving: half of the pages of one are sent; "
    "sealed: the secondary has just sealed one; random: at any moment.",
)
@verify_option
@seconds_option(
    "--run-on", default=0.5, least=0.01, help="How long the secondary runs on after its takeover, until the last check."
)
@seconds_option("--reconnect-limit", default=0.2, help="How long the secondary waits for a primary that it lost.")
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default="unix",
    show_default=True,
    help="Kind of socket that the two sides meet on.",
)
@streams_option
@resume_option
@background_options
@click.option("--kernel", default="", metavar="FILE", help="With --guest qemu: a Linux kernel to boot in both QEMUs.")
@click.option("--initrd", default="", metavar="FILE", help="Its initial file system.")
@click.option("--append", default="", metavar="WORDS", help="Its command line.")
@click.option(
    "--net",
    default="",
    metavar="ADDRESS/BITS",
    help="With --guest qemu and a kernel or QEMU ARGS: a network of the demo's own, in a namespace that goes with it, "
    "in which it has this address and each side a TAP device for the guest's card. Without root it is made in a user "
    "namespace, where the kernel allows that and /dev/net/tun is everybody's.",
)
@click.option(
    "--talk",
    default="",
    metavar="HOST:PORT",
    help="With --net: a server in the guest that answers each line with one that ends in it. A client of the demo's "
    "talks to it over the kill.",
)
@click.option("--seed", type=int, default=None, help="With --kill-primary-at random: the same moment again.")
@click.option(
    "--cores-apart",
    is_flag=True,
    help="Each side on its half of this machine's cores, with its guest and all its threads, as two hosts would be: "
    "what one does is not in the other's pauses. Else both use all of them.",
)
@trace_option
@json_option
@foreseen
def demo(as_json: bool, **given: Any) -> None:
    """Run a pair of machines, kill the primary, watch the secondary take over.

    Both machines run a guest that writes memory at random, each its own way. At each checkpoint the secondary is made
    equal to the primary. Then the primary is killed by SIGKILL, the secondary takes over and runs on. Exit status 0:
    it took over, ran on, and no page of its memory was ever wrong.
    """
    from colocache.replication.signals import end_as_by, stop_on_signals

    report: dict[str, Any] = {}
    guest_wrong = ""
    with stop_on_signals() as stop:
        # Imported here: from now on Ctrl-C is heard in order.
        from colocache.demo import network
        from colocache.demo.run import DemoError, DemoOptions, DemoRun
        from colocache.demo.table import DemoTable

        net, talk = given["net"], given["talk"]
        guest = chosen_guest({**given, "command": _command(given), "net": net, "mac": "", "pair": "demo"})
        if talk and not net:
            raise click.UsageError("--talk needs --net: how would the guest be reached?")
        if net:
            network.check(net, talk)
            network.enter()
        options = DemoOptions(
            guest=guest.kind,
            ram_bytes=sum(block.len_bytes for block in guest.blocks),
            working_set_bytes=given["working_set"],
            steps_per_second=given["steps_per_second"],
            backing=guest.backing,
            memory_mode=guest.memory_mode,
            memory_limit=given["memory_limit"],
            memory_spill=given["memory_spill"],
            checkpoints=given["checkpoints"],
            interval=given["interval"],
            kill_at=given["kill_primary_at"],
            verify=given["verify"],
            run_on=given["run_on"],
            reconnect_limit=given["reconnect_limit"],
            transport=given["transport"],
            seed=given["seed"],
            streams=given["streams"],
            accel=given["accel"],
            console=given["console"],
            command=guest.options.command,
            disks=guest.options.disks,
            net=net,
            talk=talk,
            trace=given["trace"],
            resume_at=given["resume_at"],
            background=given["background"],
            round_delay=given["round_delay"],
            round_pages=given["round_pages"],
            cores_apart=given["cores_apart"],
        )
        title = f"colocache demo: {options.ram_bytes >> 20} MiB, a checkpoint every {options.interval:g} s"
        try:
            with DemoTable(options.checkpoints, title=title) as table:
                run = DemoRun(options, stop, on_event=table.add, on_note=table.note)
                report = run.run()
                guest_wrong = run.guest_report.wrong if run.guest_report else ""
        except DemoError:
            if not stop.signum:
                raise
    if stop.signum:
        end_as_by(stop.signum)
    if as_json:
        print_json(report)
    else:
        click.echo(_in_words(report, guest_wrong))
    sys.exit(1 if report["wrong_pages"] or guest_wrong else 0)


def _command(given: dict[str, Any]) -> tuple[str, ...]:
    """The QEMU command line: the user's own, one for the kernel that was given, or none."""
    parts = {name: given[name] for name in ("kernel", "initrd", "append") if given[name]}
    if not parts or given["command"]:
        if parts:
            raise click.UsageError("give --kernel, --initrd and --append, or a command line after `--`, not both")
        return tuple(given["command"])
    if "kernel" not in parts:
        raise click.UsageError("--initrd and --append need --kernel")
    from colocache.vmm.qemu.guests import linux_command

    return linux_command(given["ram"], given["accel"], parts)


def _world(report: dict[str, Any]) -> str:
    """What the world saw of a reference guest."""
    world = report.get("world")
    if not world:
        return ""
    return (
        f"the world saw {world['lines']:,} lines of the guest over the kill, each when its epoch was sealed: "
        f"{world['steps_missing']} steps missing, {world['steps_again']} told again\n"
    )


def _guest_report(report: dict[str, Any]) -> str:
    """What a guest that checks itself said."""
    said = report.get("guest_report")
    if not said:
        return ""
    return (
        f"the guest, which checks itself (programs: {said['programs']}), reported {said['ok']:,} times that all is "
        f"well, {said['ok_after']:,} of them after the takeover, and {said['bad']:,} times that something is not\n"
    )


def _client(report: dict[str, Any]) -> str:
    """What a client of the guest's saw, and what it waited for."""
    client = report.get("client")
    if not client:
        return ""
    held, alone = client["latency_ms"], client["latency_alone_ms"]
    again = f", {client['told_again']} told again" if client["told_again"] else ""
    return (
        f"a client talked to the guest over the kill ({client['over']}): {client['replies']:,} answers, "
        f"{client['after_takeover']} of them after the takeover, {client['wrong']} wrong, {client['missing']} missing"
        f"{again}; the longest gap was {client['longest_gap_ms']:.0f} ms\n"
        f"it waited {held['p50']:.1f} ms (p50), {held['p99']:.1f} (p99) for an answer that was held until its epoch "
        f"was sealed, and {alone['p50']:.1f}, {alone['p99']:.1f} when the machine ran alone\n"
    )


def _in_words(report: dict[str, Any], guest_wrong: str) -> str:
    """The report for people."""
    failover, pause, primary = report["failover"], report["pause_ms"], report["pvm_pause_ms"]
    detect = failover["detect_ms"]
    limit = report.get("memory_limit")
    limited = (
        ""
        if limit is None
        else (
            f"memory beside the image: at most {limit['peak_bytes'] / 1e6:.1f} MB at a checkpoint, the limit is "
            f"{limit['bytes'] / 1e6:.1f}; asked for {limit['asked']} checkpoints, private pages given up "
            f"{limit['private_given_up']} times, spilled at most {limit['spilled_peak_bytes'] / 1e6:.1f} MB in "
            f"{limit['spilled_epochs']} epochs, the secondary's machine stood {limit['stood_ms']['max']:.1f} ms "
            f"(max), the primary's {limit['pvm_stood_ms']['max']:.1f} before its pause\n"
        )
    )
    verdict = "FAILED: the secondary's memory was wrong"
    if not report["wrong_pages"]:
        verdict = "OK: the secondary took over and every page was right"
        if guest_wrong:
            verdict = f"FAILED: {guest_wrong}"
    noticed = f"noticed after {detect:.1f} ms, " if detect is not None else ""
    return (
        f"{report['checkpoints']} checkpoints of a {report['guest']} guest with {report['ram_bytes'] >> 20} MiB on "
        f"{report['backing']}, memory {report['memory']}, flushed by {report['flush']}\n"
        f"flushed {report['flushed_pages']:,} pages: {report['pvm_pages']:,} written by the primary only, "
        f"{report['svm_pages']:,} by the secondary only, {report['both_pages']:,} by both; "
        f"{report['flush_gb_per_s']:.1f} GB/s\n"
        f"secondary's pause {pause['p50']:.2f} ms (p50), {pause['p99']:.2f} (p99), {pause['max']:.2f} (max); "
        f"primary's {primary['p50']:.2f}, {primary['p99']:.2f}, {primary['max']:.2f}\n"
        f"{limited}"
        f"stages of the secondary's in ms, p50/p99/max: {_stages(report['stages_ms'])}\n"
        f"stages of the primary's, which runs again at {report['resume_at'].upper()}: "
        f"{_stages(report['pvm_stages_ms'])}\n"
        f"the primary's guest did {report['pvm_steps_per_s']:,.0f} steps a second meanwhile\n"
        f"primary killed ({report['kill_primary_at']}): {failover['cause']}; {noticed}"
        f"took over at epoch {failover['epoch']} within {failover['promote_ms']:.2f} ms of the decision, "
        f"ran on for {failover['steps_run_on']:,} steps\n"
        f"{_folded(failover)}"
        f"{_world(report)}"
        f"{_client(report)}"
        f"{_guest_report(report)}"
        f"{report['verified_pages']:,} pages verified, {report['wrong_pages']} wrong\n"
        f"{verdict}"
    )


def _folded(failover: dict[str, Any]) -> str:
    if failover["folded_bytes"] is None:
        return ""
    return (
        f"{failover['folded_bytes'] / 1e6:.1f} MB of its private pages went into the image, standing at most "
        f"{failover['fold_longest_ms']:.1f} ms at a time\n"
    )


def _stages(of: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {one['p50']:.2f}/{one['p99']:.2f}/{one['max']:.2f}" for name, one in of.items())
