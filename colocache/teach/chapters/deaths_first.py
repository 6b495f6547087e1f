# SPDX-License-Identifier: Apache-2.0
"""The secondary dies before there is anything to go back to."""

from colocache.teach.play import Play, chapter


@chapter(
    "death-first",
    "Killed during the initial copy",
    kind="death",
    question="What if the secondary dies before epoch 1 is sealed?",
    answer="There is no secondary yet: the successor says so, and the initial copy starts again.",
)
def death_first(play: Play) -> None:
    shape = play.shape
    with play.new_pair(killable=True) as pair:
        pair.pvm_writes(shape.all)
        pair.pvm.sync()
        pair.deliver(1, shape.n_pages // 2)
        play.step(
            pair,
            "Half of RAM has come",
            "The secondary runs in a process of its own here, so that it can be killed for real. "
            "Nothing is sealed yet: the pair is not protected, and the PVM runs alone.",
            actor="wire",
            message="PAGES(1)",
        )
        assert pair.victim is not None  # noqa: S101 asked for above
        pair.victim.die()
        pair.svm_alive = False
        play.step(
            pair,
            "SIGKILL",
            "The process was killed and had no time to tidy up; its shared memory is still there, with half of the "
            "pages in the cache. "
            "The bitmaps shown are those that it left behind.",
            actor="svm",
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: the initial copy starts again",
            f'A new process attaches, and the engine reports: "{recovery.sentence}". '
            "All bits are cleared; the number 1 is spent, so the next attempt will be epoch 2.",
            actor="svm",
            call="Cache.attach(memory)",
        )
        pair.pvm.sender.mark_all()
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("device_state", 2)
        pair.seal(2)
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "Once more, from the start",
            "All of RAM is sent again and sealed, this time as epoch 2. Now there is a machine that could take over.",
            actor="svm",
            call="cache.seal(2); cache.flush(); cache.loaded()",
            target=2,
        )
