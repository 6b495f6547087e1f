# SPDX-License-Identifier: Apache-2.0
"""Both halves: what the primary must remember until it hears RECEIVED."""

from colocache.teach.play import Play, chapter


@chapter(
    "conversation",
    "Both halves of the conversation",
    question="Why does the primary keep a list of its own, unacked?",
    answer="A page that was sent may never have arrived, so the primary forgets it only when the other side has "
    "sealed.",
)
def conversation(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        play.step(
            pair,
            "A checkpoint is asked for",
            "The PVM pauses and takes its dirty log: each of these pages is waiting to be sent (w) and unacked. "
            "The log was cleared, so from now on unacked is the only place that knows these pages.",
            actor="pvm",
            call="sender.sync_dirty_log(log)",
            message="CHECKPOINT_REQUEST(2)",
        )
        pair.deliver(2, len(shape.pvm) // 2)
        play.step(
            pair,
            "Half of it is sent",
            "What was sent is no longer waiting, but it stays unacked (u): the PVM cannot know whether it arrived. "
            "The SVM's cache has it, with its bits in the PVM bitmap.",
            actor="wire",
            call="sender.send(socket, epoch=2)",
            message="PAGES(2)",
        )
        pair.on_svm("abort", 2, "the connection was lost")
        pair.reconnect()
        play.step(
            pair,
            "The connection breaks",
            "The SVM aborts epoch 2: nothing of it touches guest RAM, and its number is never used again. "
            "The bits and bytes that came are kept: extra dirty bits are always safe, missing ones never.",
            actor="nobody",
            call='cache.abort(2, "the connection was lost")',
            message="ABORT(2)",
        )
        pair.pvm_writes(shape.pvm_later)
        pair.pvm.sender.resend()
        play.step(
            pair,
            "Connected again",
            "Both ran on meanwhile, and the PVM wrote more, marked P3. "
            "All that is unacked waits to be sent again (w): not all of RAM, only what may be missing.",
            actor="pvm",
            call="sender.resend()",
            message="HELLO",
        )
        pair.pvm_pauses(3)
        pair.deliver(3)
        pair.on_svm("sync")
        pair.on_svm("device_state", 3)
        play.step(
            pair,
            "The next checkpoint carries both",
            "Epoch 3 brings what was unacked and what the log has gathered since. "
            "Some pages came twice, which costs a little time and nothing else.",
            actor="wire",
            call="sender.send(socket, epoch=3)",
            message="PAGES(3), VMSTATE_SIZE(3)",
        )
        pair.seal(3)
        play.step(
            pair,
            "Sealed: epoch 3 includes what epoch 2 had begun",
            "The flush set is the union of all bits since the last seal, the aborted attempt's among them. "
            "The PVM has not heard of it yet: its unacked is still full.",
            actor="svm",
            call="cache.seal(3)",
        )
        pair.received()
        play.step(
            pair,
            "RECEIVED empties unacked",
            "Now, and only now, the PVM may forget these pages and release its output. "
            "Had the connection been lost one moment earlier, the SVM would have told at reconnection that 3 is "
            "sealed.",
            actor="wire",
            call="sender.received()",
            message="VMSTATE_RECEIVED(3)",
        )
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "Whole again",
            "The flush makes guest RAM exactly epoch 3, and LOADED tells the PVM that the next epoch may come. "
            "No page was lost, though a connection was.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            message="VMSTATE_LOADED(3)",
            target=3,
        )
