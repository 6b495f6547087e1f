# SPDX-License-Identifier: Apache-2.0
"""The thread that runs a guest: go, keep to the rate, stop at a step boundary, and say so if the guest died.

The thread does nothing in Python while the guest runs: `enter` is one call that releases the interpreter lock and comes
back at a step boundary. It talks with its master through two queues: one GO and one STOP in, one word back per stop.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from colocache.vmm.errors import MachineError
from colocache.vmm.mailbox import NO_LIMIT, Mailbox

SLICE = 0.01  # seconds between two looks at the clock, when the guest keeps to a rate
BEHIND_MAX = 0.5  # seconds; a guest further behind its rate than this does not make up for it
GRACE = 0.02  # seconds until a guest that does not come out by itself is kicked
PATIENCE = 10.0  # seconds until one that does not come out at all is given up

GO, STOP, END = "go", "stop", "end"
STOPPED, DIED = "stopped", "died"

# Those that a thread's own mistake raises stay deliverable; all others go to other threads, so that none takes the
# guest out of its run and Ctrl-C reaches the main thread.
OWN_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}


class GuestThread:
    """Runs enter() again and again between go() and stop()."""

    def __init__(
        self, mailbox: Mailbox, enter: Callable[[], None], kick: Callable[[], None], steps_per_second: float, name: str
    ) -> None:
        self._mailbox = mailbox
        self._enter = enter
        self._kick = kick
        self._rate = steps_per_second
        self._behind = 0.0  # seconds of its work that a guest with a rate has not done yet, when it stands
        self._since, self._first = 0.0, 0  # a guest with a rate runs as if it had begun then, at that step
        self._orders: SimpleQueue[str] = SimpleQueue()
        self._answers: SimpleQueue[str] = SimpleQueue()
        self.running = False
        self.given_up = False  # enter() must not go back into the guest after a kick
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._body, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        """Of the thread, for signal.pthread_kill."""
        return self._thread.ident or 0

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def go(self) -> None:
        """Let the guest run. Returns at once."""
        self._refuse_dead()
        if not self.running:
            self._mailbox.box.stop = 0
            self.running = True
            self._orders.put(GO)

    def stop(self) -> None:
        """Back when the guest stands at a step boundary; at once if it stands already. Bounded; MachineError."""
        if not self.running:
            self._refuse_dead()
            return
        self._mailbox.box.stop = 1
        self._orders.put(STOP)
        deadline = time.monotonic() + PATIENCE
        wait = GRACE
        while True:
            try:
                answer = self._answers.get(timeout=wait)
                break
            except Empty:
                if time.monotonic() > deadline:
                    self.failure = self.failure or f"the guest reached no step boundary within {PATIENCE:g} s"
                    self._refuse_dead()
                self._kick()
                wait = 0.25
        self.running = False
        if answer == DIED:
            self._refuse_dead()

    def end(self) -> bool:
        """Stop the guest and the thread for good; True if the thread is gone."""
        self._mailbox.box.stop = 1
        self.given_up = True
        self._orders.put(STOP if self.running else END)
        self._orders.put(END)
        deadline = time.monotonic() + PATIENCE
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(GRACE)
            if self._thread.is_alive():
                self._kick()
        return not self._thread.is_alive()

    def _refuse_dead(self) -> None:
        if self.failure:
            raise MachineError(f"the guest no longer runs: {self.failure}")

    def _body(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - OWN_FAULTS)
        try:
            while self._orders.get() == GO:
                self._run()
                self._answers.put(STOPPED)
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread must be told to who waits for it
            self.failure = str(error) or type(error).__name__
            self._answers.put(DIED)

    def _run(self) -> None:
        """From GO until STOP; the STOP has been taken from the queue at return."""
        box = self._mailbox.box
        box.limit = NO_LIMIT
        if not self._rate:
            while not box.stop:
                self._enter()
            self._orders.get()
            return
        # Its clock goes on where it stood with it: else each pause would cost it half a slice of work.
        self._since, self._first = time.monotonic() - self._behind, int(box.step)
        try:
            self._keep_to_rate()
        finally:
            # By the clock in force now, which a guest that fell far behind has had set anew.
            self._behind = min(BEHIND_MAX, max(0.0, self._behind_at(time.monotonic())))

    def _behind_at(self, now: float) -> float:
        """Seconds of its work that the guest has not done by `now`; below 0 if it is ahead."""
        return now - self._since - (int(self._mailbox.box.step) - self._first) / self._rate

    def _keep_to_rate(self) -> None:
        """From GO until STOP, by the clock that _run has set."""
        box = self._mailbox.box
        while True:
            due = self._first + int((time.monotonic() - self._since) * self._rate) + 1
            if due > box.step:
                box.limit = due
                self._enter()
                if box.stop:
                    self._orders.get()
                    return
            now = time.monotonic()
            if self._behind_at(now) > BEHIND_MAX:
                self._since, self._first = now, int(box.step)
            wait = max(SLICE, (int(box.step) + 1 - self._first) / self._rate - (now - self._since))
            try:
                self._orders.get(timeout=wait)
                return
            except Empty:
                pass
