# SPDX-License-Identifier: Apache-2.0
"""The chapters on bounded memory and on a stock QEMU say what the engine and the kernel did."""

from __future__ import annotations

import pytest
from recorded_lesson import at, pages, recorded

from colocache.teach.outside import OutsideSecondary
from colocache.teach.pair import pair_in_step
from colocache.teach.recording import Lesson, Step
from colocache.teach.shape import Shape


@pytest.fixture(params=[64, 250])
def lesson(request: pytest.FixtureRequest) -> Lesson:
    return recorded(request.param)


def test_with_bounded_memory_guest_ram_is_the_newest_committed_epoch_at_every_step(lesson: Lesson) -> None:
    for name in ("bounded", "stock-qemu"):
        chapter = lesson.chapter(name)
        assert chapter.memory == "bounded"
        for step in chapter.steps:
            assert step.ram == chapter.epochs[step.status["committed"]], step.title
            assert not pages(step.bitmaps["svm"]), "who wrote a page is in no bitmap"
            own = {pfn for pfn, page in enumerate(step.images["svm"]) if page != step.ram[pfn]}
            assert {step.images["svm"][pfn][0] for pfn in own} <= {"S"}, "it differs by what the SVM wrote, and no more"
    assert {chapter.memory for chapter in lesson.chapters} == {"mirror", "bounded"}


def test_the_cache_of_bounded_memory_holds_what_has_come_and_is_empty_again(lesson: Lesson) -> None:
    chapter = lesson.chapter("bounded")
    arriving, attached = at(chapter, "The cache holds what came, and no more"), at(chapter, "Attach: restart, always")

    def there(step: Step) -> set[int]:
        return {pfn for pfn, page in enumerate(step.images["cache"]) if page != "-"}

    assert there(arriving) == pages(arriving.bitmaps["pvm"]) != set()
    assert f"the cache takes {4 * len(there(arriving))} KiB" in arriving.text, "as the kernel counts it"
    gone = at(chapter, "Gone: what a broken epoch had brought")
    for step in (chapter.steps[0], attached, at(chapter, "The memory goes back"), gone):
        assert there(step) == set()
        assert not pages(step.bitmaps["pvm"])
    assert pages(gone.bitmaps["unacked"]), "what came is sent again"


def test_with_bounded_memory_the_flush_copies_what_came_and_forgets_what_the_svm_wrote(lesson: Lesson) -> None:
    chapter, plain = lesson.chapter("bounded"), lesson.chapter("union").steps[1].bitmaps
    wrote, sealed, flushed = (
        at(chapter, title)
        for title in ("Its writes are its own", "The flush set is what came", "Copied, and forgotten")
    )
    private = {pfn for pfn, page in enumerate(wrote.images["svm"]) if page == "S2"}
    assert private == pages(plain["svm"])
    assert f"The kernel counts {4 * len(private)} KiB" in wrote.text
    assert pages(sealed.bitmaps["flush"]) == pages(plain["pvm"]) != pages(plain["pvm"]) | pages(plain["svm"])
    assert flushed.verdict["kind"] == "epoch"
    assert "counts 0 KiB" in flushed.text


def test_with_bounded_memory_a_death_while_pages_arrive_leaves_an_epoch_to_restart_from(lesson: Lesson) -> None:
    chapter, mirror = lesson.chapter("bounded"), lesson.chapter("death-receiving")
    dead, attached = at(chapter, "SIGKILL, at the same bad moment"), at(chapter, "Attach: restart, always")
    assert not dead.alive["svm"]
    assert dead.verdict == attached.verdict == {"kind": "epoch", "epoch": 1, "sentence": "Exactly epoch 1."}
    assert (attached.status["phase"], mirror.steps[2].status["phase"]) == ("live", "empty")
    assert "restarted from epoch 1" in attached.text
    last = chapter.steps[-1]
    assert (last.status["phase"], last.verdict["kind"], last.alive["pvm"]) == ("failed_over", "live", False)


def test_a_stock_qemus_damaged_state_is_refused_and_each_epoch_begins_in_a_fresh_process(lesson: Lesson) -> None:
    chapter = lesson.chapter("stock-qemu")
    sent, refused = at(chapter, "Stop, save, send"), at(chapter, "Looked at before the seal")
    assert "checksum" in refused.text
    assert "does not hold" in refused.text
    assert refused.status["sealed"] == 1
    assert (refused.ram, refused.images["svm"]) == (sent.ram, sent.images["svm"]), "nothing happened to the SVM"
    assert "It has written 0 KiB" in at(chapter, "Another QEMU waits").text
    fresh = at(chapter, "A fresh process becomes epoch 3")
    assert "S2" in at(chapter, "Once more, and sealed").images["svm"]
    assert fresh.images["svm"] == chapter.epochs[3]
    assert "2 of 2 were seen to end" in at(chapter, "No orphans").text
    assert (chapter.steps[-1].alive["svm"], chapter.steps[-1].images["svm"]) == (True, chapter.epochs[3])


def test_a_process_that_wrote_before_its_load_never_becomes_the_machine() -> None:
    with pair_in_step(Shape.of(64), outside=True) as pair:
        assert isinstance(pair.svm, OutsideSecondary)
        guest, old = pair.svm._guest, pair.svm.processes()["running"]["pid"]
        pair.on_svm("refill")
        assert guest.waiting is not None
        early = guest.waiting
        early.tell("write", [3], 2)
        assert early.private_bytes() == 4096
        pair.pvm_writes([3, 4])
        pair.checkpoint(2)
        assert guest.running is not None
        assert guest.running.pid not in (old, early.pid)
        assert pair.images()["svm"] == pair.epochs[2]
        assert pair.svm.processes()["running"]["private"] == 0


def test_looking_at_the_cache_of_bounded_memory_fills_no_hole() -> None:
    with pair_in_step(Shape.of(64), bounded=True) as pair:
        pair.pvm_writes([5, 6])
        pair.pvm.sync()
        pair.deliver(2)
        for _ in range(2):
            assert pair.images()["cache"].count("P2") == 2
            assert pair.on_svm("used") == {"private": 0, "staged": 8192}
