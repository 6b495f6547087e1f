# SPDX-License-Identifier: Apache-2.0
"""The small parent of a secondary: it holds the memory and the listening socket, and does nothing that could go wrong.

If the process that runs the virtual machine is killed or gives up, the memory is still here: a new one attaches.

If a device state did not load, the primary was told and runs on alone. A machine restarted now could be a second one
that the world sees, so none is: memory with a name is left for `secondary --attach`; with memory that has none, which
would go with this process, the keeper waits for its operator. SIGUSR2, the word that the primary is dead, starts a
fresh machine that attaches, loads the epoch and takes over. Until one has, the keeper waits again, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable

from colocache import Memory, Phase, inspect
from colocache.children import adopt_orphans, children, python_command, see_dead
from colocache.errors import ColocacheError
from colocache.replication.child import EXIT_AGAIN, EXIT_LOAD_FAILED, ChildConfig
from colocache.replication.events import Events
from colocache.replication.signals import Stop

RESTARTS_MAX = 5  # without an epoch committed in between: then it is not bad luck
STOP_SECONDS = 15.0  # for a child to end in order
POLL_SECONDS = 0.05
ORPHAN_SECONDS = 10.0  # for what a child left behind to die


class Keeper:
    """Runs child processes on `memory` until one ends by itself, or the keeper is stopped."""

    def __init__(
        self,
        memory: Memory,
        listener: socket.socket,
        config: Callable[[Memory, int], ChildConfig],
        events: Events,
        stop: Stop,
    ) -> None:
        self._memory = memory
        self._listener = listener
        self._config = config
        self._events = events
        self._stop = stop
        self._child: subprocess.Popen[bytes] | None = None
        self._unheard: set[int] = set()  # signals that came while there was no child: for the next one
        self._by_word = False  # the child was started on the operator's word, and is told so
        self.load_failed = False  # the memory holds an epoch that a fresh machine may load

    def pass_on(self, signum: int) -> None:
        """A signal for the virtual machine's process; for the next one, if this one has ended. For signal handlers."""
        child = self._child
        if child is None or _has_ended(child.pid):
            self._unheard.add(signum)
        else:
            os.kill(child.pid, signum)

    def run(self) -> int:
        """Exit status of the last child; negative: the signal that ended it because the keeper was stopped."""
        while True:
            status = self._run_children()
            self.load_failed = status == EXIT_LOAD_FAILED and not self._stop.is_set()
            if not self._must_wait(status) or not self._operators_word():
                return status
            self._by_word = True

    def _run_children(self) -> int:
        """One after the other, until one ends by itself."""
        restarts, epoch = 0, self._committed_epoch()
        while True:
            status = self._run_child()
            if self._stop.is_set() or (status >= 0 and status != EXIT_AGAIN):
                return status
            now = self._committed_epoch()
            restarts = 1 if now > epoch else restarts + 1
            epoch = max(epoch, now)
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else "gave up"
            if restarts > RESTARTS_MAX:
                self._events.emit(
                    "error",
                    f"the secondary's process {how}, {restarts} times without a checkpoint in between; giving up",
                )
                return 1
            self._events.emit(
                "restarted",
                f"the process that runs the secondary's machine {how}; a new one attaches to its memory",
                status=status,
                restarts=restarts,
            )

    # ---- after a load that failed ----

    def _must_wait(self, status: int) -> bool:
        """Would an epoch that no machine has taken over from go with this process?"""
        if self._memory.persistent or self._stop.is_set() or status == 0:
            return False
        return status == EXIT_LOAD_FAILED or (self._by_word and not self._took_over())

    def _operators_word(self) -> bool:
        """Hold the memory until the operator says that the primary is dead. False: the keeper was stopped."""
        self._unheard.discard(signal.SIGUSR1)  # there is no machine that could ask for a checkpoint
        epoch, pid = self._committed_epoch(), os.getpid()
        self._events.emit(
            "held",
            f"no machine runs; this process (pid {pid}) holds epoch {epoch} in memory that has no name. If the primary "
            f"is dead or stopped: `kill -USR2 {pid}` loads epoch {epoch} into a fresh machine, which takes over, and "
            f"what the primary did alone since is lost. Ctrl-C or `kill {pid}` gives the memory up",
            pid=pid,
            epoch=epoch,
            region=self._memory.name,
        )
        while not self._stop.wait(POLL_SECONDS):
            if signal.SIGUSR2 in self._unheard:
                return True
        return False

    def _took_over(self) -> bool:
        try:
            return inspect(self._memory).status.phase is Phase.FAILED_OVER
        except ColocacheError:
            return False

    def _committed_epoch(self) -> int:
        try:
            return inspect(self._memory).status.committed_epoch
        except ColocacheError:
            return 0  # there is no region yet

    def _run_child(self) -> int:
        fd = self._listener.fileno()
        if self._by_word:
            self._unheard.add(signal.SIGUSR2)
        config = self._config(self._memory, fd)
        adopt_orphans()
        others = children()
        command = python_command("colocache.replication.child", "main")
        # The child is born with the operator's signals blocked and takes them when it has its handlers
        # (stop_on_signals): one that comes before must wait, not kill it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
        try:
            with config.as_file() as stdin:
                # A session of its own: Ctrl-C reaches the keeper alone, which then ends its child in order.
                self._child = subprocess.Popen(
                    command, pass_fds=(*self._memory.fds, fd, *self._stdin(config)), stdin=stdin, start_new_session=True
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            unheard, self._unheard = self._unheard, set()
            for signum in unheard:
                self.pass_on(signum)
            while not self._stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._child.wait(POLL_SECONDS)
            return self._end_child(self._child)
        finally:
            if self._child.poll() is None:
                self._child.kill()
                self._child.wait()
            self._child = None
            # A machine may be a process of its own (a QEMU). It dies with its child, and its death is seen before
            # another machine starts on the same memory.
            see_dead(children() - others, ORPHAN_SECONDS)

    @staticmethod
    def _stdin(config: ChildConfig) -> list[int]:
        return [config.stdin_fd] if config.stdin_fd >= 0 else []

    def _end_child(self, child: subprocess.Popen[bytes]) -> int:
        """The keeper was stopped: the child is told and gets some time."""
        child.send_signal(signal.SIGTERM)
        try:
            return child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def _has_ended(pid: int) -> bool:
    """Has this child ended, waited for or not?"""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
