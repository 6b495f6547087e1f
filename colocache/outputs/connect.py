# SPDX-License-Identifier: Apache-2.0
"""A machine's output and the queue that it goes into, put together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from colocache.outputs.apart import ApartOutput
from colocache.outputs.front import Front
from colocache.outputs.piece import CARD, CONSOLE

if TYPE_CHECKING:
    from colocache.outputs.held import HeldOutput
    from colocache.outputs.typed import TypedInput
    from colocache.vmm.machine import SpeakingMachine


def connect(
    machine: SpeakingMachine, output: HeldOutput | ApartOutput, front: Front, typed: TypedInput | None = None
) -> None:
    """From now on what `machine` says goes into `output`, which holds it up when it is full, and what comes to `front`
    goes to the machine, what is typed there by way of `typed`."""
    machine.on_output = partial(output.put, CONSOLE)
    machine.on_packet = partial(output.put, CARD)
    front.listen(machine.give_packet)
    if typed is not None and machine.hears:
        typed.plug(machine.give_input, machine.take_input_back)
    front.hear(typed if machine.hears else None)
    machine.output_full = lambda: output.full
    if isinstance(output, ApartOutput):
        machine.on_reborn = output.loaded
