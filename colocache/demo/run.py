# SPDX-License-Identifier: Apache-2.0
"""The demo's director: starts both sides as processes of their own, follows their events, kills the primary, and sees
the secondary take over."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colocache import list_regions, scratch
from colocache.demo import network
from colocache.demo.console import ConsoleTail
from colocache.demo.images import images_for
from colocache.demo.meeting import meeting_place
from colocache.demo.room import check_pair_fits
from colocache.demo.side import END_SECONDS, Side
from colocache.demo.talk import Client, ConsoleClient, TcpClient
from colocache.demo.tally import Tally
from colocache.demo.world import GuestReport, guest_report, told_steps
from colocache.errors import ColocacheError
from colocache.replication.memory_limit import check_limit
from colocache.replication.signals import Stop
from colocache.replication.trace import begin_trace, read_trace, write_trace
from colocache.spill import check_folder
from colocache.vmm.guests import blocks_for, guest_kind_available

QUIET_SECONDS_MAX = 120.0  # without any event: something hangs
SLICE_SECONDS = 0.1
ANSWER_SECONDS = 2.0  # a machine that ran on for so long has answered what was asked before


class DemoError(ColocacheError):
    """The demo did not show what it claims."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo was asked for. Sizes in bytes, times in seconds."""

    guest: str = "auto"
    ram_bytes: int = 256 << 20
    working_set_bytes: int = 0
    steps_per_second: float = 20000.0
    backing: str = "auto"
    memory_mode: str = "mirror"
    memory_limit: int = 0
    memory_spill: str = ""
    checkpoints: int = 20
    interval: float = 0.2
    kill_at: str = "running"
    verify: str = "all"
    run_on: float = 0.5
    reconnect_limit: float = 0.2
    peer_timeout: float = 2.0
    transport: str = "unix"
    seed: int | None = None
    streams: int = 1
    accel: str = "auto"
    console: str = ""
    command: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()  # as --disk has them; the primary's
    resume_at: str = "received"
    background: bool = True
    round_delay: float = 0.0
    round_pages: int = 0
    net: str = ""  # this host's address on the guest's network, with its length: 10.9.0.1/24; "" = none
    talk: str = ""  # HOST:PORT of a server in the guest that answers each line with one that ends in it
    trace: str = ""  # a file for the stages of both sides; "" = none
    cores_apart: bool = False  # each side runs on its half of this machine's cores, with all its threads


