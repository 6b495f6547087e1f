# SPDX-License-Identifier: Apache-2.0
"""The events of a pair added up: what `demo` reports at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all do not exceed; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and max, as the JSON reports have them."""
    return {
        "p50": percentile(values, 0.50),
        "p99": percentile(values, 0.99),
        "max": max(values, default=0.0),
    }


@dataclass
class Limited:
    """What a secondary under a memory limit did to keep it."""

    peak_bytes: int = 0  # beside the image: staged and private pages and bookkeeping, at the checkpoints
    stood_ms: list[float] = field(default_factory=list)  # of its machine, waiting for a checkpoint
    pvm_stood_ms: list[float] = field(default_factory=list)  # the same of the primary's, before its pause
    asked: int = 0  # checkpoints that it asked for
    private_given_up: int = 0
    spilled_peak_bytes: int = 0  # of one epoch
    spilled_epochs: int = 0

    def add(self, event: dict[str, Any]) -> None:
        """Count one event of either side."""
        if event["event"] == "memory":
            self.peak_bytes = max(self.peak_bytes, event["bytes"])
            self.stood_ms.append(event["stood_ms"])
            self.asked += event["asked"]
            self.spilled_peak_bytes = max(self.spilled_peak_bytes, event["spilled_bytes"])
            self.spilled_epochs += event["spilled_bytes"] > 0
        elif event["event"] == "checkpoint" and event["side"] == "primary":
            self.pvm_stood_ms.append(event["stood_ms"])
        elif event["event"] == "private_given_up":
            self.private_given_up += 1

    def report(self, limit_bytes: int) -> dict[str, Any]:
        """The field `memory_limit` of `demo --json`."""
        return {
            "bytes": limit_bytes,
            "peak_bytes": self.peak_bytes,
            "asked": self.asked,
            "private_given_up": self.private_given_up,
            "spilled_peak_bytes": self.spilled_peak_bytes,
            "spilled_epochs": self.spilled_epochs,
            "stood_ms": summary_of(self.stood_ms),
            "pvm_stood_ms": summary_of(self.pvm_stood_ms),
        }


@dataclass
class OfDisks:
    """What the guest wrote to its disks in the epochs that were sealed, and what that cost."""

    writes: int = 0
    bytes: int = 0
    apply_ms: list[float] = field(default_factory=list)  # on the secondary, a part of its pause
    unacked_blocks: list[float] = field(default_factory=list)  # of 64 KiB: what would come again

    def add(self, event: dict[str, Any]) -> None:
        """Count a checkpoint of either side."""
        if event["side"] == "primary":
            self.unacked_blocks.append(event.get("unacked_blocks", 0))
        else:
            self.writes += event.get("disk_writes", 0)
            self.bytes += event.get("disk_bytes", 0)
            self.apply_ms.append(event["stages"].get("apply_ms", 0.0))

    def report(self) -> dict[str, Any]:
        """The field `disks` of `demo --json`."""
        return {
            "writes": self.writes,
            "bytes": self.bytes,
            "apply_ms": summary_of(self.apply_ms),
            "unacked_blocks": summary_of(self.unacked_blocks),
        }


