# SPDX-License-Identifier: Apache-2.0
"""The lesson says what the engine did: a chapter's claim holds in the recorded state; each wrong way ends wrong."""

from __future__ import annotations

import json
import os
import random

import pytest
from recorded_lesson import at, pages, recorded

import colocache
from colocache.replication.messages import MessageType
from colocache.teach import judge, quiz, tags, wire
from colocache.teach.chapters import CHAPTERS
from colocache.teach.pair import new_pair, pair_in_step
from colocache.teach.play import record
from colocache.teach.recording import Lesson, LessonFormatError, read_lesson
from colocache.teach.shape import Shape


@pytest.fixture(params=[64, 250])  # a square, and a guest whose last row and last word are not full
def lesson(request: pytest.FixtureRequest) -> Lesson:
    return recorded(request.param)


@pytest.fixture
def small() -> Lesson:
    return recorded(64)


# ---- what holds in every step --------------------------------------------------------------------


def test_every_chapter_of_the_issue_is_there(small: Lesson) -> None:
    assert [chapter.id for chapter in small.chapters if chapter.kind == "lesson"] == [
        "in-step", "drifting", "arriving", "union", "seal", "flush", "conversation", "one-bitmap",
        "bounded", "stock-qemu",
    ]  # fmt: skip
    assert sum(chapter.kind == "death" for chapter in small.chapters) == 6
    assert [chapter.id for chapter in small.chapters if chapter.kind == "counter"] == [
        "only-pvm", "only-svm", "straight", "clear-first", "received-early",
    ]  # fmt: skip


def test_every_message_that_is_shown_has_words(small: Lesson) -> None:
    assert set(wire.MESSAGES) <= {message.name for message in MessageType}
    shown = {step.message for chapter in small.chapters for step in chapter.steps if step.message}
    assert shown
    for message in shown:
        assert len(wire.explain(message).split("; ")) == message.count(", ") + 1, message
    assert wire.explain("PAGES(3), HELLO") == "PAGES(3): pages of epoch 3; HELLO: both say what they have"


def test_each_step_is_explained_in_two_sentences(small: Lesson) -> None:
    for chapter in small.chapters:
        for step in chapter.steps:
            # A quoted sentence of the engine ends in '".' and may hold ends of its own.
            text = "".join(part for n, part in enumerate(step.text.split('"')) if n % 2 == 0)
            ends = sum(text.count(end) for end in (". ", "? ", "! ")) + text.endswith((".", "?", "!"))
            assert 1 <= ends <= 3, (chapter.id, step.title, step.text)


def test_a_pending_page_is_always_unacked_and_origin_is_of_the_flush_set(lesson: Lesson) -> None:
    for chapter in lesson.chapters:
        for step in chapter.steps:
            assert pages(step.bitmaps["pending"]) <= pages(step.bitmaps["unacked"])
            assert {pfn for pfn, letter in enumerate(step.origin) if letter != "."} <= pages(step.bitmaps["flush"])


def test_when_an_epoch_is_committed_svm_memory_is_it_unless_done_wrong_on_purpose(lesson: Lesson) -> None:
    seen = 0
    for chapter in lesson.chapters:
        for step in chapter.steps:
            if chapter.kind != "counter" and step.target and step.status["committed"] == step.target:
                seen += 1
                whole = step.ram if chapter.memory == "bounded" else step.images["cache"]
                assert step.images["svm"] == whole == chapter.epochs[step.target], step.title
                assert step.wrong == "0" * lesson.n_pages
                assert step.verdict["kind"] == "epoch"
    assert seen >= 10


def test_every_counter_lesson_ends_with_wrong_memory(lesson: Lesson) -> None:
    for chapter in lesson.chapters:
        if chapter.kind == "counter":
            last = chapter.steps[-1]
            assert last.verdict["kind"] == "mixed", chapter.id
            assert "1" in last.wrong, chapter.id


def test_deaths_end_with_a_whole_secondary(lesson: Lesson) -> None:
    for chapter in lesson.chapters:
        if chapter.kind == "death":
            assert chapter.steps[-1].verdict["kind"] in ("epoch", "live"), chapter.id
            assert chapter.steps[-1].alive["svm"]


# ---- chapter by chapter --------------------------------------------------------------------------


def test_arriving_pages_never_touch_svm_memory(lesson: Lesson) -> None:
    chapter = lesson.chapter("arriving")
    before, after = at(chapter, "Two machines have drifted apart"), at(chapter, "The first pages come")
    assert before.images["svm"] == after.images["svm"]
    assert before.images["cache"] != after.images["cache"]
    changed = {p for p in range(lesson.n_pages) if before.images["cache"][p] != after.images["cache"][p]}
    assert changed == pages(after.bitmaps["pvm"])
    assert chapter.steps[-1].status["phase"] == "failed_over"
    assert chapter.steps[-1].verdict["kind"] == "live"