def _halves() -> tuple[frozenset[int], frozenset[int]]:
    """The primary's and the secondary's cores. DemoError: there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise DemoError("--cores-apart needs two cores, and this process may use one: leave it out")
    half = len(cores) // 2
    return frozenset(cores[:half]), frozenset(cores[half:])


def _disk_args(disks: Iterable[str]) -> list[str]:
    return [word for disk in disks for word in ("--disk", disk)]


class DemoRun:
    """One run. `on_event` sees every event as it comes, `on_note` what the demo itself does."""

    def __init__(
        self,
        options: DemoOptions,
        stop: Stop,
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.options = options
        self.tally = Tally()
        self._stop = stop
        self._on_event = on_event
        self._on_note = on_note
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._random = random.Random(options.seed)  # noqa: S311 -- when to kill is no secret
        self._seen: dict[tuple[str, str], dict[str, Any]] = {}
        self._killed_ns: int | None = None
        self._console: ConsoleTail | ConsoleClient | None = None
        self._client: Client | None = None
        self._in_step_ns = 0  # when the first checkpoint was through
        self._shows_console = False
        self._taken_over_at = 0  # bytes of the console that came before the takeover
        self.guest_report: GuestReport | None = None
        self._images: list[str] = []  # of the secondary's disks
        self._traces = ""  # a folder for those of both sides
        self._name = f"demo-{os.getpid()}-{secrets.token_hex(3)}"  # of the region, the pair and the socket's folder
        # At a random moment: after one of the checkpoints, chosen here, and a part of an interval.
        self._kill_after = options.checkpoints
        self._kill_delay = 0.0
        if options.kill_at == "random":
            self._kill_after = self._random.randint(1, options.checkpoints)
            self._kill_delay = self._random.uniform(0, 1.5 * options.interval)

    def run(self) -> dict[str, Any]:
        """From start to end: the report. DemoError: something was not as claimed, or a side failed."""
        begin = time.monotonic()
        kind, _ = guest_kind_available(self.options.guest)
        blocks, spill = blocks_for(self.options.ram_bytes, kind), self.options.memory_spill
        check_limit(self.options.memory_limit, blocks, self.options.memory_mode, spills=bool(spill))
        if spill:
            check_folder(spill)
        check_pair_fits(self.options.backing, blocks_for(self.options.ram_bytes, kind), self.options.memory_mode)
        with contextlib.ExitStack() as stack:
            self._shows_console = kind == "qemu" or bool(self.options.console)
            self._images = stack.enter_context(images_for(self.options.disks))
            self._console = stack.enter_context(self._make_console(kind))
            if self.options.net:
                network.make(self.options.net)
            if self.options.talk:
                self._client = stack.enter_context(TcpClient(*network.server(self.options.talk)))
            address = stack.enter_context(meeting_place(self._name, self.options.transport))
            if self.options.trace:
                begin_trace(self.options.trace)  # before a machine runs for a file that can't be written
                self._traces = str(stack.enter_context(scratch.folder("trace")))
                stack.callback(self._join_traces)
            ours, theirs = _halves() if self.options.cores_apart else (frozenset(), frozenset())
            secondary = Side("secondary", self._secondary_args(address), self._events, theirs)
            stack.callback(secondary.close)
            address = str(self._until("secondary", "listening", [secondary])["address"])
            primary = Side("primary", self._primary_args(address), self._events, ours)
            stack.callback(primary.close)
            self._kill(primary, secondary)
            self._until("secondary", "end", [secondary])
            status = secondary.wait(END_SECONDS)
            if status and not self.tally.wrong_pages:  # wrong pages are what the report is for
                raise DemoError(f"the secondary ended with status {status}: {secondary.last_words()}")
            world = told_steps(self._console.whole()) if kind != "qemu" and self._console.is_file else None
            self.guest_report = guest_report(self._console.whole(), self._taken_over_at)
        client = self._client.answers.report(*self._moments()) if self._client else None
        start = self._seen["secondary", "start"]
        report = {
            "guest": start["guest"],
            "backing": start["backing"],
            "memory": start["memory"],
            "flush": "copy",  # the one strategy that there is
            "ram_bytes": self.options.ram_bytes,
            **self.tally.report(self._killed_ns),
            **(
                {"memory_limit": self.tally.memory.report(self.options.memory_limit)}
                if self.options.memory_limit
                else {}
            ),
            **({"disks": self.tally.disks.report()} if self.options.disks else {}),
            **({"world": world} if world else {}),
            **({"client": {"over": self._client.over, **client}} if self._client and client else {}),
            **({"guest_report": self.guest_report.as_json()} if self.guest_report else {}),
            "kill_primary_at": self.options.kill_at,
            "verify": self.options.verify,
            "resume_at": self.options.resume_at,
            "seconds": round(time.monotonic() - begin, 3),
        }
        self._check(report)
        return report

    def _make_console(self, kind: str) -> ConsoleTail | ConsoleClient:
        """The small QEMU guest's is talked at, unless its user wants it elsewhere."""
        if kind == "qemu" and not (self.options.command or self.options.console):
            self._client = ConsoleClient()
            return self._client
        return ConsoleTail(self.options.console)

    def _moments(self) -> tuple[int, int, int]:
        """When the pair was in step, its primary was killed, its secondary ran; CLOCK_MONOTONIC in ns."""
        promoted = self._seen.get(("secondary", "promoted"), {"t": 0})
        return self._in_step_ns, self._killed_ns or 0, int(promoted["t"])

    # ---- the two sides ----

    def _common_args(self) -> list[str]:
        o = self.options
        return [
            "--events", "--pair", self._name, "--guest", o.guest, "--ram", str(o.ram_bytes), "--backing", o.backing,
            "--working-set", str(o.working_set_bytes), "--steps-per-second", str(o.steps_per_second),
            "--run-on", str(o.run_on), "--peer-timeout", str(o.peer_timeout), "--streams", str(o.streams),
            "--accel", o.accel, "--console", self._console.path if self._console else "",
        ]  # fmt: skip

    def _trace_args(self, side: str) -> list[str]:
        return ["--trace", self._trace_of(side)] if self._traces else []

    def _trace_of(self, side: str) -> str:
        return f"{self._traces}/{side}"

    def _join_traces(self) -> None:
        """Both sides ended: their clocks are one, and so is the file."""
        sides = [self._trace_of(side) for side in ("primary", "secondary")]
        events = [event for path in sides if Path(path).exists() for event in read_trace(path)]
        write_trace(self.options.trace, events)

    def _secondary_args(self, address: str) -> list[str]:
        limit = str(self.options.reconnect_limit)
        limits = ["--reconnect-limit", limit, "--connect-limit", "60"]
        memory = ["--memory", self.options.memory_mode, "--memory-limit", str(self.options.memory_limit)]
        memory += ["--memory-spill", self.options.memory_spill] if self.options.memory_spill else []
        args = [*self._common_args(), *self._trace_args("secondary"), "--listen", address, "--name", self._name]
        more = [*_disk_args(self._images), *self._net_args("secondary")]
        return self._with_command([*args, *memory, *limits, *more])

    def _primary_args(self, address: str) -> list[str]:
        o = self.options
        args = [*self._common_args(), *self._trace_args("primary"), "--connect", address]
        args += ["--interval", str(o.interval), "--verify", o.verify, "--resume-at", o.resume_at]
        args += self._net_args("primary")
        args += ["--background" if o.background else "--no-background"]
        args += ["--round-delay", str(o.round_delay), "--round-pages", str(o.round_pages)]
        args += _disk_args(o.disks)
        if o.kill_at in ("receiving", "sealed"):
            number = o.checkpoints + 1
            last = o.checkpoints if o.kill_at == "receiving" else number
            args += ["--die-at", o.kill_at, "--die-at-checkpoint", str(number), "--hash-at", str(last)]
        elif o.kill_at == "random":
            args += ["--hash-at", str(self._kill_after)]
        else:
            args += ["--checkpoints", str(o.checkpoints), "--hold"]
        return self._with_command(args)

    def _net_args(self, side: str) -> list[str]:
        return ["--net", f"tap:{network.TAPS[side]}"] if self.options.net else []

    def _with_command(self, args: list[str]) -> list[str]:
        return [*args, "--", *self.options.command] if self.options.command else args

    # ---- the course of events ----

    def _next(self, sides: list[Side], deadline: float) -> dict[str, Any] | None:
        """The next event of either side; None if there was none for a moment."""
        if self._stop.is_set():
            raise DemoError("stopped")
        for line in self._console.lines() if self._console and self._shows_console else ():
            self._on_event({"event": "console", "side": "guest", "sentence": line})
        try:
            event = self._events.get(timeout=SLICE_SECONDS)
        except queue.Empty:
            for side in sides:
                if side.ended.is_set() and self._events.empty():
                    status = side.wait(END_SECONDS)
                    raise DemoError(f"the {side.name} ended with status {status}: {side.last_words()}") from None
            if time.monotonic() > deadline:
                raise DemoError(f"nothing happened for {QUIET_SECONDS_MAX:g} s") from None
            return None
        self._seen[event["side"], event["event"]] = event
        if event["event"] == "takeover" and self._console is not None:
            self._taken_over_at = self._console.n_bytes()
        if event["event"] == "checkpoint" and not self._in_step_ns:
            self._in_step_ns = int(event["t"])
        self.tally.add(event)
        self._on_event(event)
        if event["event"] == "held":  # its operator would have to come, and there is none
            raise DemoError(f"the secondary's machine is lost: {event['sentence']}")
        return event

    def _until(self, side: str, name: str, sides: list[Side]) -> dict[str, Any]:
        """Follow events until `name` of `side`; `sides` are those that must not end before."""
        deadline = time.monotonic() + QUIET_SECONDS_MAX
        while (side, name) not in self._seen:
            if self._next(sides, deadline) is not None:
                deadline = time.monotonic() + QUIET_SECONDS_MAX
        return self._seen[side, name]

    def _kill(self, primary: Side, secondary: Side) -> None:
        """Let the primary die at the wanted point."""
        both = [primary, secondary]
        if self.options.kill_at in ("receiving", "sealed"):
            self._killed_ns = int(self._until("primary", "dying", both)["t"])
            self._on_note(f"the primary killed itself by SIGKILL: {self.options.kill_at}")
            return
        if self.options.kill_at == "running":
            self._until("primary", "holding", both)
        else:
            while self.tally.checkpoints < self._kill_after:
                self._next(both, time.monotonic() + QUIET_SECONDS_MAX)
            until = time.monotonic() + self._kill_delay
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, SLICE_SECONDS))
        self._killed_ns = time.monotonic_ns()
        primary.process.send_signal(signal.SIGKILL)
        self._on_note("killed the primary by SIGKILL")

    # ---- the verdict ----

    def _check(self, report: dict[str, Any]) -> None:
        """Exit status 0 claims a takeover, no wrong page, and nothing left behind."""
        o = self.options
        failover = report["failover"]
        if failover is None:
            raise DemoError("the secondary ended without taking over")
        if report["wrong_pages"]:
            return  # reported with its numbers; the command's exit status says the rest
        world = report.get("world")
        if world and (not world["lines"] or world["steps_missing"] or world["steps_again"]):
            raise DemoError(
                f"the world saw {world['lines']} lines of the guest, with {world['steps_missing']} steps missing and "
                f"{world['steps_again']} told again"
            )
        client = report.get("client")
        if client and (client["wrong"] or client["error"] or (client["missing"] and o.run_on >= ANSWER_SECONDS)):
            raise DemoError(
                f"the client had {client['replies']} answers, {client['wrong']} wrong and {client['missing']} missing"
                + (f": {client['error']}" if client["error"] else "")
            )
        wanted = self._kill_after
        if report["checkpoints"] < wanted:
            raise DemoError(f"{report['checkpoints']} checkpoints were done, {wanted} were wanted")
        if o.kill_at == "sealed" and report["checkpoints"] != wanted + 1:
            raise DemoError(
                f"the primary was told RECEIVED of its checkpoint {wanted + 1} and the secondary finished only "
                f"{report['checkpoints']}"
            )
        if not self.tally.ran_on or not self.tally.ran_on["steps"]:
            raise DemoError("the machine did not run on after the takeover")
        if any(region.name == self._name for region in list_regions()):
            raise DemoError(f"region {self._name} was left behind: `colocache clean {self._name}` removes it")
