# SPDX-License-Identifier: Apache-2.0
"""The only importer of the compiled module: its `ffi` and `lib`, and the step from return codes to exceptions."""

from __future__ import annotations

from typing import Any

from colocache.errors import ColocacheError, error_for

try:
    from colocache._engine import ffi, lib
except ImportError as error:
    raise ImportError(
        f"colocache's compiled engine does not load ({error}): install the package with `pip install .`; "
        "a source tree that was never built can't be imported"
    ) from error

__all__ = ["check", "error_from", "ffi", "lib"]


def error_from(code: int) -> ColocacheError:
    """The exception for the call on this thread that has just returned `code`, with the library's own sentence."""
    sentence = ffi.string(lib.colocache_last_error()) or ffi.string(lib.colocache_strerror(code))
    return error_for(code, sentence.decode("utf-8", "replace"))


def check(code: int) -> int:
    """`code` itself if it is 0 or positive; raises the exception for it if it is negative."""
    if code < 0:
        raise error_from(code)
    return code


def version() -> str:
    """Version of the loaded C library, as `major.minor.patch`."""
    number: int = lib.colocache_version()
    return f"{number >> 16}.{number >> 8 & 255}.{number & 255}"


def struct(kind: str, **fields: Any) -> Any:
    """A zeroed C struct with struct_size set, and `fields` filled in."""
    made = ffi.new(f"struct {kind} *")
    made.struct_size = ffi.sizeof(f"struct {kind}")
    for name, value in fields.items():
        setattr(made, name, value)
    return made
