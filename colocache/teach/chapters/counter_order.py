# SPDX-License-Identifier: Apache-2.0
"""Run wrongly on purpose: the right things in the wrong order."""

from colocache.teach.play import Play, chapter


@chapter(
    "clear-first",
    "Clearing bits before copying",
    kind="counter",
    question="What if the list of pages is cleared before they are copied?",
    answer="A process that dies in between takes the list with it: its successor finds nothing to do, and torn memory.",
)
def clear_first(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step(killable=True) as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        pair.on_svm("device_state", 2)
        bits = pair.svm_bits()
        union = [p == "1" or s == "1" for p, s in zip(bits["pvm"], bits["svm"], strict=True)]
        assert pair.victim is not None  # noqa: S101 asked for above
        pair.victim.put_list(union)
        pair.origin = "".join(
            {"10": "P", "01": "S", "11": "B"}.get(p + s, ".") for p, s in zip(bits["pvm"], bits["svm"], strict=True)
        )
        pair.svm_list = pair.victim.get_list()
        play.step(
            pair,
            "A flush that looks like the engine's",
            "This secondary keeps its own list of the union in shared memory, in the place of seal and flush set. "
            "It takes the list, clears it, and copies: short, and quick.",
            actor="svm",
        )
        pair.victim.stop_at("clear_then_copy", sum(union) // 2)
        pair.svm_list = pair.victim.get_list()
        play.step(
            pair,
            "Cleared, and half copied",
            "The list is empty already, as if all were done, but only the first half of the pages has been copied. "
            "What remains is known to this process alone, in its private memory.",
            actor="svm",
            target=2,
        )
        pair.victim.kill()
        pair.svm_alive = False
        play.step(
            pair,
            "SIGKILL",
            "The private memory goes with the process. In shared memory nothing tells that a flush was under way.",
            actor="svm",
            target=2,
        )
        left = pair.svm_list.count("1")
        play.step(
            pair,
            "The successor finds nothing to do",
            f"Its list has {left} pages, so it believes that guest RAM is epoch 2, and would run on torn memory. "
            "The engine keeps its flush set unchanged until every page is copied and the epoch is marked committed.",
            actor="svm",
            target=2,
        )


@chapter(
    "received-early",
    "RECEIVED before seal",
    kind="counter",
    question="What if the PVM is told RECEIVED before the epoch is sealed?",
    answer="The PVM forgets pages that never arrived and lets out what no other machine can stand for.",
)
def received_early(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2, len(shape.pvm) // 2)
        # The other half was on its way when the answer was given: it left the sender and is lost with the link.
        while pair.pvm.send(pair.sockets[0], 2, 16):
            pass
        pair.received()
        play.step(
            pair,
            "RECEIVED, a little early",
            "Half of epoch 2 has arrived, the other half is in the network, and the secondary already says "
            "RECEIVED to save a moment. "
            "The PVM empties unacked and lets its output out: the world sees epoch 2.",
            actor="wire",
            call="sender.received()",
            message="VMSTATE_RECEIVED(2)",
        )
        pair.on_svm("abort", 2, "the connection was lost")
        pair.reconnect()
        play.step(
            pair,
            "The connection breaks",
            "The half in the network is lost, and epoch 2 can never be sealed. "
            "If the PVM died now, the SVM would take over from a state that contradicts what the world has seen.",
            actor="nobody",
            call='cache.abort(2, "the connection was lost")',
            message="ABORT(2)",
        )
        pair.pvm_writes(shape.pvm_later)
        pair.pvm.sender.resend()
        pair.pvm_pauses(3)
        sent = pair.deliver(3)
        pair.on_svm("sync")
        pair.on_svm("device_state", 3)
        play.step(
            pair,
            "Connected again, and nothing is sent again",
            f"unacked was empty, so only what the PVM wrote since is sent: {sent} pages. "
            "The lost half of epoch 2 is in no list on either side.",
            actor="pvm",
            call="sender.resend()",
            message="PAGES(3), VMSTATE_SIZE(3)",
        )
        pair.seal(3)
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "Epoch 3 is sealed, and wrong",
            "The cache itself lacks the lost pages, so the flush copies old bytes over guest RAM. "
            "Every later epoch is built on this cache: the marked pages stay wrong until the PVM happens to "
            "write them again.",
            actor="svm",
            call="cache.seal(3); cache.flush(); cache.loaded()",
            target=3,
        )
