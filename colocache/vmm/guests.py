# SPDX-License-Identifier: Apache-2.0
"""Which guests there are, which of them runs here, and a machine of the kind that was asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from colocache.choices import GUESTS
from colocache.errors import ArgumentError
from colocache.vmm.errors import MachineError
from colocache.vmm.machine import Machine, MarkDirty, Ram, SpeakingMachine
from colocache.vmm.workload import GuestOptions

if TYPE_CHECKING:
    from colocache import BlockSpec
    from colocache.vmm.qemu.guest_disks import GuestDisks


def guest_class(kind: str) -> type[Machine]:
    """The class of the guests of this kind, which is loaded only now; "auto" is no kind."""
    module, name = GUESTS[kind].split(":")
    found: type[Machine] = getattr(importlib.import_module(module), name)
    return found


def guest_kind_available(kind: str = "auto") -> tuple[str, str]:
    """(kind, why): the guest that `kind` gives on this machine, and one sentence why.

    "auto" takes the first kind that works. MachineError: the kind that was named does not, with the command that helps.
    """
    if kind != "auto" and kind not in GUESTS:
        raise ArgumentError(f"a guest of kind {kind!r}: give one of {', '.join(['auto', *GUESTS])}")
    reasons: list[str] = []  # why those before it were passed over
    for name in GUESTS if kind == "auto" else (kind,):
        trouble = guest_class(name).trouble()
        if trouble is None:
            return name, "; ".join(reasons) or (f"{name} works here" if kind == "auto" else f"{name} was asked for")
        sentence, hint = trouble
        if kind != "auto":
            raise MachineError(sentence, hint=hint)
        reasons.append(f"{sentence} ({hint})")
    raise MachineError("no kind of guest runs on this machine: " + "; ".join(reasons))


def blocks_for(ram_bytes: int, kind: str = "auto") -> tuple[BlockSpec, ...]:
    """The RAM blocks of a machine of this kind with ram_bytes bytes in all. ArgumentError: it has no such size."""
    found, _ = guest_kind_available(kind)
    return guest_class(found).blocks_for(ram_bytes)


def disks_of_machine(machine: Machine) -> GuestDisks | None:
    """Its disks, as orders about them are given; None: it has none."""
    found: GuestDisks | None = getattr(machine, "disks", None)
    return found if found is not None and found.sizes else None


def make_machine(kind: str, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> SpeakingMachine:
    """A stopped machine on RAM that is mapped already; `kind` may be "auto". MachineError.

    mark_dirty(block, first_pfn, n_pages) is called after the machine itself wrote guest RAM: Cache.mark_dirty or
    Sender.mark_dirty.
    """
    found, _ = guest_kind_available(kind)
    return cast(SpeakingMachine, guest_class(found)(rams, options, mark_dirty))
