# SPDX-License-Identifier: Apache-2.0
"""The reference machine: a real KVM guest, and a process guest where there is no KVM, whose memory can be checked.

It uses the engine as somebody else's VMM would, through the public Python API only. Start at machine.py.
"""

from colocache.vmm.machine import (
    DeviceStateError,
    GuestOptions,
    LoadReport,
    Machine,
    MachineError,
    Ram,
    VerifyReport,
    blocks_for,
    guest_kind_available,
    make_machine,
)

__all__ = [
    "DeviceStateError",
    "GuestOptions",
    "LoadReport",
    "Machine",
    "MachineError",
    "Ram",
    "VerifyReport",
    "blocks_for",
    "guest_kind_available",
    "make_machine",
]
