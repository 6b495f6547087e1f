# SPDX-License-Identifier: Apache-2.0
"""Python's values as the C library takes them, checked on the way: numbers, buffers, descriptors, times."""

from __future__ import annotations

import math
import operator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from colocache._native import ffi
from colocache.errors import ArgumentError
from colocache.results import Attachment

U64_MAX = (1 << 64) - 1
INT_MAX = (1 << 31) - 1

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]


class HasFileno(Protocol):
    def fileno(self) -> int: ...


def u64(value: int, what: str) -> int:
    """`value` as the C library takes it; ArgumentError if it is not an integer from 0 to 2^64 - 1."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ArgumentError(f"{what} is {value!r}, not an integer") from error
    if not 0 <= number <= U64_MAX:
        raise ArgumentError(f"{what} is {number}: it must be from 0 to 2^64 - 1")
    return number


def put_attachment(args: Any, attachment: Attachment) -> None:
    """Into the arguments of a seal."""
    if attachment.slot not in (0, 1):
        raise ArgumentError(f"slot {attachment.slot} of an attachment: there are 0 and 1")
    args.attachment_slot = attachment.slot
    args.attachment_bytes = u64(attachment.n_bytes, "bytes of the attachment")
    args.attachment_checksum = u64(attachment.checksum, "checksum of the attachment")


def words_of(words: npt.ArrayLike, n_pages: int) -> tuple[npt.NDArray[np.uint64], Any]:
    """Contiguous u64 words for n_pages bits, and the C pointer into them; ArgumentError for another length or type."""
    try:
        array = np.ascontiguousarray(words)
    except ValueError as error:
        raise ArgumentError(f"bitmap words must be one uint64 array: {error}") from error
    if array.dtype != np.uint64:
        raise ArgumentError(f"bitmap words are {array.dtype}, not uint64")
    if array.ndim != 1 or array.size != -(-n_pages // 64):
        raise ArgumentError(f"{array.size} bitmap words for {n_pages} pages: it takes {-(-n_pages // 64)}")
    return array, ffi.from_buffer("uint64_t[]", array)


def fd_of(fd: int | HasFileno) -> int:
    """A descriptor number from itself or from a socket or file."""
    try:
        number = operator.index(fd if isinstance(fd, int) else fd.fileno())
    except (AttributeError, TypeError, ValueError) as error:  # ValueError: a closed file says so
        raise ArgumentError(f"{fd!r} is no descriptor: it takes a number, or an open file or socket") from error
    if not 0 <= number <= INT_MAX:
        raise ArgumentError(f"descriptor {number} is not open")
    return number


def milliseconds(timeout: float | None) -> int:
    """Seconds as C takes them; None, for ever, is -1."""
    if timeout is None:
        return -1
    try:
        in_order = timeout >= 0  # not so for nan
    except TypeError as error:
        raise ArgumentError(f"timeout is {timeout!r}: seconds from 0, or None for ever") from error
    if not in_order:
        raise ArgumentError(f"timeout is {timeout}: seconds from 0, or None for ever")
    return min(math.ceil(timeout * 1000), INT_MAX) if timeout < INT_MAX else INT_MAX


def bytes_of(data: Buffer) -> Any:
    """The bytes of a buffer where they are, without a copy. With `with`, or an error's traceback would hold the buffer
    that its owner wants to release."""
    try:
        return ffi.from_buffer("unsigned char[]", data)
    except (TypeError, ValueError, BufferError) as error:
        raise ArgumentError(f"pages come as contiguous bytes, not as this {type(data).__name__}: {error}") from error
