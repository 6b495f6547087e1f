# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module `colocache.vmm._guest`: the guest program and the hash of its pages (guest_program.c).

It does not link to libcolocache: the reference machine meets the engine only through the public Python API.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

DECLARATIONS = """
struct guest_mailbox {
    uint64_t step, limit, stop, salt, first_page, n_pages, run_pages, rewrite_below, run_below;
    uint64_t split_page, low_addr, high_addr, bitmap, pages_stored;
};
void guest_program(struct guest_mailbox *box);
const void *guest_program_text(uint64_t *len_bytes_out);
uint64_t guest_take_words(uint64_t *words, uint64_t *out, uint64_t n_words);
void guest_put_words(uint64_t *words, const uint64_t *bits, uint64_t n_words);
uint64_t guest_hash(const void *data, uint64_t len_bytes);
void guest_hash_pages(const void *addr, uint64_t n_pages, uint64_t page_size, uint64_t *out);
"""

# The program's bytes run where no C library is: nothing may be put in that calls out or reads other data.
# They come last on the compiler's command line, so they also undo what CFLAGS asks for.
FLAGS = [
    "-std=gnu11",
    "-O2",
    "-fno-stack-protector",
    "-fno-jump-tables",
    "-fno-sanitize=all",
]

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "colocache.vmm._guest",
    '#include "guest_program.c"\n',
    include_dirs=[str(HERE)],
    depends=[str(HERE / "guest_program.c"), str(HERE / "guest_program.h")],
    extra_compile_args=FLAGS,
    py_limited_api=True,
)
