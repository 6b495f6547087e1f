# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between the two sides, one class per cause, besides the engine's own errors."""

from __future__ import annotations

from colocache.errors import ColocacheError


class ProtocolError(ColocacheError):
    """The peer sent something that the conversation does not allow here; the session ends."""


class RefusedError(ColocacheError):
    """The two sides do not belong together: another pair, another history, other RAM, or declared lost."""


class DeclaredLostError(RefusedError):
    """The primary has declared this secondary lost: it must never take over."""


class SessionEndedError(ColocacheError):
    """The peer ended the session, and this is its sentence."""


class SecondaryLostError(ColocacheError):
    """The secondary says that it can't take over any more (its device state did not load): the primary is alone."""


class TookOverError(ColocacheError):
    """The secondary has become the machine the world sees; this primary must not run on."""