@dataclass
class Tally:
    """Sums over the checkpoints of one run, and its takeover."""

    checkpoints: int = 0
    pvm_pages: int = 0
    svm_pages: int = 0
    both_pages: int = 0
    flushed_pages: int = 0
    flushed_bytes: int = 0
    copy_ms: float = 0.0
    verified_pages: int = 0
    wrong_pages: int = 0
    pauses: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    primary_pauses: list[float] = field(default_factory=list)
    primary_stages: dict[str, list[float]] = field(default_factory=dict)
    progress: list[tuple[int, int]] = field(default_factory=list)  # of the primary's guest: ns, steps since it booted
    memory: Limited = field(default_factory=Limited)
    disks: OfDisks = field(default_factory=OfDisks)
    lost: dict[str, Any] | None = None
    promoted: dict[str, Any] | None = None
    takeover: dict[str, Any] | None = None
    ran_on: dict[str, Any] | None = None
    folded: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Count one event of either side."""
        name, side = event["event"], event["side"]
        self.memory.add(event)
        if name == "checkpoint":
            self.disks.add(event)
        if side == "primary":
            if name == "checkpoint":
                self.primary_pauses.append(event["pause_ms"])
                self.progress.append((event["t"], event["steps"]))
                for stage, value in event["stages"].items():
                    self.primary_stages.setdefault(stage.removesuffix("_ms"), []).append(value)
            return
        if name == "checkpoint":
            self.checkpoints += 1
            self.pvm_pages += event["pvm_pages"]
            self.svm_pages += event["svm_pages"]
            self.both_pages += event["both_pages"]
            self.flushed_pages += event["flushed_pages"]
            self.flushed_bytes += event["bytes"]
            self.copy_ms += event["stages"]["copy_ms"]
            self.pauses.append(event["pause_ms"])
            for stage, value in event["stages"].items():
                self.stages.setdefault(stage.removesuffix("_ms"), []).append(value)
        if "wrong_pages" in event and name != "end":  # each check says what it found; the end repeats all of them
            self.verified_pages += event["verified_pages"]
            self.wrong_pages += event["wrong_pages"]
        if name in ("lost", "promoted", "takeover", "ran_on", "folded"):
            setattr(self, name, event)

    @property
    def flush_gb_per_s(self) -> float:
        """Bytes of all flushes by the time of all copies, in 1e9 bytes a second."""
        return self.flushed_bytes / (self.copy_ms * 1e6) if self.copy_ms else 0.0

    def report(self, killed_ns: int | None) -> dict[str, Any]:
        """The fields of `demo --json` that come from the run itself; `killed_ns`: CLOCK_MONOTONIC of the kill."""
        return {
            "checkpoints": self.checkpoints,
            "pvm_pages": self.pvm_pages,
            "svm_pages": self.svm_pages,
            "both_pages": self.both_pages,
            "flushed_pages": self.flushed_pages,
            "pause_ms": summary_of(self.pauses),
            "pvm_pause_ms": summary_of(self.primary_pauses),
            "stages_ms": {stage: summary_of(values) for stage, values in self.stages.items()},
            "pvm_stages_ms": {stage: summary_of(values) for stage, values in self.primary_stages.items()},
            "pvm_steps_per_s": self._steps_per_s(),
            "flush_gb_per_s": round(self.flush_gb_per_s, 3),
            "failover": self._failover(killed_ns),
            "verified_pages": self.verified_pages,
            "wrong_pages": self.wrong_pages,
        }

    def _steps_per_s(self) -> float:
        """What the pair leaves the primary's guest; 0 where there were no two checkpoints."""
        (begin, first), (end, last) = (self.progress[0], self.progress[-1]) if self.progress else ((0, 0), (0, 0))
        return round((last - first) / (end - begin) * 1e9, 1) if end > begin else 0.0

    def _failover(self, killed_ns: int | None) -> dict[str, Any] | None:
        """None if none happened. detect: kill to noticed; promote: decision to running; outage: kill to running."""
        if self.takeover is None or self.promoted is None:
            return None
        detect = outage = None
        if killed_ns is not None:
            outage = round((self.promoted["t"] - killed_ns) / 1e6, 3)
            if self.lost is not None:
                detect = round((self.lost["t"] - killed_ns) / 1e6, 3)
        return {
            "cause": self.takeover["cause"],
            "detect_ms": detect,
            "promote_ms": self.takeover["promote_ms"],
            "outage_ms": outage,
            "epoch": self.takeover["epoch"],
            "steps_run_on": self.ran_on["steps"] if self.ran_on else 0,
            "folded_bytes": self.folded["bytes"] if self.folded else None,
            "fold_longest_ms": self.folded["longest_ms"] if self.folded else None,
        }
