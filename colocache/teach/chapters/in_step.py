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
            "Two hosts run the same virtual machine: the primary (PVM), which the world talks to, and the secondary "
            "(SVM), which stands ready to take over. They drift apart, so now and then the SVM is made equal to the PVM"
            " again: that is a checkpoint, and the state at it an epoch, numbered 1, 2, 3. "
            "What tells which pages a guest wrote is its hypervisor's dirty log.",
        )
        play.step(
            pair,
            "Three copies of memory",
            "The PVM's host holds one copy of guest memory; the SVM's host holds two: guest RAM, on which the "
            "SVM runs, and the cache. All three are still empty, and so is every bitmap. "
            "What the SVM's host holds lies in its shared memory: it outlives the SVM's process, so that a new one can "
            "attach to it, but not the host.",
        )
        pair.pvm_writes(shape.all)
        play.step(
            pair,
            "The PVM boots",
            "The PVM's guest writes all of its memory; P1 in a page means: written by the PVM on the way to epoch 1. "
            "The SVM does not run yet.",
            actor="pvm",
        )
        pair.pvm.sync()
        play.step(
            pair,
            "Everything is still to be sent",
            "Each page that is taken from the PVM's dirty log goes into unacked before it is read. "
            "A bit leaves unacked only when the other side has sealed: until then the page may have to be sent "
            "again.",
            actor="pvm",
            call="sender.sync_dirty_log(log)",
        )
        half = shape.n_pages // 2
        pair.deliver(1, half)
        play.step(
            pair,
            "Pages arrive beside guest RAM",
            "Half of the pages have come: their bytes are in the cache, and each has its bit in the PVM bitmap. "
            "SVM memory is untouched, and it will stay so until the epoch is complete.",
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
            "One word in shared memory now says that epoch 1 is complete, and the PVM is told RECEIVED, which "
            "empties unacked. "
            "The flush set holds every page, because every page came.",
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