def test_the_union_is_exactly_both_bitmaps_and_exactly_where_the_images_differ(lesson: Lesson) -> None:
    chapter = lesson.chapter("union")
    both, sealed = at(chapter, "And what the SVM wrote"), at(chapter, "The union is the flush set")
    union = pages(both.bitmaps["pvm"]) | pages(both.bitmaps["svm"])
    assert pages(sealed.bitmaps["flush"]) == union
    differ = {p for p in range(lesson.n_pages) if sealed.images["cache"][p] != sealed.images["svm"][p]}
    assert differ == union
    letters = {p: letter for p, letter in enumerate(sealed.origin) if letter != "."}
    assert set(letters.values()) == {"P", "S", "B"}
    assert {p for p, x in letters.items() if x in "SB"} == pages(both.bitmaps["svm"])
    only_svm = pages(both.bitmaps["svm"]) - pages(both.bitmaps["pvm"])
    assert {both.images["cache"][p] for p in only_svm} == {"P1"}, "the right bytes are of an older epoch"
    assert pages(at(chapter, "Pages that only the SVM wrote").focus) == only_svm


def test_one_bitmap_for_both_works_and_loses_who_wrote_a_page_and_what_had_come(lesson: Lesson) -> None:
    chapter, plain = lesson.chapter("one-bitmap"), lesson.chapter("union")
    together, sealed, works, two, dead, attached = chapter.steps
    union = pages(plain.steps[-1].bitmaps["flush"])
    assert pages(together.bitmaps["svm"]) == union
    assert not pages(together.bitmaps["pvm"])
    assert pages(sealed.bitmaps["flush"]) == union
    assert set(sealed.origin) == {".", "S"}, "nobody can tell who wrote a page"
    assert works.verdict == {"kind": "epoch", "epoch": 2, "sentence": "Exactly epoch 2."}
    assert two.origin == plain.steps[-1].origin
    assert set(two.origin) == {".", "P", "S", "B"}
    came = pages(dead.bitmaps["pvm"])
    assert came
    assert not dead.alive["svm"]
    newer = {pfn for pfn in range(lesson.n_pages) if attached.images["cache"][pfn] != chapter.epochs[2][pfn]}
    assert pages(attached.bitmaps["pvm"]) == came == newer, "the PVM's half still names what is newer than epoch 2"
    assert attached.bitmaps["svm"] == "1" * lesson.n_pages


def test_seal_moves_the_bits_and_touches_no_memory(lesson: Lesson) -> None:
    chapter = lesson.chapter("seal")
    before, after, told = chapter.steps[0], chapter.steps[1], chapter.steps[3]
    assert before.images == after.images
    assert after.bitmaps["pvm"] == after.bitmaps["svm"] == "0" * lesson.n_pages
    assert (after.status["sealed"], after.status["committed"]) == (2, 1)
    assert "1" in after.bitmaps["unacked"]
    assert "1" not in told.bitmaps["unacked"]


def test_unacked_outlives_a_lost_connection(lesson: Lesson) -> None:
    chapter = lesson.chapter("conversation")
    sent, broken = at(chapter, "Half of it is sent"), at(chapter, "The connection breaks")
    assert sent.bitmaps["unacked"] == broken.bitmaps["unacked"]
    assert pages(sent.bitmaps["pending"]) < pages(sent.bitmaps["unacked"])
    assert broken.bitmaps["pvm"] == sent.bitmaps["pvm"], "an abort clears nothing"
    again = at(chapter, "Connected again")
    assert again.bitmaps["pending"] == again.bitmaps["unacked"]
    assert chapter.steps[-1].verdict == {"kind": "epoch", "epoch": 3, "sentence": "Exactly epoch 3."}


def test_in_mid_flush_memory_is_torn_and_attach_makes_it_exactly_the_epoch(lesson: Lesson) -> None:
    chapter = lesson.chapter("death-mid-flush")
    torn, dead, whole = chapter.steps[1], chapter.steps[2], chapter.steps[3]
    assert torn.verdict["kind"] == "mixed"
    under_way = {"?"}  # several pages at once, or none, as this CPU copies
    assert set(torn.images["svm"]) - under_way == {"P1", "P2", "S2"}
    assert torn.alive["svm"]
    assert not dead.alive["svm"]
    assert dead.images == torn.images, "the kill changes no byte"
    assert (dead.status["sealed"], dead.status["committed"]) == (2, 1)
    assert whole.images["svm"] == chapter.epochs[2]


