# SPDX-License-Identifier: Apache-2.0
"""Before anything can be protected: all of RAM goes over once."""

from colocache.teach.play import Play, chapter


@chapter(
    "in-step",
    "In step",
    question="How do two machines become one and the same?",
    answer="All of RAM is sent once, into a second full copy of memory, and epoch 1 is flushed from there.",
)
def in_step(play: Play) -> None:
    shape = play.shape
    with play.new_pair() as pair:
        play.step(
            pair,
            "Two machines, so that one may die",
            "Two hosts run the same virtual machine. The world talks to the primary (PVM); the secondary (SVM) "
            "computes the same, and stands ready to take over when the primary is lost.",
        )
        play.step(
            pair,
            "Made equal, again and again",
            "Each has a clock of its own, so the two slowly drift apart, and the SVM must be made equal to the PVM "
            "again: that is a checkpoint, and the state at it is an epoch, numbered 1, 2, 3. "
            "A checkpoint comes after a set time, half a second say, or sooner if somebody asks, for instance because "
            "the answers of the two begin to differ.",
        )
        play.step(
            pair,
            "Three copies of memory",
            "The PVM's host holds one copy of guest memory; the SVM's host holds two: guest RAM, on which the SVM runs "
            "(SVM memory here), and the cache, in which the next epoch gathers. "
            "That is the price of protection, twice the guest's memory on this host; what it buys is this lesson's "
            "subject. Both lie in shared memory: that outlives the SVM's process, though not its host.",
        )
        pair.pvm_writes(shape.all)
        play.step(
            pair,
            "The PVM boots",
            "The PVM's guest writes all of its memory; P1 in a page means: written by the PVM on the way to epoch 1. "
            "Its hypervisor keeps a dirty log, which tells which pages the guest wrote; the SVM does not run yet.",
            actor="pvm",
        )
        pair.pvm.sync()
        play.step(
            pair,
            "Everything is still to be sent",
            "The PVM takes its dirty log and notes each page in a list called unacked: not acknowledged by the other "
            "side. A page leaves that list only when the SVM's host says that the whole epoch is safe; until then it "
            "may have to be sent again.",
            actor="pvm",
            call="sender.sync_dirty_log(log)",
        )
        half = shape.n_pages // 2
        pair.deliver(1, half)
        play.step(
            pair,
            "Pages arrive beside guest RAM",
            "Half of the pages have come: their bytes are in the cache, and each has its bit in the PVM bitmap, which "
            "notes what came from the PVM. SVM memory is untouched, and it will stay so until the epoch is complete.",
            actor="wire",
            call="cache.receive_stream(socket)",
            message="PAGES(1)",
        )
        pair.pvm_pauses(1)
        pair.deliver(1)
        pair.on_svm("device_state", 1)
        play.step(
            pair,
            "The last pages, and the registers",
            "The PVM pauses, and the rest arrives together with its registers and devices, the device state. "
            "Now the cache is exactly what PVM memory is.",
            actor="wire",
            call="cache.device_state_buffer(1, n)",
            message="PAGES(1), VMSTATE_SIZE(1)",
        )
        pair.seal(1)
        pair.received()
        play.step(
            pair,
            "Epoch 1 is sealed",
            "One word in shared memory now says that epoch 1 is complete: that is the seal, and the PVM is told "
            "RECEIVED, which empties unacked. "
            "The flush set, the list of pages to copy, holds every page, because every page came.",
            actor="svm",
            call="cache.seal(1)",
            message="VMSTATE_RECEIVED(1)",
        )
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "In step",
            "The flush copied every page of the flush set from the cache over guest RAM. "
            "Three images are the same, and for the first time there is a machine that could take over.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            message="VMSTATE_LOADED(1)",
            target=1,
        )
