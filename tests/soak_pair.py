# SPDX-License-Identifier: Apache-2.0
"""One pair of real machines, killed again and again, and what must be true after each kill.

What attach must find is told by the region itself, read from outside while nobody owns it; what the primary was told
(RECEIVED, and so output that the world saw) is told by its events.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soak_process import BrokenError, Event, Found, Region, child_of, children_of, wait_dead
from soak_watch import LATE_SECONDS_MAX, PATIENT, Counts, Watched

from colocache import clean
from colocache.children import python_command

AIM_SECONDS_MAX = 20.0
MOMENTS = ("any", "event", "receiving", "sealed", "committed")
ENDS = ("primary", "primary, operator", "both", "both and keeper", "keeper for good", "primary, too early")
LIMITS = (
    36 << 20,
    44 << 20,
)  # bytes: all that the primary may have written while its secondary was away, and hardly more


SPILL_LIMITS = (4 << 20, 12 << 20)  # far less than that, so that checkpoints go on in a file


@dataclass(frozen=True)
class Plan:
    """What becomes of a pair: some kills of the secondary, then one that ends the pair."""

    guest: str
    backing: str
    memory: str
    middle: int
    end: str
    interval: float
    tls: bool
    limit_bytes: int  # what the secondary may take beside its image; 0 = any
    disk: bool
    spill: str  # the folder of its spill file; "" = none

    @classmethod
    def draw(
        cls,
        rng: random.Random,
        guest: str,
        backing: str,
        memory: str = "mirror",
        *,
        tls: bool = False,
        disk: bool = False,
        spill: str = "",
    ) -> Plan:
        """One at random."""
        end = rng.choices(ENDS, weights=(8, 7, 3, 3, 1, 1))[0]
        middle = 0 if end in ("primary, too early", "keeper for good") else rng.randint(1, 8)
        if end == "primary" and rng.random() < 0.5:
            middle = 0  # these have a short reconnect limit, and so the arbiter is asked
        interval = rng.choice((0.02, 0.02, 0.04, 0.12))
        bounded = memory == "bounded" and guest != "qemu"
        spill = spill if bounded else ""
        limit = rng.choice(SPILL_LIMITS if spill else LIMITS) if spill or (bounded and rng.random() < 0.5) else 0
        return cls(guest, backing, memory, middle, end, interval, tls, limit, disk, spill)

    @property
    def asks_arbiter(self) -> bool:
        """The secondary takes over because the primary stays away, not because its operator says so."""
        return self.end == "primary" and not self.middle


class Pair(Watched):
    """A pair with what becomes of it. `claim` says whether one more kill is wanted."""

    def __init__(
        self, name: str, plan: Plan, rng: random.Random, folder: Path, counts: Counts, claim: Callable[[], bool]
    ) -> None:
        super().__init__(
            name, folder, plan.guest, plan.backing, plan.interval, counts,
            memory=plan.memory, tls=plan.tls, limit_bytes=plan.limit_bytes, disk=plan.disk,
            spill=plan.spill,
        )  # fmt: skip
        self.plan, self.rng = plan, rng
        self.moment = "start"  # for the report of a failure
        self._claim = claim
        self._child = 0  # the process that runs the secondary's machine

    # ---- from the first checkpoint to the last kill ----

    def run(self) -> None:
        """Kill until the plan is done or no more kills are wanted. BrokenError."""
        plan = self.plan
        alone = plan.end == "keeper for good"
        # One that has nothing sealed waits for its primary as for the first time.
        early = ("--connect-limit", "10") if plan.end == "primary, too early" else ()
        # If it has sealed epoch 1 after all, before the kill came, it takes over after that time.
        self._start_secondary(*early, limit=0.1 if plan.asks_arbiter else 0.3 if early else PATIENT)
        self._region = Region(self.name)
        self._stack.callback(self._region.close)
        begin = time.monotonic_ns()
        self._start_primary(limit=0.2 if alone else PATIENT)
        self._wait("primary", "connected", begin)
        if plan.end == "primary, too early":
            if self._claim():
                self._kill_primary_early()
            else:
                self._end_in_order()
            return
        if plan.middle and self.rng.random() < 0.3 and self._claim():
            self.moment = "before epoch 1"
            time.sleep(self.rng.uniform(0, 0.3))
            self._child = child_of(self._secondary.pid)
            self._kill_secondary()
        self._wait("secondary", "checkpoint", begin)
        for _ in range(plan.middle):
            if not self._claim():
                break
            self._aim(self.rng.choice(MOMENTS))
            if self.plan.guest == "qemu" and self.rng.random() < 0.4:
                self._kill_qemu()
            elif self.persistent and self.rng.random() < 0.15:
                self._kill_keeper()
            else:
                self._kill_secondary()
        else:
            if self._claim():
                self._kill_at_the_end()
                return
        self._end_in_order()

    def _aim(self, moment: str) -> None:
        """Wait for a moment to kill at."""
        self._mark = len(self._seen)
        self._child = child_of(self._secondary.pid)  # now, because a kill in a flush of 2 ms must not look for it
        if moment == "any":
            delay = self.rng.uniform(0, 4 * self.plan.interval)
        elif moment == "event":
            self._pull(LATE_SECONDS_MAX)
            delay = self.rng.uniform(0, 0.03)
        else:
            found = self._region.found()
            deadline = time.monotonic() + AIM_SECONDS_MAX
            now = found
            while now is not None and found is not None and time.monotonic() < deadline:
                now = self._region.found()
                if now is not None and (
                    (moment == "receiving" and now.receiving > now.sealed)
                    or (moment == "sealed" and now.sealed > now.committed)
                    or (moment == "committed" and now.committed > found.committed)
                ):
                    break
                time.sleep(0.0001)
            delay = self.rng.choice((0, self.rng.uniform(0, 0.002), self.rng.uniform(0, 0.02)))
        self.moment = f"{moment}, {delay * 1e3:.2f} ms later"
        time.sleep(delay)

    # ---- the secondary dies ----

    def _kill_child(self) -> Found | None:
        """SIGKILL the process that runs the secondary's machine; what it left. Its keeper looks away meanwhile."""
        keeper, child = self._secondary.pid, self._child
        os.kill(keeper, signal.SIGSTOP)
        try:
            if child:
                os.kill(child, signal.SIGKILL)
                wait_dead(child)
            return self._region.found()
        finally:
            os.kill(keeper, signal.SIGCONT)

    def _kill_secondary(self) -> None:
        killed = time.monotonic_ns()
        found = self._kill_child()
        self.counts.add("kills: secondary")
        self._wait("secondary", "restarted", killed)
        if self.rng.random() < 0.15:  # attach is killable too
            self.moment += ", and again while it attaches"
            time.sleep(self.rng.uniform(0, 0.8))
            deadline = time.monotonic() + LATE_SECONDS_MAX
            while not (child := child_of(self._secondary.pid)) and time.monotonic() < deadline:
                time.sleep(0.001)  # QEMUs of the old one are still dying
            self._child = child
            killed = time.monotonic_ns()
            found = self._kill_child()
            self.counts.add("more kills, of a secondary that attaches")
            self._wait("secondary", "restarted", killed)
        self._back_in_step(found, killed)

    def _kill_qemu(self) -> None:
        """The secondary's machine, or the QEMU that waits to be the next: nobody restarts, the next epoch is whole."""
        qemus = children_of(self._child)
        self.moment += f", one of its {len(qemus)} QEMUs"
        if not qemus:
            return  # between two of them
        killed = time.monotonic_ns()
        self._qemu_dies = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rng.choice(qemus), signal.SIGKILL)
        self.counts.add("kills: a QEMU of the secondary")
        for _ in range(2):  # the first may have been sealed before
            checkpoint = self._wait("secondary", "checkpoint", killed)
            killed = checkpoint["t"]
        self._qemu_dies = False
        self._check_all(checkpoint)

    def _kill_keeper(self) -> None:
        self.moment += ", with its keeper"
        killed = time.monotonic_ns()
        self._secondary.send(signal.SIGKILL)
        self._secondary.wait()
        wait_dead(self._child)
        found = self._region.found()
        self.counts.add("kills: secondary and its keeper")
        if found is not None and self.rng.random() < 0.5:
            found = self._recover(found)
        self._start_secondary("--attach")
        self._back_in_step(found, killed)

    def _recover(self, found: Found) -> Found:
        """`colocache recover NAME`, by hand."""
        command = python_command("colocache.cli", "main", "recover", self.name, "--json")
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LATE_SECONDS_MAX)
        if ran.returncode:
            raise BrokenError(f"recover failed: {ran.stderr.strip()}; the region was {found}")
        said = json.loads(ran.stdout.splitlines()[-1])
        self._check_sentence(found, said["action"].upper(), said["sentence"])
        self.counts.add("recovered by hand")
        return found.after_recover()

    def _check_sentence(self, found: Found | None, action: str, sentence: str) -> None:
        if found is None or action != found.action or not sentence.startswith(found.sentence):
            raise BrokenError(f"the region was {found}, attach says {action}: {sentence}")
        self.counts.add(
            {
                "REPLAYED": "replayed",
                "RESTART": "restarted",
                "NO_RESTART": "could not restart",
                "NOTHING": "began again before epoch 1",
            }[action]
        )

    def _attached(self, found: Found | None, killed: int) -> Event | None:
        """What attach said, once it has; None if there was nothing to attach to."""
        if found is None:
            return None
        event = self._wait("secondary", "attached", killed)
        self._check_sentence(found, event["action"], event["sentence"])
        if found.action in ("REPLAYED", "RESTART"):
            self._check_all(self._wait("secondary", "resumed", killed))
        return event

    def _check_all(self, event: Event) -> None:
        must = self._own_pages if event["event"] in ("takeover", "ran_on", "end") else (self._n_pages,)
        if event["verified_pages"] not in must:
            raise BrokenError(f"{event['verified_pages']} of {must} pages were verified: {event}")

    def _back_in_step(self, found: Found | None, killed: int) -> None:
        """The primary finds the secondary again, goes on from where both are, and one checkpoint makes it whole."""
        attached = self._attached(found, killed)
        sealed = found.sealed if found else 0
        after = attached["t"] if attached else killed
        connected = self._wait("primary", "connected", after)
        told = self._told_to_primary(connected["t"])
        if told > sealed:
            raise BrokenError(f"the primary was told RECEIVED({told}), the region knows {sealed}")
        if connected["fresh"] != (sealed == 0) or connected["sealed_epoch"] != sealed:
            raise BrokenError(f"epoch {sealed} is sealed, and the primary goes on like this: {connected}")
        checkpoint = self._wait("secondary", "checkpoint", after)
        if checkpoint["epoch"] <= sealed:
            raise BrokenError(f"epoch {sealed} was sealed, and then: {checkpoint}")
        self._check_all(checkpoint)
        if found and found.action == "NO_RESTART" and checkpoint["flushed_pages"] != self._n_pages:
            raise BrokenError(f"the SVM bitmap must count as all ones, {checkpoint['flushed_pages']} were flushed")
        if sealed:
            self.counts.add("reconnections")
            # Only what was not acknowledged goes again; a page may go in each of several rounds, and in the pause.
            sent = self._wait("primary", "checkpoint", connected["t"])
            again, last = connected["unacked_pages"], sent["sent_pages"] - sent["background_pages"]
            if max(again, last) > self._dirty_pages_max:
                raise BrokenError(
                    f"{again} pages were to be sent again, {last} in the pause, {self._dirty_pages_max} can be dirty: "
                    f"{sent}"
                )

    def _told_to_primary(self, before: int | None = None) -> int:
        """The newest epoch of which the primary knew, at a time (ns), that it is sealed: the world saw its output."""
        told = (event for event in self._seen if (event["side"], event["event"]) == ("primary", "checkpoint"))
        return max((event["epoch"] for event in told if before is None or event["t"] < before), default=0)

    # ---- the kill that ends the pair ----

    def _kill_at_the_end(self) -> None:
        self._aim(self.rng.choice(MOMENTS))
        end = self.plan.end
        if end.startswith("primary"):
            self._kill_primary()
        elif end == "keeper for good":
            self._kill_keeper_for_good()
        else:
            self._kill_both(with_keeper=end == "both and keeper")

    def _took_over(self, after: int) -> None:
        """A takeover, every page of it verified, at the newest epoch that the world may have seen or a later one."""
        takeover = self._wait("secondary", "takeover", after)
        self._check_all(takeover)
        ran_on = self._wait("secondary", "ran_on", after)
        self._check_all(ran_on)
        if not ran_on["steps"]:
            raise BrokenError(f"the machine did not run on: {ran_on}")
        status = self._secondary.wait()
        if status:
            raise BrokenError(f"the secondary took over and ended with status {status}")
        told, found = self._told_to_primary(), self._region.found()
        if found is None or not told <= takeover["epoch"] == found.sealed:
            raise BrokenError(f"took over at epoch {takeover['epoch']}, {told} was told to the primary, left: {found}")
        self.counts.add("takeovers")

    def _kill_primary(self) -> None:
        self._allowed = {"aborted", "takeover", "refused", "error"}
        operator = self.plan.end == "primary, operator" or not self.plan.asks_arbiter
        first = operator and self.rng.random() < 0.5
        killed = time.monotonic_ns()
        if first:  # failover asked for while both live: whatever happens, one machine goes on
            self._secondary.send(signal.SIGUSR2)
            time.sleep(self.rng.choice((0, self.rng.uniform(0, 0.03))))
        if self.plan.guest == "qemu" and not first and self.rng.random() < 0.5:
            self._kill_qemu_of_the_primary()
        else:
            self._primary.send(signal.SIGKILL)
            self._primary.wait()
            self.counts.add("kills: primary, operator" if operator else "kills: primary")
        if operator and not first:
            time.sleep(self.rng.choice((0, self.rng.uniform(0, 0.03))))
            self._secondary.send(signal.SIGUSR2)
        self._took_over(killed)

    def _kill_qemu_of_the_primary(self) -> None:
        """The machine dies, its driver lives: it says so and leaves, and its secondary is free to take over."""
        for qemu in children_of(self._primary.pid):
            os.kill(qemu, signal.SIGKILL)
        self.counts.add("kills: the QEMU of the primary")
        if self._primary.wait() != 1:
            raise BrokenError("the primary's machine was killed and it ended as if nothing were wrong")

    def _kill_primary_early(self) -> None:
        """Before epoch 1 there is no secondary: it says so, unless the epoch was sealed just then."""
        self.moment = "the initial copy"
        self._allowed = {"aborted", "takeover", "error"}
        time.sleep(self.rng.uniform(0, 0.3))
        killed = time.monotonic_ns()
        self._primary.send(signal.SIGKILL)
        self._primary.wait()
        self.counts.add("kills: primary, during the initial copy")
        if self._wait_or_end("secondary", ("takeover",), killed):
            self._took_over(killed)
            return
        self._no_takeover(killed)
        found = self._region.found()
        if found is not None and found.sealed:
            raise BrokenError(f"there was a state to take over from, {found}, and the secondary ended")

    def _no_takeover(self, after: int) -> None:
        """It ended, and asked nobody whether it may."""
        status = self._secondary.wait()
        while self._pull(0):
            pass
        if status != 1 or self._find("secondary", ("error",), after) is None:
            raise BrokenError(f"nothing to take over from: the secondary ended with status {status} and no error")
        asked = self._find("secondary", ("arbiter", "promoted", "takeover", "ran_on"), after)
        if asked is not None:
            raise BrokenError(f"nothing to take over from, and the secondary did this: {asked}")
        self.counts.add("nothing to take over from, and said so")

    def _kill_keeper_for_good(self) -> None:
        """The secondary's host is gone: the primary goes on alone."""
        self._allowed = {"alone", "aborted"}
        killed = time.monotonic_ns()
        self._secondary.send(signal.SIGKILL)
        self._secondary.wait()
        self.counts.add("kills: secondary and its keeper, for good")
        self._wait("primary", "alone", killed)
        end = self._wait("primary", "end", killed)
        self._check_all(end)
        self._primary.wait()
        self.counts.add("primaries that went on alone")
        clean(self.name)

    def _kill_both(self, *, with_keeper: bool) -> None:
        """Two failures at once: no promise but that what is left is told truly and, where it can be, taken over."""
        self._allowed = {"aborted", "takeover", "error", "refused"}
        killed = time.monotonic_ns()
        self._primary.send(signal.SIGKILL)
        if with_keeper:
            self._secondary.send(signal.SIGKILL)
            self._secondary.wait()
            wait_dead(self._child)
            found = self._region.found()
        else:
            found = self._kill_child()
        self._primary.wait()
        self.counts.add("kills: both, and the keeper" if with_keeper else "kills: both")
        if found is None:
            raise BrokenError("a pair that was in step left no region")
        if with_keeper:
            if not self.persistent:
                clean(self.name)
                return
            if self.rng.random() < 0.7:
                found = self._recover(found)
            self._start_secondary("--attach", "--connect-limit", "0.3", limit=0.1)
        self._attached(found, killed)
        if found.action == "NO_RESTART":
            if not with_keeper:
                self._secondary.send(signal.SIGUSR2)  # the operator asks, and is told
                self._wait("secondary", "refused", killed)
                self._secondary.send(signal.SIGTERM)
                self._secondary.wait()
                self.counts.add("nothing to take over from, and said so")
            else:
                self._no_takeover(killed)
                self._wait("secondary", "kept", killed)  # a primary that comes back could still make it whole
                clean(self.name)
            return
        if not with_keeper:
            self._secondary.send(signal.SIGUSR2)
        self._took_over(killed)

    def _end_in_order(self) -> None:
        self._primary.send(signal.SIGTERM)
        self._primary.wait()
        status = self._secondary.wait()
        if status:
            raise BrokenError(f"the primary ended in order, the secondary with status {status}")
