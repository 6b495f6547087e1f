# SPDX-License-Identifier: Apache-2.0
"""The secondary's virtual machine and its cache, together: when it may run, and one epoch from last byte to running.

What always holds, and which verbs see to it:

* The machine runs only on memory and device state of one epoch (`can_run`), and its own branch from there on.
* Nothing writes guest RAM between the dirty log's taking and the seal but what marks its pages: `sync`, then `seal`.
* Before the seal guest RAM is the machine's own; from the seal on the epoch is finished, whatever anybody says.
* A machine whose load failed never runs again.
* What it said before a load is forgotten; nothing that it says leaves before it takes over.

===========  ======================================  ==========================================================
verb         machine                                 cache
===========  ======================================  ==========================================================
pause        stands
resume       runs, if it can; first its log goes
sync         its log is taken and cleared            SVM bits; all of them if the log is lost
seal         looks at the device state               the epoch is sealed, or given up and nothing else changed
flush        its disks become the sealed epoch's     guest RAM becomes the sealed epoch
load         becomes the epoch's, or never runs      loaded: the next epoch may come
finish       flush, load and resume
abort_open                                           the epoch that is arriving is given up
restart      becomes the sealed epoch, in a process that attached
hold         stands, from any thread, until it is resumed
give_up      its own branch goes, bounded memory's private pages; `resume` makes it the sealed epoch first
tidy         runs again                              memory of a committed epoch's pages goes back
===========  ======================================  ==========================================================
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from colocache import Cache, FlushResult, Phase, SealResult
from colocache.disks.apart import Disks, NoDisks
from colocache.errors import ColocacheError, EpochError, FailedOverError, IncompleteError, LogLostError, SealedError
from colocache.outputs.apart import ApartOutput
from colocache.outputs.typed import TypedInput
from colocache.replication.errors import ProtocolError, SecondaryLostError
from colocache.replication.events import Events
from colocache.replication.results import CheckpointResult
from colocache.replication.stages import Stages
from colocache.vmm.machine import REHEARSE_BYTES_MAX, LoadReport, Machine

FLUSH_TRIES = 3  # a flush may be repeated after an error: cache and flush set are still there


class Svm:
    """The machine on the guest images of `cache`. One thread."""

    def __init__(
        self,
        cache: Cache,
        machine: Machine,
        events: Events,
        output: ApartOutput | None = None,
        typed: TypedInput | None = None,
        disks: Disks | None = None,
    ) -> None:
        self.cache = cache
        self.disks: Disks = disks or NoDisks()
        self.output = output or ApartOutput(lambda *_: None)
        self.typed = typed or TypedInput()
        self.machine = machine
        self.events = events
        self.can_run = False  # memory and device state are of one epoch
        self.running = False
        self.runs = 0  # how often it was let run
        self.may_run: Callable[[], bool] | None = None  # asked before it runs; False: it stands as after `hold`
        self._order = threading.RLock()  # over the machine's running and standing
        self._branch_is_gone = False  # its memory is the image, and so it must become the sealed epoch again
        self._ran = False
        self._looked_at: bytes | None = None  # a device state that this machine can load
        self.wrong_pages = 0  # found at any moment
        self.verified_pages = 0

    # ---- running ----

    def pause(self) -> None:
        """Stop the machine at a step boundary."""
        with self._order:
            if self.running:
                self.machine.pause()
                self.running = False

    def hold(self, runs: int) -> bool:
        """Any thread: stop the machine until it is let run again, if it runs as it did when `runs` was read."""
        with self._order:
            if not self.running or self.runs != runs:
                return False
            self.pause()
            return True

    def resume(self) -> None:
        """Let the machine run, if there is a state to run from and nothing holds it."""
        with self._order:
            if self.running or not self.can_run:
                return
            if self._branch_is_gone:
                self.restart()
            if self.may_run is not None and not self.may_run():
                return
            if not self._ran:
                # What made its memory (flush, load) is in no bitmap and needs none: cache and guest RAM are equal.
                self.machine.discard_dirty_log()
                self._ran = True
            self.machine.resume()
            self.running = True
            self.runs += 1

    def give_up(self) -> None:
        """Bounded memory, the machine stands: its private pages go. It is the sealed epoch again when it runs next."""
        self.machine.give_up_private()
        self._branch_is_gone = True

    def restart(self) -> LoadReport:
        """In a process that attached: become the sealed epoch again. Raises SecondaryLostError if it does not load."""
        return self._load(self.cache.status().sealed_epoch)

    def verify(self) -> tuple[int, int]:
        """Compare all of RAM with the guest's history, standing: pages, wrong pages. Leaves it standing."""
        self.pause()
        report = self.machine.verify()
        self.verified_pages += report.n_pages
        self.wrong_pages += len(report.wrong)
        return report.n_pages, len(report.wrong)

    def rehearse(self) -> None:
        """With the newest state, what is about to be done with the next."""
        status = self.cache.status()
        if status.sealed_epoch and status.device_state_bytes <= REHEARSE_BYTES_MAX:
            with contextlib.suppress(Exception):  # whatever a machine says of it now, the look before a seal says again
                self.machine.rehearse(bytes(self.cache.device_state()))

    # ---- an epoch ----

    @property
    def failed_over(self) -> bool:
        """Failover was asked for, and the moment has come: this machine takes no more epochs and must take over."""
        return self.cache.status().phase is Phase.FAILED_OVER

    def abort_open(self, reason: str) -> int:
        """Give up the epoch that is arriving, if there is one: its number, or 0. Then look at `failed_over`."""
        self._looked_at = None
        status = self.cache.status()
        if status.receiving_epoch <= status.sealed_epoch:
            return 0
        try:
            self.cache.abort(status.receiving_epoch, reason[:200])
        except (EpochError, SealedError, FailedOverError):
            return 0  # it was given up before, by a seal that failed or by the operator's failover
        return status.receiving_epoch

    def put_device_state(self, epoch: int, state: bytes) -> None:
        """The device state of `epoch`, which arrived as a whole."""
        with self.cache.device_state_buffer(epoch, len(state)) as room:
            room[:] = state

    def look_at(self, state: memoryview) -> None:
        """The device state of the epoch that arrives, before its last pages are here. What is wrong with it the seal
        tells, which looks at it again unless it is still the same; a long one is looked at only then."""
        self._looked_at = None
        if len(state) > REHEARSE_BYTES_MAX:
            return
        with contextlib.suppress(Exception):
            copy = bytes(state)
            self.machine.check_device_state(copy)
            self._looked_at = copy

    def _check(self, state: memoryview) -> None:
        """As seal asks: bytes in shared memory, which could have changed since."""
        looked_at, self._looked_at = self._looked_at, None
        if looked_at is None or len(looked_at) != len(state) or looked_at != bytes(state):
            self.machine.check_device_state(state)

    def sync(self) -> None:
        """Get, OR into the SVM bitmap, clear, while the machine stands."""
        try:
            self.machine.sync_dirty_log(self.cache)
        except LogLostError:
            self.cache.dirty_log_lost()

    def seal(self, epoch: int, n_pages: int | None = None) -> SealResult:
        """The commit point, after `sync`. `n_pages`: how many the primary says it sent.

        VetoError, IncompleteError, FailedOverError: nothing was sealed.
        """
        try:
            log = self.disks.sealing()
        except IncompleteError as error:  # what is lost of a connection does not come on it again
            raise ProtocolError(str(error)) from error
        sealed = self.cache.seal(epoch, n_pages=n_pages, check=self._check, attachment=log)
        self.disks.epoch = epoch
        self.disks.sealed()
        return sealed

    def finish(self, seal: SealResult, stages: Stages) -> tuple[CheckpointResult, bool]:
        """Flush, load, run. `stages` began at CHECKPOINT_REQUEST; `pages` ended with the last byte.

        True beside the result: failover was asked for meanwhile, take over now; the machine stands. SecondaryLostError:
        the device state did not load; this machine never runs again.
        """
        flush = self.flush()
        stages.done("flush")
        report, take_over = self.load(seal.epoch)
        stages.done("load")
        if not take_over:
            self.resume()
        now = stages.done("resume")
        received = stages.span("pages").end
        return (
            CheckpointResult(
                epoch=seal.epoch,
                pvm_pages=seal.pvm_pages,
                svm_pages=seal.svm_pages,
                both_pages=seal.both_pages,
                flushed_pages=flush.n_pages,
                n_runs=flush.n_runs,
                n_bytes=flush.n_bytes,
                receive_ns=received - stages.begin,
                sync_ns=stages.span("sync").ns,
                check_ns=seal.check_ns,
                union_ns=seal.union_ns,
                seal_ns=seal.commit_ns + seal.clear_ns,
                answer_ns=stages.span("answer").ns,
                copy_ns=flush.copy_ns,
                forget_ns=flush.forget_ns,
                load_ns=max(0, stages.span("load").ns - report.verify_ns),
                resume_ns=stages.span("resume").ns,
                verify_ns=report.verify_ns,
                pause_ns=max(0, now - received - report.verify_ns),
                stop_ns=max(0, now - stages.begin - report.verify_ns),
                verified_pages=report.epoch_hashes_checked,
                wrong_pages=len(report.wrong_pages),
                apply_ns=self.disks.applied.ns,
                disk_writes=self.disks.applied.n_writes,
                disk_bytes=self.disks.applied.n_bytes,
            ),
            take_over,
        )

    def flush(self) -> FlushResult:
        """Guest RAM and disks become the sealed epoch; repeated after an error. Disks first: the flush says that the
        epoch is committed."""
        for left in reversed(range(FLUSH_TRIES)):
            try:
                self.disks.apply()
                return self.cache.flush()
            except ColocacheError as error:
                if not left:
                    raise
                self.events.emit("flush_error", f"the flush failed and is repeated: {error}", error=str(error))
        raise AssertionError("unreachable")

    def tidy(self) -> None:
        """What needs not be done while the machine stands. An error costs nothing: it is tried at the next page."""
        self.disks.tidy()
        try:
            self.cache.free_staged()
        except ColocacheError as error:
            self.events.emit("tidy_error", f"staged pages could not be freed yet: {error}", error=str(error))

    def load(self, epoch: int) -> tuple[LoadReport, bool]:
        """Become the sealed epoch, whose memory is here. True: take over now. SecondaryLostError."""
        report = self._load(epoch)
        take_over = self.cache.loaded(True)
        return report, take_over

    def _load(self, epoch: int) -> LoadReport:
        self.can_run = False
        try:
            report = self.machine.load_device_state(self.cache.device_state())
        except ColocacheError as error:
            if self.cache.status().phase is Phase.SEALING:
                self.cache.loaded(False)
            raise SecondaryLostError(f"the device state of epoch {epoch} did not load: {error}") from error
        self.can_run = True
        self._branch_is_gone = False
        self.output.loaded()
        self.verified_pages += report.epoch_hashes_checked
        self.wrong_pages += len(report.wrong_pages)
        return report
