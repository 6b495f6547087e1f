# SPDX-License-Identifier: Apache-2.0
"""One exception class per cause. str(error) is one sentence with the numbers; .hint says what to do, if that is known.

Codes are those of csrc/include/colocache.h (enum colocache_error) or a negative errno.
"""

from __future__ import annotations

import os


class ColocacheError(Exception):
    """Base of everything this package raises on purpose.

    `code` is the negative code of the C library (0 where only Python knows the cause); `hint` is what to do about it.
    """

    code: int = 0
    hint: str | None = None
    n_pages: int = 0  # of Cache.receive_stream: pages taken before it failed

    def __init__(self, sentence: str, *, hint: str | None = None, code: int | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        if hint is not None:
            self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.sentence} ({self.hint})" if self.hint else self.sentence


class ArgumentError(ColocacheError, ValueError):
    """An argument is out of its documented range."""

    code = -20001


class BusyError(ColocacheError):
    """Another live process owns this control region."""

    code = -20002
    hint = "stop its owner first; `colocache inspect` looks without owning"


class ExistsError(ColocacheError):
    """What was to be made exists already."""

    code = -20003
    hint = "attach to it, or remove it with `colocache clean`"


class NotColocacheError(ColocacheError):
    """No control region: wrong magic or size."""

    code = -20004


class LayoutError(ColocacheError):
    """The region was made by a build with another layout."""

    code = -20005
    hint = "use the build that made it, or start the pair anew"


class CorruptError(ColocacheError):
    """A checksum or an invariant does not hold; nothing was changed."""

    code = -20006
    hint = "this secondary can't be trusted: remove it and let the primary make a new one"


class ForeignImageError(ColocacheError):
    """Not the image (device, inode, size) that the region names."""

    code = -20007


class BlockError(ColocacheError, LookupError):
    """No such block, a name used twice, or too many blocks."""

    code = -20008


class RangeError(ColocacheError, IndexError):
    """Pages past the end of the block."""

    code = -20009


class LengthError(ColocacheError, ValueError):
    """A length is not what it must be."""

    code = -20010


class TailError(ColocacheError, ValueError):
    """A bitmap has bits set past its last page."""

    code = -20011


class EpochError(ColocacheError):
    """This epoch number can't be used now."""

    code = -20012


class SealedError(ColocacheError):
    """An epoch is sealed and its flush or load is not finished."""

    code = -20013


class NotSealedError(ColocacheError):
    """flush or loaded without a seal before."""

    code = -20014


class IncompleteError(ColocacheError):
    """Pages or device-state bytes of the epoch are missing; it was aborted."""

    code = -20015


class VetoError(ColocacheError):
    """The VM's check refused the device state; the epoch was aborted. The check's own exception is __cause__."""

    code = -20016


class NoStateError(ColocacheError):
    """There is no state to take over from."""

    code = -20017
    hint = "a secondary can take over once its first epoch is committed"


class LoadFailedError(ColocacheError):
    """The device state did not load; only a fresh VM may attach."""

    code = -20018


class FailedOverError(ColocacheError):
    """This secondary took over and is no longer a secondary."""

    code = -20019


class TooLargeError(ColocacheError, ValueError):
    """Device state or packet above its bound."""

    code = -20020


class NoMemoryError(ColocacheError):
    """The backing of an image or of the control region has too little room."""

    code = -20021


class PacketError(ColocacheError):
    """A message's header is damaged or breaks the rules."""

    code = -20022


class PeerLostError(ColocacheError):
    """The connection was closed."""

    code = -20023


class TimedOutError(ColocacheError):
    """Nothing moved on the connection for the time allowed."""

    code = -20024


class UnsupportedError(ColocacheError):
    """The kernel, the CPU or this build lacks what was asked for."""

    code = -20025


class LogLostError(ColocacheError):
    """A dirty log could not be read: every page must count as written (Cache.dirty_log_lost, Sender.mark_all)."""

    code = -20026


class OrderError(ColocacheError):
    """A call that the object's state does not allow now."""

    code = -20027


class StrategyError(ColocacheError):
    """The sealed epoch needs a flush strategy that this build does not have; nothing was changed."""

    code = -20028
    hint = "attach with the build that sealed it"


class MemoryModeError(ColocacheError):
    """The region was made with the other memory mode (mirror, bounded)."""

    code = -20029


class ReceivingError(ColocacheError):
    """Pages of this epoch are still being received: nothing was sealed or given up, the epoch is open as before."""

    code = -20030
    hint = "end them, or shut down their sockets, and call again"


class ClosedError(ColocacheError, ValueError):
    """The object was closed, or belongs to the process this one was forked from."""


class MemoryShortError(NoMemoryError):
    """Too little memory or too few huge pages: bytes needed, bytes available, and the command that helps."""

    def __init__(self, sentence: str, *, needed: int, available: int, command: str) -> None:
        super().__init__(sentence, hint=command)
        self.needed = needed
        self.available = available
        self.command = command


class SystemCallError(ColocacheError, OSError):
    """A system call failed; .errno says how."""

    def __init__(self, sentence: str, *, errno: int, hint: str | None = None) -> None:
        ColocacheError.__init__(self, sentence, hint=hint, code=-errno)
        self.errno = errno
        self.strerror = os.strerror(errno)

    def __str__(self) -> str:
        return ColocacheError.__str__(self)


def reason_of(error: OSError) -> str:
    """Why, in words: an OSError that a library makes of a sentence has no strerror."""
    return error.strerror or str(error) or type(error).__name__


BY_CODE: dict[int, type[ColocacheError]] = {
    cls.__dict__["code"]: cls for cls in ColocacheError.__subclasses__() if cls.__dict__.get("code")
}


def error_for(code: int, sentence: str) -> ColocacheError:
    """The exception for a negative code of the C library."""
    cls = BY_CODE.get(code)
    if cls is not None:
        return cls(sentence)
    if -4096 < code < 0:
        return SystemCallError(sentence, errno=-code)
    return ColocacheError(sentence, code=code)
