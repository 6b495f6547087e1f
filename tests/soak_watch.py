# SPDX-License-Identifier: Apache-2.0
"""A pair of real machines as the soak sees it: two processes, and events of which each must be in place.

A takeover, a restart and each checkpoint check every page against the guest's history in the processes themselves; here
it is seen that they did, and that none was wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import shutil
import time
from pathlib import Path

import soak_disk
from certificates import make_certificates
from soak_process import BROKEN_LINE, BrokenError, Event, Process

from colocache.vmm import GuestOptions, blocks_for

LATE_SECONDS_MAX = 90.0  # an event that must come did not: something hangs
PATIENT = 300.0  # a reconnect limit that no busy machine reaches
RAM_BYTES = 64 << 20
LIMIT_EVENTS = {
    "at_limit": "stood at its memory limit",
    "private_given_up": "gave up private pages for its limit",
    "spills": "spilled a checkpoint for its limit",
}
WORKING_SET_BYTES = RAM_BYTES // 2  # so much that many pages are written by one side only
QEMU_RAM_BYTES = 24 << 20  # of the small guest that needs only a QEMU


def own_pages_of_the_small_guest() -> tuple[int, int]:
    """How many pages of a QEMU's memory the small guest's history says something of, and before it has begun."""
    from colocache.vmm.qemu import guest_image as image  # only these pairs need a QEMU

    box = image.guest_image(QEMU_RAM_BYTES, GuestOptions(working_set_bytes=WORKING_SET_BYTES), kvm=False).pages
    first, n = box[image.MAILBOX_PAGE, 4:6].tolist()
    begin = image.WORK_ADDR // 4096
    unborn = (QEMU_RAM_BYTES - image.TOP_FREE) // 4096 - begin
    return len(image.CONSTANT_PAGES) + image.RING_PAGES + first + n - begin, unborn


@functools.cache
def pages_beside_guest_memory() -> int:
    """Of a QEMU with the small guest: firmware and tables, which are compared at each checkpoint too."""
    from colocache.vmm.qemu.description import describe
    from colocache.vmm.qemu.guests import guest_of

    guest = guest_of(GuestOptions(working_set_bytes=WORKING_SET_BYTES), QEMU_RAM_BYTES)
    try:
        return sum(one.n_pages for one in describe(guest.line).others)
    finally:
        guest.close()


class Counts(dict[str, int]):
    """Numbers by name."""

    def add(self, name: str, n: int = 1) -> None:
        """n more of these."""
        self[name] = self.get(name, 0) + n


class Watched:
    """A primary and a secondary on 64 MiB, or of 24 MiB in QEMUs. Everything either says is looked at."""

    def __init__(
        self,
        name: str,
        folder: Path,
        guest: str,
        backing: str,
        interval: float,
        counts: Counts,
        *,
        memory: str = "mirror",
        tls: bool = False,
        limit_bytes: int = 0,
        disk: bool = False,
        spill: str = "",
    ) -> None:
        self.name, self.counts = name, counts
        self.persistent = False  # the memory outlives its keeper
        self._ways = ["--guest", guest, "--backing", backing]
        self._memory = ["--memory", memory, *(("--memory-limit", str(limit_bytes)) if limit_bytes else ())]
        self._memory += ["--memory-spill", spill] if spill else []
        self._interval = interval
        self._folder = folder
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._seen: list[Event] = []
        self._mark = 0  # events before this one are of before the kill
        self._allowed: set[str] = set()
        self._address = f"unix:{folder / name}.socket"
        self._ram_bytes = RAM_BYTES
        specs = blocks_for(RAM_BYTES)
        self._n_pages = sum(spec.n_pages for spec in specs)  # compared at each checkpoint
        self._own_pages: tuple[int, ...] = (self._n_pages,)  # that a machine checks against its own history
        self._dirty_pages_max = WORKING_SET_BYTES // 4096 + specs[0].n_pages
        if guest == "qemu":
            self._ram_bytes = QEMU_RAM_BYTES
            self._dirty_pages_max = QEMU_RAM_BYTES // 4096
            self._n_pages = self._dirty_pages_max + pages_beside_guest_memory()
            self._own_pages = own_pages_of_the_small_guest()
        self._qemu_dies = False  # one of S's: then its firmware and tables may be gone before they are compared
        self._stack = contextlib.ExitStack()
        self._image: Path | None = None
        if disk:
            self._image = folder / f"{name}.image"
            self._image.touch()
            os.truncate(self._image, soak_disk.SIZE)
        self._certificates = Path()
        if tls:
            self._certificates = folder / f"{name}.tls"
            make_certificates(self._certificates, name)
            self._stack.callback(shutil.rmtree, self._certificates)

    # ---- its processes ----

    def close(self) -> None:
        """Nothing of it runs any more."""
        self._stack.close()

    def settle(self) -> None:
        """Look at what was said last, after all have ended."""
        for process in (self._primary, self._secondary):
            process.wait()
        for said in self._drain():
            self._look_at(said)

    def _start(self, side: str, *args: str) -> Process:
        common = [
            "--events", "--pair", self.name, *self._ways, "--ram", str(self._ram_bytes),
            "--working-set", str(WORKING_SET_BYTES), "--peer-timeout", "20",
            "--run-on", "0.2",
        ]  # fmt: skip
        if self._certificates.name:
            for option, file in (("cert", f"{side}.pem"), ("key", f"{side}.key"), ("ca", "ca.pem")):
                common += [f"--tls-{option}", str(self._certificates / file)]
        process = Process(side, [*common, *args], self._folder / f"{self.name}.{side}.log", self._inbox, self._image)
        self._stack.callback(process.close)
        return process

    def _start_secondary(self, *args: str, limit: float = PATIENT) -> None:
        after = time.monotonic_ns()
        self._secondary = self._start(
            "secondary", "--listen", self._address, "--name", self.name, *self._memory,
            "--reconnect-limit", str(limit), *args,
        )  # fmt: skip
        self.persistent = self._wait("secondary", "start", after)["persistent"]
        self._wait("secondary", "listening", after)

    def _start_primary(self, limit: float = PATIENT) -> None:
        self._primary = self._start(
            "primary", "--connect", self._address, "--interval", str(self._interval), "--verify", "all",
            "--reconnect-limit", str(limit),
        )  # fmt: skip

    # ---- its events ----

    def _drain(self) -> list[Event]:
        new = []
        with contextlib.suppress(queue.Empty):
            while True:
                new.append(self._inbox.get_nowait())
        return new

    def _look_at(self, event: Event) -> None:
        """What must hold for every event."""
        if event["event"] == BROKEN_LINE:  # an event was lost, and whoever waits for it would wait in vain
            raise BrokenError(f"the {event['side']} said something that is no event: {event['line']}")
        self._seen.append(event)
        side, name, pages = event["side"], event["event"], event.get("verified_pages", 0)
        if event.get("wrong_pages"):
            self.counts.add("wrong pages", event["wrong_pages"])
            raise BrokenError(f"{event['wrong_pages']} wrong pages: {event}")
        if name == "end" and side == "secondary":
            return  # its sum is of pages counted before
        guest_memory = (
            (self._ram_bytes // 4096,) if self._qemu_dies and (side, name) == ("secondary", "checkpoint") else ()
        )
        if pages not in (0, self._n_pages, *self._own_pages, *guest_memory) or (
            (side, name) == ("secondary", "checkpoint") and not pages
        ):
            raise BrokenError(f"{pages} of {self._n_pages} pages were verified: {event}")
        self.counts.add("pages verified", pages)
        if name in LIMIT_EVENTS:
            self.counts.add(LIMIT_EVENTS[name])
        if name in ("error", "refused", "flush_error", "alone", "takeover", "aborted") and name not in self._allowed:
            raise BrokenError(f"the {side} must not say this now: {event}")

    def _pull(self, timeout: float) -> bool:
        """Take one event, if one comes in time."""
        try:
            event = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return False
        self._look_at(event)
        return True

    def _find(self, side: str, names: tuple[str, ...], after: int) -> Event | None:
        for event in self._seen[self._mark :]:
            if event["side"] == side and event["event"] in names and event["t"] > after:
                return event
        return None

    def _wait(self, side: str, name: str, after: int) -> Event:
        """The first event `name` of `side` later than `after` (ns). BrokenError if it does not come."""
        found = self._wait_or_end(side, (name,), after)
        if found is None:
            process = self._secondary if side == "secondary" else self._primary
            raise BrokenError(f"the {side} ended with status {process.wait()} where {name!r} must come")
        return found

    def _wait_or_end(self, side: str, names: tuple[str, ...], after: int) -> Event | None:
        """The first of these events; None if the process ended without."""
        deadline = time.monotonic() + LATE_SECONDS_MAX
        while (found := self._find(side, names, after)) is None:
            if not self._pull(0.1):
                process = getattr(self, f"_{side}", None)
                if process is not None and process.ended.is_set() and self._inbox.empty():
                    return None
            if time.monotonic() > deadline:  # whatever else was said
                raise BrokenError(f"no {' or '.join(names)} of the {side} within {LATE_SECONDS_MAX:g} s")
        return found
