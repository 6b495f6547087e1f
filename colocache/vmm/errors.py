# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with the reference machine."""

from __future__ import annotations

from colocache.errors import ColocacheError


class MachineError(ColocacheError):
    """The machine can't be made, or its guest stopped running."""


class DeviceStateError(MachineError):
    """A device state that this machine can't be: the veto before seal."""
