# SPDX-License-Identifier: Apache-2.0
"""What one QEMU says, handed to its machine as long as it is that machine's: one that waits or has been replaced is not
heard. In the thread of driver.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from colocache.vmm.machine import OnOutput
from colocache.vmm.qemu.qmp import Event

if TYPE_CHECKING:
    from colocache.vmm.qemu.process import QemuProcess


class Listener(Protocol):
    """What a voice asks of a machine, each time: its owner may change them."""

    on_output: OnOutput | None
    on_packet: OnOutput | None
    output_full: Callable[[], bool]

    @property
    def process(self) -> QemuProcess | None:
        """The one that is this machine."""

    def heard(self, event: Event) -> None:
        """QEMU's event, or its death."""


class Voice:
    """`of` is set once the process has come up; nothing that it said before counts."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.of: QemuProcess | None = None

    @property
    def _counts(self) -> bool:
        return self.of is not None and self.of is self._listener.process

    def event(self, event: Event) -> None:
        if self._counts:
            self._listener.heard(event)

    def output(self, data: bytes) -> None:
        if self._counts and self._listener.on_output is not None:
            self._listener.on_output(data)

    def packet(self, data: bytes) -> None:
        if self._counts and self._listener.on_packet is not None:
            self._listener.on_packet(data)

    def full(self) -> bool:
        return self._counts and self._listener.output_full()
