# SPDX-License-Identifier: Apache-2.0
"""A machine's output and the queue that it goes into, put together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from colocache.outputs.apart import ApartOutput
from colocache.outputs.piece import CONSOLE

if TYPE_CHECKING:
    from colocache.outputs.held import HeldOutput
    from colocache.vmm.machine import SpeakingMachine


def connect(machine: SpeakingMachine, output: HeldOutput | ApartOutput) -> None:
    """From now on what `machine` says goes into `output`, which holds it up when it is full."""
    machine.on_output = partial(output.put, CONSOLE)
    machine.output_full = lambda: output.full
    if isinstance(output, ApartOutput):
        machine.on_reborn = output.loaded
