# SPDX-License-Identifier: Apache-2.0
"""How long a VM stands still for a checkpoint: its parts, those measured on this machine and those estimated.

The flush's part, seal and flush, is measured here for as many bytes as there is memory for. The rest of a pause depends
on the network, the guest and its devices: it is reckoned from a rate that is given or measured, and says from which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from colocache import backing as bk
from colocache.errors import ColocacheError, MemoryShortError
from colocache.measure.cases import flush_ns, seal_ns
from colocache.measure.clock import Spread, undisturbed
from colocache.measure.guest_times import GuestTimes, guest_times
from colocache.measure.host import Host
from colocache.measure.huge import borrowed
from colocache.measure.patterns import synthetic
from colocache.measure.rig import PAGE, Rig
from colocache.measure.session import RAM_MIN, Cooling, Plan, Progress
from colocache.measure.transfer import Transfer

SIZES = (10_000_000, 100_000_000, 400_000_000, 1_000_000_000, 2_000_000_000, 4_000_000_000)
QUICK_BYTES = 400_000_000  # the most that --quick measures
RUN_PAGES = 8
TRANSFER_BYTES = 200_000_000  # the most that is sent through the local socket in a round
# Ethernet with an MTU of 1500: of the 1538 bytes that a full frame takes on the wire 1448 are the stream's.
WIRE_SHARE = 1448 / 1538


@dataclass(frozen=True)
class Part:
    """A part of a pause. `measured` here, or estimated; `source` says from what."""

    seconds: float
    measured: bool
    source: str


@dataclass(frozen=True)
class Pause:
    """A whole pause for so many dirty bytes. A part is None if nothing is known of it."""

    dirty_bytes: int
    log_sync: Part | None
    transfer: Part
    seal: Part
    flush: Part
    load: Part | None
    flush_part: Spread  # seal and flush of each round; of a size that was not measured only the median

    @property
    def parts(self) -> dict[str, Part | None]:
        """In the order in which they come."""
        names = ("log_sync", "transfer", "seal", "flush", "load")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        """Of all known parts, one after the other."""
        return sum(part.seconds for part in self.parts.values() if part is not None)


@dataclass
class Answer:
    """Pauses from the fewest dirty bytes to the most; one is of asked_bytes."""

    host: Host
    asked_bytes: int
    bits_per_s: float | None
    backing: str = ""
    ram_bytes: int = 0
    n_threads: int = 0
    rounds: int = 0
    pauses: list[Pause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def asked(self) -> Pause:
        return next(pause for pause in self.pauses if pause.dirty_bytes == self.asked_bytes)

    def to_json(self) -> dict[str, Any]:
        """The object of `bench --dirty --json`."""

        def part(one: Part | None) -> dict[str, Any] | None:
            return None if one is None else dict(one.__dict__)

        return {
            "host": dict(self.host.__dict__),
            "dirty_bytes": self.asked_bytes,
            "network_bits_per_s": self.bits_per_s,
            "pause_seconds": self.asked.seconds,
            "flush_part_seconds": self.asked.flush_part.to_json(),
            "backing": self.backing,
            "ram_bytes": self.ram_bytes,
            "threads": self.n_threads,
            "rounds": self.rounds,
            "run_pages": RUN_PAGES,
            "sizes": [
                {
                    "dirty_bytes": pause.dirty_bytes,
                    "pause_seconds": pause.seconds,
                    "flush_part_seconds": pause.flush_part.to_json(),
                    "parts": {name: part(one) for name, one in pause.parts.items()},
                }
                for pause in self.pauses
            ],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Round:
    """What one round of one size took, in nanoseconds."""

    seal_ns: int
    flush_ns: int


def ram_for(dirty_bytes: int) -> int:
    """A guest in which so many bytes are dirty in runs with a clean page between them."""
    return max(RAM_MIN, bk.round_up(dirty_bytes * (RUN_PAGES + 1) // RUN_PAGES + (4 << 20), bk.HUGE))


class Standstill:
    """Measures what can be, and reckons the rest. `run` gives the answer; what was borrowed is given back."""

    def __init__(
        self, plan: Plan, host: Host, dirty_bytes: int, bits_per_s: float | None, progress: Progress = lambda *_: None
    ) -> None:
        self.plan, self.host = plan, host
        self.answer = Answer(host, dirty_bytes, bits_per_s)
        self._progress = progress
        self.cooling = Cooling.of(plan, host)
        apart = [size for size in SIZES if abs(size - dirty_bytes) > 0.1 * dirty_bytes]
        self._sizes = sorted({*apart, dirty_bytes})

    def run(self) -> Answer:
        """MemoryShortError if there is no room for even the smallest guest on any backing."""
        answer = self.answer
        with self._rig() as rig:
            answer.backing, answer.ram_bytes = rig.backing, rig.ram_bytes
            answer.n_threads = self.plan.threads[-1] if self.plan.threads else self.host.cores
            with rig.threads(answer.n_threads):
                taken, rate = self._measure(rig)
        guest = self._guest()
        largest = max(taken)
        for size in self._sizes:
            answer.pauses.append(self._pause(size, taken, largest, rate, guest))
        if answer.asked_bytes > largest:
            answer.notes.append(
                f"seal and flush of more than {largest / 1e6:,.0f} MB are estimated from it: more was not measured "
                f"{'by --quick' if self.plan.quick else f'in a guest of {answer.ram_bytes >> 20:,} MiB'}"
            )
        return answer

    # ---- measuring ----

    @contextlib.contextmanager
    def _rig(self) -> Iterator[Rig]:
        """A guest that has room for the largest size that memory allows, on the best backing there is."""
        wanted = self.plan.ram_bytes[-1] if self.plan.ram_bytes else ram_for(self._most())
        reasons = []
        for backing in self.plan.backings or ("hugetlb", "thp", "shm"):
            available, room = bk.memory_available(), bk.shm_available() if backing == "shm" else bk.UNKNOWN
            ram = self.cooling.affordable(wanted, available, room)
            with contextlib.ExitStack() as stack:
                if backing == "hugetlb":
                    added = stack.enter_context(borrowed(2 * bk.round_up(ram, bk.HUGE) // bk.HUGE))
                    if added:
                        self.answer.notes.append(f"{added} huge pages of 2 MiB were reserved and given back")
                try:
                    self._progress(1, 2, f"filling a guest of {ram >> 20} MiB on {backing}")
                    rig = stack.enter_context(
                        Rig(ram, backing, self.cooling.touch_bytes, by_lines=self.cooling.by_lines)
                    )
                except ColocacheError as error:
                    reasons.append(f"no {backing}: {error}")
                    continue
                self.answer.notes += reasons
                if ram < wanted:
                    self.answer.notes.append(self._smaller(ram, wanted, available, room))
                yield rig
                return
        raise MemoryShortError(
            "nothing could be measured: " + "; ".join(reasons),
            needed=self.cooling.needed(RAM_MIN),
            available=bk.memory_available(),
            command="free some memory, or choose another --backing",
        )

    def _smaller(self, ram: int, wanted: int, available: int, room: int) -> str:
        """Why the guest is not as large as it was to be."""
        limits = []
        if self.cooling.needed(wanted) > available:
            limits.append(f"{self.cooling.needed(wanted) >> 20:,} MiB of memory and {available >> 20:,} are available")
        if 2 * wanted > room:
            limits.append(f"{2 * wanted >> 20:,} MiB of {bk.SHM_DIR}, which has room for {room >> 20:,}")
        return f"guest RAM is {ram >> 20:,} MiB: {wanted >> 20:,} MiB would take {' and '.join(limits)}"

    def _most(self) -> int:
        most = max(self._sizes)
        return min(most, QUICK_BYTES) if self.plan.quick else most

    def _measure(self, rig: Rig) -> tuple[dict[int, list[Round]], float]:
        """Rounds of each size that fits, and the bytes a second that arrive through a socket of this machine."""
        fit = [size for size in self._sizes if ram_for(size) <= rig.ram_bytes]
        if not fit:  # a small --ram: half of it dirty, and the rest is reckoned from that
            fit = [rig.ram_bytes // 2]
        sent = min(TRANSFER_BYTES, max(fit))
        taken: dict[int, list[Round]] = {size: [] for size in fit}
        rates = []
        steps = self.plan.n_rounds * (len(fit) + 1)
        with Transfer(rig) as transfer:
            for number in range(self.plan.n_rounds):
                for at, size in enumerate(rig.rng.permutation(fit).tolist()):
                    label = f"round {number + 1}: {size / 1e6:,.0f} MB dirty on {rig.backing}"
                    self._progress(number * (len(fit) + 1) + at + 1, steps, label)
                    taken[size].append(self._round(rig, size))
                self._progress((number + 1) * (len(fit) + 1), steps, f"round {number + 1}: through a socket")
                pattern = synthetic(rig.n_pages, sent / rig.ram_bytes, RUN_PAGES, rig.rng)
                transfer.stamp(pattern)
                rig.note_plain()
                rig.poison(pattern)
                rig.cool()
                with undisturbed():
                    transfer.checkpoint(pattern)
                rig.check(pattern, "our checkpoint")
                rates.append(pattern.n_dirty * PAGE / (transfer.arrived_ns / 1e9))
        self.answer.rounds = self.plan.n_rounds
        return taken, median(rates)

    def _round(self, rig: Rig, size: int) -> Round:
        pattern = synthetic(rig.n_pages, size / rig.ram_bytes, RUN_PAGES, rig.rng)
        rig.poison(pattern)
        rig.arm(pattern)
        rig.cool()
        with undisturbed():
            sealed = seal_ns(rig.seal())
            flushed = flush_ns(rig, pattern)
        rig.check(pattern, f"our seal and flush of {size} bytes")
        return Round(sealed, flushed)

    def _guest(self) -> GuestTimes | None:
        try:
            return guest_times(self.plan.n_rounds)
        except ColocacheError as error:
            self.answer.notes.append(f"log sync and load of the device state are left out: {error}")
            return None

    # ---- reckoning ----

    def _pause(
        self, size: int, taken: dict[int, list[Round]], largest: int, rate: float, guest: GuestTimes | None
    ) -> Pause:
        rounds, factor = taken.get(size), 1.0
        if rounds is None:
            rounds, factor = taken[largest], size / largest
        measured = factor == 1.0
        source = f"{len(rounds)} rounds" if measured else f"from {largest / 1e6:,.0f} MB, measured"

        def part(of: Callable[[Round], int]) -> Part:
            return Part(factor * median(of(one) for one in rounds) / 1e9, measured, source)

        whole = Spread.of([factor * (one.seal_ns + one.flush_ns) / 1e9 for one in rounds])
        if not measured:
            whole = Spread(float("nan"), whole.p50, float("nan"))
        log = load = None
        if guest is not None:
            seconds = guest.sync_ns_per_page * (size / PAGE) / 1e9
            log = Part(seconds, False, f"{guest.sync_ns_per_page:.0f} ns a page on the {guest.kind} guest, measured")
            load = Part(
                guest.load_ns / 1e9,
                False,
                f"{guest.state_bytes:,} bytes of the {guest.kind} guest, measured; more devices, more",
            )
        return Pause(
            size, log, self._transfer(size, rate), part(lambda one: one.seal_ns), part(lambda one: one.flush_ns), load,
            whole,
        )  # fmt: skip

    def _transfer(self, size: int, rate: float) -> Part:
        here = f"{rate / 1e9:.1f} GB/s arrive through a socket of this machine, measured"
        bits = self.answer.bits_per_s
        if bits is None:
            return Part(size / rate, False, f"{here}; give --network")
        wire = bits / 8 * WIRE_SHARE
        if wire <= rate:
            return Part(size / wire, False, f"{wire / 1e9:.3g} GB/s of {bits / 1e9:g} Gbit/s after TCP and Ethernet")
        return Part(size / rate, False, f"the network gives more, but {here}")
