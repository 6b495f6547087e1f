# SPDX-License-Identifier: Apache-2.0
"""A hypervisor that nobody may change, protected from outside. Small processes stand in for it (teach/outside.py)."""

import os
import select
from collections.abc import Mapping

from colocache.teach.chapters.bounded import arrive, kib
from colocache.teach.chapters.deaths import kill
from colocache.teach.pair import Pair
from colocache.teach.play import Play, chapter
from colocache.teach.primary import WAIT_SECONDS
from colocache.teach.spoken import ChildError


def watched(processes: Mapping[str, Mapping[str, int]]) -> list[int]:
    """A descriptor of each process, which tells its end to whoever is not its parent."""
    return [os.pidfd_open(one["pid"]) for one in processes.values()]


def ended(watches: list[int]) -> int:
    """How many of them end within the time."""
    n_ended = sum(bool(select.select([one], [], [], WAIT_SECONDS)[0]) for one in watches)
    for one in watches:
        os.close(one)
    return n_ended


def refused_seal(pair: Pair, epoch: int) -> str:
    """Seal an epoch whose device state is damaged: what the engine says of it."""
    try:
        pair.seal(epoch)
    except ChildError as error:
        return str(error)
    raise ChildError(f"epoch {epoch} was sealed with a damaged device state")


@chapter(
    "stock-qemu",
    "A stock QEMU",
    question="Can a hypervisor that knows nothing of all this be protected?",
    answer="Yes, from outside: its memory is a file of ours, its device state is saved and loaded over its control "
    "socket, and each epoch begins in a fresh process, whose writes die with it.",
)
def stock_qemu(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step(outside=True, killable=True) as pair:
        play.step(
            pair,
            "Nothing in QEMU is changed",
            "QEMU is a program that runs virtual machines; here it stays as it is, and a driver beside it gives it "
            "orders over QMP, its control socket: stop, go on, save your devices. So that it can be recorded without "
            "a QEMU, a small program stands in for it here; the engine, the memory, the processes and their "
            "deaths are real.",
            target=1,
        )
        pair.pvm_writes(shape.pvm)
        play.step(
            pair,
            "The PVM's memory is a file of ours",
            "QEMU is told to take its guest's memory from a file that it is handed. Who writes there is noted by the "
            "kernel (its userfaultfd log), which a small library, loaded into QEMU at its start, hands out. "
            "That is the PVM's dirty log.",
            actor="pvm",
        )
        pair.svm_writes(shape.svm)
        running = pair.on_svm("processes")["running"]
        play.step(
            pair,
            "The SVM's memory must be bounded",
            f"The SVM's QEMU maps the file privately: its {kib(running['private'])} of writes are in no log, and need "
            "be in none. On guest RAM itself it could not be allowed: loading a device state writes memory behind "
            "every log, and a QEMU that died half way would have spoilt the only good image.",
            actor="svm",
            focus=shape.svm,
        )
        pair.on_svm("refill")
        waiting = pair.on_svm("processes")["waiting"]
        play.step(
            pair,
            "Another QEMU waits",
            "A second process with the same command line has been started ahead, and waits for a device state: this is "
            f"the pool. It has written {kib(waiting['private'])} of its memory, which is looked at each time: a page "
            "that it wrote early would hide the epoch's page for ever.",
            actor="svm",
        )
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("device_state", 2, True)
        play.step(
            pair,
            "Stop, save, send",
            "The driver stops the PVM and has it save its device state; xen-save-devices-state is QEMU's command for "
            "all but memory. It travels in an envelope with a checksum and the name of the machine it is of. "
            "On its way, this time, one bit of it was turned over.",
            actor="pvm",
            call="QMP: stop, xen-save-devices-state",
            message="PAGES(2), VMSTATE_SIZE(2)",
        )
        refusal = refused_seal(pair, 2)
        play.step(
            pair,
            "Looked at before the seal",
            f'Before the seal an epoch can still be refused, and it is: "{refusal}". QEMU itself loads such a state '
            "without a word. Epoch 2 is given up; guest RAM is epoch 1, and both machines run on.",
            actor="svm",
            call="cache.seal(2, check=...)",
            message="ABORT(2)",
        )
        pair.pvm.sender.resend()
        arrive(pair, 3)
        pair.seal(3)
        pair.received()
        play.step(
            pair,
            "Once more, and sealed",
            "The same pages and a good state came as epoch 3. It is sealed, so the PVM runs on at once: "
            "it waits neither for the flush nor for a load.",
            actor="svm",
            call="cache.seal(3); QMP: cont",
            message="PAGES(3), VMSTATE_RECEIVED(3)",
        )
        pair.on_svm("flush")
        pair.on_svm("loaded")
        running = pair.on_svm("processes")["running"]
        play.step(
            pair,
            "A fresh process becomes epoch 3",
            "Guest RAM was flushed; the old QEMU is killed, and its writes with it; the one that waited loads the "
            "state and is the SVM. No state is ever loaded over a machine that ran. A load that fails costs that "
            "process and not the epoch: another is tried, three in all.",
            actor="svm",
            call="cache.flush(); QMP: migrate-incoming, cont",
            message="VMSTATE_LOADED(3)",
            target=3,
        )
        pair.on_svm("free_staged")
        pair.on_svm("refill")
        pair.svm_writes(shape.svm_later)
        pair.pvm_writes(shape.pvm_later)
        processes = pair.on_svm("processes")
        play.step(
            pair,
            "The pool is filled again",
            "The next one is started once the SVM runs: a start takes the CPU that a load needs. "
            "The guest pays for its new process with a cold start after each checkpoint: page tables, or translated "
            "code, are empty.",
            actor="svm",
        )
        watches = watched(processes)
        kill(pair)
        n_ended = ended(watches)
        play.step(
            pair,
            "No orphans",
            "The process that drives both QEMUs gets a SIGKILL. A QEMU that outlived it would run on and talk to "
            "the world, beside the one that takes its place; so each asks the kernel, at its start, to die with its "
            "driver. "
            f"{n_ended} of {len(processes)} were seen to end.",
            actor="svm",
            target=3,
        )
        recovery = pair.attach()
        pair.on_svm("restart")
        play.step(
            pair,
            "Attach, and one more fresh process",
            f'When all are dead, another driver attaches: "{recovery.sentence}". Its QEMU loads that epoch\'s device '
            "state from shared memory. With a real one: colocache demo --guest qemu.",
            actor="svm",
            call="Cache.attach(memory)",
            target=3,
        )
