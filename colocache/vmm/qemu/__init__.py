# SPDX-License-Identifier: Apache-2.0
"""A stock QEMU as the guest, driven from outside: no patch, no x-colo, no migration of RAM by QEMU.

Its RAM lies in our images, its writes are seen by a userfaultfd that a preloaded library hands out, and its device
state is saved by `xen-save-devices-state` and loaded into a fresh process that was started ahead.

    command_line.py   the user's command line: what it asks for, and what of it can't work
    wiring.py         our options, added to the user's
    process.py        one QEMU process: started, spoken to, seen to die
    qmp.py            the conversation with it

Needs the package qemu.qmp (`pip install 'colocache[qemu]'`) and a QEMU of version 7.2 or newer.
"""