def test_killed_while_pages_arrive_all_of_ram_counts_as_written_but_is_not_sent(lesson: Lesson) -> None:
    chapter = lesson.chapter("death-receiving")
    attached, sealed = chapter.steps[2], chapter.steps[3]
    assert attached.bitmaps["svm"] == "1" * lesson.n_pages
    assert attached.status["phase"] == "empty"
    assert sealed.bitmaps["flush"] == "1" * lesson.n_pages
    assert len(pages(sealed.bitmaps["unacked"])) < lesson.n_pages // 2


def test_killed_while_idle_it_restarts_from_the_cache(lesson: Lesson) -> None:
    steps = lesson.chapter("death-idle").steps
    assert "S2" in steps[1].images["svm"]
    assert steps[2].images["svm"] == steps[2].images["cache"] == lesson.chapter("death-idle").epochs[1]


def test_after_received_the_svm_finishes_before_it_takes_over(lesson: Lesson) -> None:
    steps = lesson.chapter("death-pvm").steps
    assert [step.status["phase"] for step in steps] == ["sealing", "sealing", "sealing", "failed_over"]
    assert steps[-1].verdict["epoch"] == 2


def test_the_wrong_ways_fail_as_they_are_said_to(lesson: Lesson) -> None:
    plain = lesson.chapter("union").steps[1].bitmaps
    pvm, svm = pages(plain["pvm"]), pages(plain["svm"])
    last = {chapter.id: chapter.steps[-1] for chapter in lesson.chapters}
    assert pages(last["only-pvm"].wrong) == svm - pvm
    assert {last["only-pvm"].images["svm"][p] for p in svm - pvm} == {"S2"}
    assert pages(last["only-svm"].wrong) == pvm - svm
    assert {last["only-svm"].images["svm"][p] for p in pvm - svm} == {"P1"}
    assert {"P1", "P2", "S2"} == set(last["straight"].images["svm"])
    assert last["clear-first"].bitmaps["flush"] == "0" * lesson.n_pages
    assert 0 < len(pages(last["clear-first"].wrong)) < len(pvm | svm)
    early = last["received-early"]
    assert pages(early.wrong) == {
        p for p in range(lesson.n_pages) if early.images["cache"][p] != early.images["pvm"][p]
    }


def test_nothing_is_left_behind() -> None:
    record([chapter for chapter in CHAPTERS if chapter.id in ("union", "death-mid-flush", "stock-qemu")])
    assert [region.name for region in colocache.list_regions() if region.name.startswith(f"{os.getpid()}-")] == []


# ---- the engine is really read -------------------------------------------------------------------


def test_reading_the_senders_bitmaps_changes_nothing() -> None:
    shape = Shape.of(64)
    with pair_in_step(shape) as pair:
        pair.pvm_writes([1, 2, 3, 40])
        pair.pvm.sync()
        pair.deliver(2, 2)
        before = pair.pvm.sender.count()
        bits = pair.pvm.bits()
        assert pair.pvm.sender.count() == before == (2, 4)
        assert pages(bits["pending"]) == {3, 40}
        assert pages(bits["unacked"]) == {1, 2, 3, 40}


def test_what_is_shown_of_a_dead_secondary_is_what_its_control_region_says() -> None:
    with pair_in_step(Shape.of(64), killable=True) as pair:
        pair.pvm_writes([5, 6])
        pair.svm_writes([6, 7, 8])
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        shown = pair.svm_bits()
        assert pair.victim is not None
        assert pair.victim.die() == 9
        found = colocache.inspect(pair.memory).blocks[0]
        counts = (found.pvm_pages, found.svm_pages, found.flush_pages)
        assert counts == tuple(len(pages(shown[name])) for name in ("pvm", "svm", "flush")) == (2, 3, 64)


def test_a_chapter_that_lies_is_noticed(small: Lesson) -> None:
    """read_lesson checks verdict and wrong pages against the images: a doctored recording is refused."""
    whole = json.loads(small.to_json())
    chapter = next(c for c in whole["chapters"] if c["id"] == "only-pvm")
    step = chapter["steps"][-1]
    pfn = step["wrong"].index("1")
    step["images"]["svm"][pfn] = chapter["epochs"]["2"][pfn]
    with pytest.raises(LessonFormatError, match="only-pvm, step 3"):
        read_lesson(json.dumps(whole))


# ---- export --------------------------------------------------------------------------------------


