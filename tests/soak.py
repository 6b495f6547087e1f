# SPDX-License-Identifier: Apache-2.0
"""Real kills: pairs of the demo's machines, SIGKILLed at random moments, must keep the promise every time.

    python tests/soak.py --kills 10000
    python tests/soak.py --seconds 600 --backing shm --guest process --seed 7
    python tests/soak.py --seconds 600 --disk

A kill counts when the pair has committed an epoch since the one before: one failure at a time. (Kills of a secondary
that still attaches come besides and are not in the sum.) Exit status 0: nothing that was expected failed to come true.
Otherwise the seed, the pair, the moment and the folder with all logs are named; the seed gives the same plans and
delays again, though not the same race.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from soak_pair import Pair, Plan
from soak_process import SHM
from soak_watch import Counts

from colocache import backing, clean, list_regions
from colocache.vmm.kvm import kvm_trouble

HUGE_PAGES_PER_PAIR = 100  # three images of 64 MiB in two blocks each, rounded up


class Soak:
    """All pairs: a few at a time, until enough was killed or the time is over, or until one is broken."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.counts = Counts()
        self.failures: list[str] = []
        self.kills = 0
        self._ways = list(ways(options))
        self._next_pair = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._begin = time.monotonic()

    def claim(self) -> bool:
        """One more kill is wanted, and is now the caller's."""
        with self._lock:
            if self._is_over():
                return False
            self.kills += 1
            return True

    def stop(self) -> None:
        """No more kills."""
        self._over.set()

    def _is_over(self) -> bool:
        seconds = self.options.seconds
        late = bool(seconds) and time.monotonic() - self._begin >= seconds
        return self._over.is_set() or late or bool(self.options.kills and self.kills >= self.options.kills)

    def run(self) -> None:
        """To the end."""
        threads = [threading.Thread(target=self._work, name=f"soak-{i}") for i in range(self.options.pairs)]
        for thread in threads:
            thread.start()
        said = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2)
            if not threads[0].is_alive():
                time.sleep(0.05)
            if time.monotonic() - said > self.options.report_every:
                said = time.monotonic()
                print(f"{said - self._begin:6.0f} s: {self.kills} kills", file=sys.stderr, flush=True)

    def _work(self) -> None:
        """One pair after the other. In a thread of its own."""
        while not self._is_over():
            with self._lock:
                number, self._next_pair = self._next_pair, self._next_pair + 1
            rng = random.Random(f"{self.options.seed}/{number}")
            guest, kind, memory = self._ways[number % len(self._ways)]
            given = self.options
            plan = Plan.draw(rng, guest, kind, memory, tls=given.tls, disk=given.disk, spill=given.spill)
            counts = Counts()
            name = f"soak-{os.getpid()}-{number}"
            pair = Pair(name, plan, rng, self.folder, counts, self.claim)
            try:
                try:
                    pair.run()
                    pair.settle()
                finally:
                    pair.close()
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is reported with its moment
                self._failed(f"pair {number} ({plan}), killed at: {pair.moment}: {type(error).__name__}: {error}")
                self.stop()
            else:
                for log in self.folder.glob(f"{name}.*"):
                    log.unlink()
            with self._lock:
                self.counts.add("pairs")
                for what, n in counts.items():
                    self.counts.add(what, n)

    def _failed(self, sentence: str) -> None:
        with self._lock:
            self.failures.append(sentence)
        print(f"FAILED: {sentence}", file=sys.stderr, flush=True)

    def look_for_leftovers(self) -> int:
        """How many files of ours are left; they are removed."""
        ours = f"soak-{os.getpid()}-"
        regions = [region for region in list_regions() if region.name.startswith(ours)]
        left = {path for region in regions for path in region.files} | set(SHM.glob(f"colocache.{ours}*"))
        if left and not self.failures:
            self._failed(f"{len(left)} files are left: {sorted(str(path) for path in left)[:6]}")
        for region in regions:
            clean(region.name)
        return len(left)


def ways(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """The kinds of pairs, (guest, backing, memory), that are wanted and can be had; says which can't."""
    trouble = kvm_trouble()
    needed, free = options.pairs * HUGE_PAGES_PER_PAIR, backing.huge_pages().free
    for guest in options.guest or ("process", "kvm"):
        for kind in options.backing or ("shm", "hugetlb"):
            if guest == "kvm" and trouble and not options.guest:
                print(f"no kvm guests: {trouble}", file=sys.stderr)
            elif kind == "hugetlb" and free < needed and not options.backing:
                print(f"no hugetlb: {free} huge pages are free, {needed} are needed", file=sys.stderr)
            else:
                for memory in options.memory or ("mirror", "bounded"):
                    if (memory == "mirror" or kind != "hugetlb") and (memory == "bounded" or guest != "qemu"):
                        yield guest, kind, memory


def report(soak: Soak, seconds: float, left: int) -> str:
    """The numbers, one a line."""
    always = (
        "takeovers",
        "replayed",
        "restarted",
        "could not restart",
        "reconnections",
        "pages verified",
        "wrong pages",
    )
    counts = {**dict.fromkeys(always, 0), **soak.counts}
    kills = {name: n for name, n in sorted(counts.items()) if name.startswith("kills: ")}
    lines = [f"{sum(kills.values())} kills in {seconds:.0f} s, seed {soak.options.seed}"]
    lines += [f"  {name.removeprefix('kills: ')}: {n}" for name, n in kills.items()]
    lines += [f"{name}: {n}" for name, n in counts.items() if name not in kills]
    return "\n".join([*lines, f"leftovers: {left}"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="end after so many (200, if --seconds is not given)")
    parser.add_argument("--seconds", type=float, default=0, help="end after so many seconds")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--backing", action="append", choices=("shm", "hugetlb", "thp"), help="shm and hugetlb")
    parser.add_argument("--guest", action="append", choices=("kvm", "process", "qemu"), help="kvm and process")
    parser.add_argument("--memory", action="append", choices=("mirror", "bounded"), help="both")
    parser.add_argument("--tls", action="store_true", help="the two sides speak TLS")
    parser.add_argument("--disk", action="store_true", help="the guests write a disk too (kvm and process)")
    parser.add_argument("--spill", default="", metavar="DIR", help="bounded ones have a small limit and this folder")
    parser.add_argument("--pairs", type=int, default=3, help="at a time (default: %(default)s)")
    parser.add_argument("--report-every", type=float, default=30, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.disk and "qemu" in (options.guest or ()):
        parser.error(
            "--disk and --guest qemu: its small guest knows no disks; tests/disk_by_hand.py has a Linux that does"
        )
    if options.kills <= 0 and options.seconds <= 0:
        options.kills = 200
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def main(arguments: list[str]) -> int:
    """Exit status."""
    options = parse(arguments)
    print(f"seed {options.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="colosoak-"))
    soak = Soak(options, folder)

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        soak.stop()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    begin = time.monotonic()
    soak.run()
    left = soak.look_for_leftovers()
    print(report(soak, time.monotonic() - begin, left))
    if soak.failures:
        print(f"seed {options.seed}, logs in {folder}:")
        print("\n".join(f"FAILED: {sentence}" for sentence in soak.failures))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
