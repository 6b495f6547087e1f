# SPDX-License-Identifier: Apache-2.0
"""Commands that run a function of this package in a new Python with the same import path.

`python -m` would put the current directory first, where a source tree that was never built may lie.
"""

from __future__ import annotations

import sys


def python_command(module: str, function: str, *args: str) -> list[str]:
    """The argument list for subprocess: calls module.function() with `args` as sys.argv[1:]."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function} as f; f()"
    return [sys.executable, "-c", code, *args]
