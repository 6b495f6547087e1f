# SPDX-License-Identifier: Apache-2.0
"""What a user may choose among, once for the command line, the engine's Python and the tests. Imports nothing."""

from __future__ import annotations

# Kinds of guest, and where the Machine of each is: a new kind is a file and a line here. "auto" takes the first of them
# that runs on this machine.
GUESTS = {
    "kvm": "colocache.vmm.kvm:KvmMachine",
    "process": "colocache.vmm.process:ProcessMachine",
}
GUEST_KINDS = ("auto", *GUESTS)
