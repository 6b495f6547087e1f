# SPDX-License-Identifier: Apache-2.0
"""The reference machine: a real KVM guest, and a process guest where there is no KVM, whose memory can be checked.

It uses the engine as somebody else's VMM would, through the public Python API only. Start at README.md here.
"""

from colocache.vmm.errors import DeviceStateError, MachineError
from colocache.vmm.guests import blocks_for, guest_kind_available, make_machine
from colocache.vmm.machine import LoadReport, Machine, Ram, VerifyReport
from colocache.vmm.workload import GuestOptions

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
