# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a QEMU."""

from __future__ import annotations

from colocache.vmm.errors import DeviceStateError, MachineError


class QemuError(MachineError):
    """QEMU refused a command, did not come up, or lacks something."""


class QemuSlowError(QemuError):
    """QEMU did not answer in time."""


class QemuDiedError(QemuError):
    """The QEMU process ended."""


class QemuLoadError(QemuError, DeviceStateError):
    """A fresh process did not take the device state."""
