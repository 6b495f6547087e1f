# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module `colocache.vmm.qemu._guest`: the small guest as bytes (guest_kernel.c)."""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
FLAGS = runpy.run_path(str(HERE.parent / "_guest_build.py"))["FLAGS"]  # it contains the same program

DECLARATIONS = """
const void *guest_kernel_boot(uint64_t *len_bytes_out);
const void *guest_kernel_text(uint64_t *len_bytes_out, uint64_t *entry_out);
uint64_t guest_kernel_ticks(void);
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "colocache.vmm.qemu._guest",
    '#include "guest_kernel.c"\n',
    include_dirs=[str(HERE)],
    depends=[
        str(HERE / name) for name in ("guest_kernel.c", "guest_kernel.h", "../guest_program.c", "../guest_program.h")
    ],
    extra_compile_args=FLAGS,
    py_limited_api=True,
)
