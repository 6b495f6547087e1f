# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module `colocache._engine`: the declarations are the text of the public C header itself.

The module holds no engine code. It links to libcolocache.so.0, which setup.py builds from csrc/, so that C programs
and Python programs run the same code.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

PACKAGE = Path(__file__).resolve().parent
SOURCE = PACKAGE.parent / "csrc" / "include" / "colocache.h"
# An installed package has no csrc, but its own copy of the header.
HEADER = SOURCE if SOURCE.is_file() else PACKAGE / "include" / "colocache.h"

BEGIN, END = "/* cffi: begin */", "/* cffi: end */"

# The functions C calls back, written in Python in _callbacks.py.
CALLBACKS = """
extern "Python" int colocache_py_check(void *, const void *, uint64_t);
extern "Python" void colocache_py_log(void *, int, const char *);
"""


def declarations(header: Path = HEADER) -> str:
    """The part of the public header that cffi reads; raises ValueError if its two marks are not there, in order."""
    text = header.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    body, end, _ = rest.partition(END)
    if not begin or not end or END in head:
        raise ValueError(f"{header} must hold the lines {BEGIN!r} and {END!r}, in this order")
    return body


ffibuilder = FFI()
ffibuilder.cdef(declarations() + CALLBACKS)
# setup.py adds the directory of the library it has just linked.
ffibuilder.set_source(
    "colocache._engine",
    '#include "colocache.h"\n',
    include_dirs=[str(HEADER.parent)],
    libraries=[":libcolocache.so.0"],
    runtime_library_dirs=["$ORIGIN/lib"],
    depends=[str(HEADER)],
    py_limited_api=True,
)
