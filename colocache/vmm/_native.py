# SPDX-License-Identifier: Apache-2.0
"""The only importer of the compiled module `_guest`: the guest program and the hash of its pages (guest_program.h)."""

from __future__ import annotations

try:
    from colocache.vmm._guest import ffi, lib
except ImportError as error:
    raise ImportError(
        f"the guest's compiled program does not load ({error}): install the package with `pip install .`; "
        "a source tree that was never built can't be imported"
    ) from error

__all__ = ["ffi", "lib"]
