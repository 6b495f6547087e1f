# SPDX-License-Identifier: Apache-2.0
"""What CPU time another process took, which tells that a guest of which nothing is known runs."""

from __future__ import annotations

import time

from colocache.vmm.qemu.errors import QemuDiedError

CPU_CLOCK = 2  # with a process's number: the clock of its CPU time


def cpu_microseconds(pid: int) -> int:
    """Of all its threads together. QemuDiedError."""
    try:
        return time.clock_gettime_ns(~pid << 3 | CPU_CLOCK) // 1000
    except OSError as error:
        raise QemuDiedError(f"QEMU (process {pid}) has ended") from error
