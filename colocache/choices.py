# SPDX-License-Identifier: Apache-2.0
"""What a user may choose among, once for the command line, the engine's Python and the tests. Imports nothing."""

from __future__ import annotations

# Kinds of guest, and where the Machine of each is: a new kind is a file and a line here. "auto" takes the first of them
# that runs on this machine.
GUESTS = {
    "kvm": "colocache.vmm.kvm:KvmMachine",
    "process": "colocache.vmm.process:ProcessMachine",
    "qemu": "colocache.vmm.qemu.machine:QemuMachine",
}
GUEST_KINDS = ("auto", *GUESTS)

BACKINGS = ("auto", "hugetlb", "thp", "shm")  # of an image; see backing.py
MEMORY_MODES = ("mirror", "bounded")  # a secondary with two images, or one and the pages of the open epoch
COPIES = ("auto", "libc", "avx2", "avx512", "neon")  # how the flush copies pages
VERIFY = ("all", "last", "none")  # the checkpoints whose every page is compared with the primary's hash of it
KILL_POINTS = ("running", "receiving", "sealed", "random")  # where the demo's primary dies
PAIR_BYTES_MAX = 64  # of a pair's name
DEVICE_STATE_MAX = 1 << 40  # bytes of a device state, at most, as the engine says
STREAMS_MAX = 16  # connections that carry the pages of one pair
ACCELERATORS = ("auto", "kvm", "tcg")  # of the small QEMU guest
RESUME_AT = ("received", "loaded")  # when the primary runs again: its epoch is sealed, or the secondary runs from it
TRANSPORTS = ("unix", "tcp")  # what the demo's two sides meet on
