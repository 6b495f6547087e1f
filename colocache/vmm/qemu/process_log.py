# SPDX-License-Identifier: Apache-2.0
"""The kernel's dirty log of what a QEMU process writes to its guest's memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from colocache.vmm.machine import Ram
from colocache.vmm.qemu.errors import QemuDiedError
from colocache.vmm.qemu.process import QemuProcess

if TYPE_CHECKING:
    from colocache import ProcessDirtyLog


def log_of(process: QemuProcess, ram: Ram, *, kvm_maps_it: bool) -> ProcessDirtyLog:
    """Logs from now on. QemuDiedError; LogLostError at a sync once the process has ended."""
    from colocache import ProcessDirtyLog, UffdRange

    ranges = [UffdRange(ram.index, 0, ram.n_pages, process.address())]
    try:
        pagemap = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise QemuDiedError(f"QEMU (process {process.pid}) has ended") from error
    try:
        return ProcessDirtyLog(process.userfault, pagemap, ranges, kvm_maps_it=kvm_maps_it)
    finally:
        os.close(pagemap)
