# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint did and how long each stage took, for people and for JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from colocache.replication.stages import Span, Stages

# The secondary's. `sync` is a part of `receive`; those after it are parts of its pause and, with `rest`, all of it.
STAGES = ("receive", "sync", "check", "union", "seal", "answer", "apply", "copy", "forget", "load", "resume", "rest")
# The primary's: before its machine stands, while it stands, and after.
SENT_STAGES = ("ask", "stop", "state", "log", "pages", "answer", "resume", "loaded")


def ms(nanoseconds: int) -> float:
    """Nanoseconds as milliseconds, for JSON."""
    return round(nanoseconds / 1e6, 4)


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint as the secondary saw it. Page counts are the three parts of the flush set; times in nanoseconds.

    `pause_ns` runs from the last byte of the epoch received to the vCPUs running, `stop_ns` from CHECKPOINT_REQUEST;
    neither counts `verify_ns`, the comparison with the primary's hashes. What the primary does meanwhile is in
    `receive_ns` and `stop_ns`: its making of hashes too, if it makes some.
    """

    epoch: int
    pvm_pages: int
    svm_pages: int
    both_pages: int
    flushed_pages: int
    n_runs: int
    n_bytes: int
    receive_ns: int  # CHECKPOINT_REQUEST to the last byte
    sync_ns: int  # the SVM's dirty log, while the primary stops and saves its machine
    check_ns: int  # the VM's look at the device state
    union_ns: int
    seal_ns: int  # record, commit word, clearing of the bits
    answer_ns: int  # RECEIVED handed to the network
    copy_ns: int
    forget_ns: int  # bounded memory: the SVM's private pages
    load_ns: int
    resume_ns: int
    verify_ns: int
    pause_ns: int
    stop_ns: int
    verified_pages: int
    wrong_pages: int
    apply_ns: int = 0  # the log of disk writes into the images
    disk_writes: int = 0  # that this epoch's log has
    disk_bytes: int = 0

    @property
    def rest_ns(self) -> int:
        """What of the pause is no stage: the steps between them."""
        known = [int(getattr(self, f"{stage}_ns")) for stage in STAGES if stage not in ("receive", "sync", "rest")]
        return self.pause_ns - sum(known)

    @property
    def flush_gb_per_s(self) -> float:
        """Speed of the copy in 1e9 bytes a second; 0 if nothing was copied."""
        return self.n_bytes / self.copy_ns if self.copy_ns else 0.0

    def parts(self, stages: Stages) -> list[Span]:
        """What the engine did within two of its stages, in its order; the engine tells how long, not when."""
        made = []
        for whole, names in (("seal", ("check", "union", "seal")), ("flush", ("apply", "copy", "forget"))):
            begin = stages.span(whole).begin
            for name in names:
                end = begin + int(getattr(self, f"{name}_ns"))
                made.append(Span("commit" if name == "seal" else name, begin, end))
                begin = end
        return made

    def to_event(self) -> dict[str, Any]:
        """The fields of the `checkpoint` event."""
        return {
            "epoch": self.epoch,
            "pvm_pages": self.pvm_pages,
            "svm_pages": self.svm_pages,
            "both_pages": self.both_pages,
            "flushed_pages": self.flushed_pages,
            "runs": self.n_runs,
            "bytes": self.n_bytes,
            "pause_ms": ms(self.pause_ns),
            "stop_ms": ms(self.stop_ns),
            "flush_gb_per_s": round(self.flush_gb_per_s, 3),
            "stages": {f"{stage}_ms": ms(getattr(self, f"{stage}_ns")) for stage in STAGES},
            "verify_ms": ms(self.verify_ns),
            "verified_pages": self.verified_pages,
            "wrong_pages": self.wrong_pages,
            "disk_writes": self.disk_writes,
            "disk_bytes": self.disk_bytes,
        }

    def __str__(self) -> str:
        checked = f", {self.verified_pages} pages verified, {self.wrong_pages} wrong" if self.verified_pages else ""
        disks = f", {self.disk_writes} writes to disks, {self.disk_bytes / 1e6:.1f} MB" if self.disk_writes else ""
        return (
            f"epoch {self.epoch}: flushed {self.flushed_pages} pages ({self.pvm_pages} PVM, {self.svm_pages} SVM, "
            f"{self.both_pages} both) at {self.flush_gb_per_s:.1f} GB/s, pause {self.pause_ns / 1e6:.2f} ms, "
            f"stop {self.stop_ns / 1e6:.2f} ms{disks}{checked}"
        )


@dataclass(frozen=True)
class SentCheckpoint:
    """One checkpoint as the primary saw it; times in nanoseconds. `pause_ns`: its VM stopped to running, without its
    observer's time: the stages `state` to `resume`, and `loaded` if it waited for that (`resume_at`). What the
    secondary does meanwhile is in `answer_ns`.
    """

    epoch: int
    sent_pages: int  # background and foreground
    background_pages: int
    zero_pages: int
    n_bytes: int
    state_bytes: int
    steps: int  # of its guest, since that booted
    ask_ns: int  # CHECKPOINT_REQUEST to REPLY; the machine runs
    stop_ns: int  # until it stands
    state_ns: int  # its device state is saved
    log_ns: int  # its dirty log
    pages_ns: int  # its last pages
    answer_ns: int  # device state sent, to RECEIVED: the secondary checks and seals
    resume_ns: int
    loaded_ns: int  # until the secondary runs; part of the pause only with resume_at "loaded"
    pause_ns: int
    extra_ns: int  # of the observer, for what is no part of a checkpoint: hashes
    stood_ns: int = 0  # before the pause: the secondary's memory limit left its VM no room to write in
    disk_writes: int = 0  # of its disks, that the connection carried since the newest sealed epoch
    disk_bytes: int = 0
    unacked_blocks: int = 0  # of its disks, of 64 KiB, until RECEIVED: what would come again

    def to_event(self) -> dict[str, Any]:
        """The fields of the `checkpoint` event."""
        made: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("pause_ns", "extra_ns", "stood_ns"):
            made[name.replace("_ns", "_ms")] = ms(made.pop(name))
        made["stages"] = {f"{stage}_ms": ms(made.pop(f"{stage}_ns")) for stage in SENT_STAGES}
        made["bytes"] = made.pop("n_bytes")
        return made

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: sent {self.sent_pages} pages ({self.background_pages} in the background, "
            f"{self.zero_pages} zero), {self.n_bytes / 1e6:.1f} MB, pause {self.pause_ns / 1e6:.2f} ms"
        )