def test_the_export_is_read_back_unchanged(lesson: Lesson) -> None:
    assert read_lesson(lesson.to_json()) == lesson


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"), (("version",), 2), (("guest", "n_pages"), 63), (("guest", "columns"), 0),
        (("chapters", 0, "kind"), "x"), (("chapters", 0, "steps"), []), (("chapters", 0, "steps", 0, "actor"), "me"),
        (("chapters", 0, "steps", 0, "bitmaps", "pvm"), "01"), (("chapters", 0, "steps", 0, "origin"), "Z" * 64),
        (("chapters", 0, "steps", 0, "images", "svm"), ["P1"]),
        (("chapters", 0, "steps", 0, "images", "pvm"), ["X9"] * 64),
        (("chapters", 0, "steps", 0, "status", "phase"), "odd"), (("chapters", 0, "steps", 0, "focus"), None),
        (("chapters", 0, "steps", 0, "alive", "pvm"), 1), (("chapters", 1, "id"), "in-step"),
        (("chapters", 0, "memory"), "half"), (("chapters", 0, "steps", 0, "ram"), ["P1"] * 64),
        (("chapters", 8, "steps", 0, "ram"), []), (("chapters", 8, "memory"), "mirror"),
        (("chapters", 0, "steps", 6, "target"), 9), (("chapters", 0, "steps", 0, "flush_state"), ""),
    ],
)  # fmt: skip
def test_a_file_that_breaks_the_format_is_refused_with_a_sentence(small: Lesson, path: tuple, value: object) -> None:
    whole = json.loads(small.to_json())
    place = whole
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(LessonFormatError):
        read_lesson(json.dumps(whole))


def test_every_field_of_the_format_is_documented_in_the_module(small: Lesson) -> None:
    from colocache.teach import recording

    whole = json.loads(small.to_json())
    chapter = whole["chapters"][0]
    for name in (*whole, *whole["guest"], *chapter, *chapter["steps"][0]):
        assert name in (recording.__doc__ or ""), name


# ---- pure parts ----------------------------------------------------------------------------------


def test_a_page_that_is_half_copied_or_in_the_wrong_place_reads_as_torn() -> None:
    with new_pair(Shape.of(64)) as pair:
        pair.pvm_writes([0, 1])
        ram = pair.pvm.ram
        assert tags.read(ram.view)[:3] == ("P1", "P1", "-")
        ram.view[2] = ram.view[1]
        ram.view[1, 2048:] = 0
        assert tags.read(ram.view)[:3] == ("P1", "?", "?")


def test_judge_knows_an_epoch_its_own_writes_and_nothing_else() -> None:
    epochs = {1: ("P1", "P1"), 2: ("P2", "P1")}
    assert judge.judge(("P2", "P1"), epochs) == judge.Verdict("epoch", 2)
    assert judge.judge(("P2", "S3"), epochs) == judge.Verdict("live", 2)
    assert judge.judge(("P1", "S2"), epochs) == judge.Verdict("live", 1)
    assert judge.judge(("P2", "S2"), epochs) == judge.Verdict("mixed", 0)
    assert judge.judge(("-", "-"), {}) == judge.Verdict("empty", 0)


@pytest.mark.parametrize("n_pages", [64, 65, 96, 97, 100, 255, 256])
def test_the_plan_has_every_kind_of_page_at_any_size(n_pages: int) -> None:
    shape = Shape.of(n_pages)
    kinds = (shape.pvm, shape.svm, shape.both, shape.pvm_later, shape.svm_later)
    assert all(kinds)
    assert set(shape.pvm) & set(shape.svm) == set(shape.both)
    assert not set(shape.pvm_later + shape.svm_later) & set(shape.pvm + shape.svm)
    assert max(shape.all) == n_pages - 1


@pytest.mark.parametrize("n_pages", [0, 63, 257])
def test_a_guest_that_can_not_be_drawn_is_refused(n_pages: int) -> None:
    with pytest.raises(colocache.ArgumentError, match=str(n_pages)):
        Shape.of(n_pages)


# ---- quiz ----------------------------------------------------------------------------------------


def test_the_exercise_shows_bitmaps_whose_union_is_the_engines_flush_set() -> None:
    for seed in range(5):
        exercise = quiz.make_exercise(random.Random(seed))
        assert exercise.flush == exercise.pvm | exercise.svm
        assert exercise.pvm & exercise.svm
        assert exercise.pvm - exercise.svm
        assert exercise.svm - exercise.pvm


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0-3 7", {0, 1, 2, 3, 7}), ("7,0 - 3", None), ("5", {5}), (" 31 ", {31}), ("none", set()),
        ("0-3, 7", {0, 1, 2, 3, 7}),
        ("32", None), ("3-1", None), ("a", None), ("", None), ("1-", None), ("-1", None), ("²", None),
    ],
)  # fmt: skip
def test_answers_are_read_as_pages_and_ranges(text: str, found: set[int] | None) -> None:
    assert quiz.parse_pages(text) == (None if found is None else frozenset(found))


def test_pages_are_written_as_they_are_read() -> None:
    for chosen in (set(), {0}, {0, 1, 2, 31}, set(range(32))):
        assert quiz.parse_pages(quiz.pages_text(frozenset(chosen))) == frozenset(chosen)
