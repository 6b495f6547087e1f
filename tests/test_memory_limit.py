# SPDX-License-Identifier: Apache-2.0
"""A bounded secondary keeps its operator's limit, whatever either guest writes; too little room costs an epoch, a run
of the secondary's machine or the pair, never a page, and each is said."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import STATE, FakePeer, accepted, fake_primary, packet
from toy import QUICK, TOY_BLOCKS, Pair, no_page_wrong, pair_of

from colocache import ArgumentError, BlockSpec, Memory, spill
from colocache.children import python_command
from colocache.replication import growth
from colocache.replication.memory_limit import LEAST_PAGES, bookkeeping_of, check_limit
from colocache.replication.messages import AbortKind, MessageType
from colocache.vmm.kvm import kvm_trouble

from support import disk_folder

M = MessageType
TROUBLE = kvm_trouble()
needs_kvm = pytest.mark.skipif(TROUBLE is not None, reason=" -- ".join(TROUBLE or ()))
PAGE = 4096
N_PAGES = 3000
LARGER = (BlockSpec("boot", 13 * PAGE), BlockSpec("pc.ram", N_PAGES * PAGE))
SMALL_LIMIT = bookkeeping_of(TOY_BLOCKS) + 100 * PAGE


@pytest.fixture
def bounded_pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made = []

    def make(blocks: tuple[BlockSpec, ...] = TOY_BLOCKS, spill: Path | None = None, **timing: float) -> Pair:
        memory = make_memory(blocks, memory_mode="bounded", spill=spill)
        made.append(pair_of(memory, tmp_path, timing=replace(QUICK, **timing)))
        return made[-1].__enter__()

    yield make
    for one in made:
        one.__exit__(None, None, None)


@pytest.fixture
def slow_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that is known to write little between two looks, so that a small part is one to run in."""
    monkeypatch.setattr(growth, "RATE_LEAST", 1 << 20)


def commit(peer: FakePeer, epoch: int, n_pages: int) -> None:
    peer.say(M.CHECKPOINT_REQUEST, epoch, a=n_pages)
    assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, epoch)
    peer.say(M.VMSTATE_SEND, epoch, STATE)
    peer.say(M.VMSTATE_SIZE, epoch, a=n_pages)
    assert peer.hear()[:2] == (M.VMSTATE_RECEIVED, epoch)


def pages(epoch: int, first: int, n: int) -> bytes:
    return packet(1, [(first, n, 0)], epoch=epoch, data=bytes([9]) * (n * PAGE))


def test_a_limit_that_cannot_be_kept_is_refused_with_the_least_that_can() -> None:
    least = bookkeeping_of(TOY_BLOCKS) + LEAST_PAGES * PAGE
    for n_bytes in (1, PAGE, least - 1):
        with pytest.raises(ArgumentError, match=f"give at least {least}"):
            check_limit(n_bytes, TOY_BLOCKS, "bounded")
    check_limit(least, TOY_BLOCKS, "bounded")
    with pytest.raises(ArgumentError, match="only --memory bounded"):
        check_limit(1 << 30, TOY_BLOCKS, "mirror")


def test_the_primary_is_told_how_many_pages_it_may_have_and_a_page_more_costs_the_epoch_only(
    bounded_pair: Callable[..., Pair],
) -> None:
    pair = bounded_pair()
    pair.make_secondary(memory_limit=SMALL_LIMIT)
    pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        assert peer.n_pages == 0, "the initial copy takes no memory beside the image"
        peer.socket.sendall(pages(1, 0, 300))
        commit(peer, 1, 300)
        share = peer.n_pages
        assert 0 < share < 100
        assert peer.hear()[:2] == (M.VMSTATE_LOADED, 1)
        peer.socket.sendall(pages(2, 0, share))
        peer.say(M.CHECKPOINT_REQUEST, 2, a=share)
        assert peer.hear()[0] is M.CHECKPOINT_REPLY
        assert share < peer.n_pages < 100, "all that the limit leaves, as the machine stands"
        peer.say(M.ABORT, 2, b"another time", a=int(AbortKind.CHECKPOINT), b=share)
        pair.events_s.wait("aborted")
        peer.socket.sendall(pages(3, 0, share + 1))
        assert f"would pass their limit of {share * PAGE}" in peer.hear_end()
    pair.events_s.wait("lost")
    assert pair.events_s.all("aborted")[-1]["epoch"] == 3
    assert pair.cache.status().staged_bytes == 0
    assert pair.svm.failure is None


def test_a_machine_that_has_no_room_to_run_in_stands_at_its_epoch_and_takes_over_nevertheless(
    bounded_pair: Callable[..., Pair],
) -> None:
    pair = bounded_pair(reconnect_limit=0.1)
    pair.make_secondary(memory_limit=SMALL_LIMIT)
    pair.make_primary(interval=0.02)
    pair.run_primary()
    secondary = pair.run_secondary()
    pair.events_s.wait("checkpoint", 4)
    assert pair.svm.resumes == 0
    assert "stands until the next checkpoint" in pair.events_s.wait("at_limit")["sentence"]
    pair.link.close()
    assert secondary.join().took_over
    assert pair.svm.resumes > 0
    no_page_wrong(pair)


def test_a_checkpoint_that_the_limit_can_never_hold_ends_the_pair_with_the_primary_alone(
    bounded_pair: Callable[..., Pair],
) -> None:
    pair = bounded_pair()
    pair.make_secondary(memory_limit=SMALL_LIMIT)
    pair.make_primary(interval=0.02)
    primary, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    pair.pvm.write_all(1, range(250), 77)
    ended = primary.join()
    assert ended.alone
    assert "memory limit of the secondary leaves room for" in ended.end
    followed = secondary.join()
    assert not followed.took_over
    assert "the primary goes on alone" in followed.end
    assert not pair.svm.running
    no_page_wrong(pair)


@pytest.mark.usefixtures("slow_guest")
def test_private_pages_are_given_up_for_a_large_checkpoint_and_if_it_fails_the_machine_is_the_epoch_before(
    bounded_pair: Callable[..., Pair],
) -> None:
    pair = bounded_pair(LARGER)
    pair.make_secondary(memory_limit=6 << 20)
    pair.make_primary(interval=0.1, verify="all")
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    loads: list[int] = []
    with pair.secondary.svm._order:  # between two checkpoints, so that the machine does not stand in the middle
        for pfn in range(500):
            pair.svm.write(1, N_PAGES - 1 - pfn, 5)
        pair.svm.veto = "not this one"
        pair.svm.on_load = lambda: loads.append(1)
        for pfn in range(1100):
            pair.pvm.write(1, pfn, 77)
    given = pair.events_s.wait("private_given_up")
    assert given["private_bytes"] >= 500 * PAGE
    wait_until(lambda: len(loads) == 1)  # its own branch was given up, so it is the epoch before again
    done = len(pair.events_s.all("checkpoint"))
    pair.svm.veto = None
    pair.events_s.wait("checkpoint", done + 2)
    no_wrong = [event["wrong_pages"] for event in pair.events_s.all("checkpoint")]
    assert no_wrong == [0] * len(no_wrong)
    assert pair.secondary.svm.wrong_pages == 0


@pytest.mark.usefixtures("slow_guest")
def test_a_machine_near_the_end_of_its_part_asks_for_a_checkpoint_and_stands_until_it_comes(
    bounded_pair: Callable[..., Pair],
) -> None:
    pair = bounded_pair(LARGER)

    def late(_way: str, kind: MessageType, epoch: int) -> str:
        """The secondary's request is under way until its machine stands."""
        if kind is MessageType.CHECKPOINT_REQUEST and not epoch:
            pair.events_s.wait("at_limit")
        return "pass"

    pair.link.rule = late
    pair.make_secondary(memory_limit=6 << 20)
    pair.make_primary(interval=600.0)  # nobody else wants one
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 1)
    for pfn in range(1200):
        pair.svm.write(1, pfn, 5)
    pair.events_s.wait("at_limit")
    pair.events_s.wait("checkpoint", 2)
    assert [event["asked"] for event in pair.events_s.all("memory")] == [False, True]


@pytest.mark.usefixtures("slow_guest")
def test_a_primary_near_its_share_takes_a_checkpoint_before_its_time(bounded_pair: Callable[..., Pair]) -> None:
    pair = bounded_pair(LARGER)
    pair.make_secondary(memory_limit=6 << 20)
    pair.make_primary(interval=600.0)
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 1)
    pair.pvm.write_all(1, range(600), 77)
    pair.events_s.wait("checkpoint", 2)
    no_wrong = [event["wrong_pages"] for event in pair.events_s.all("checkpoint")]
    assert no_wrong == [0, 0]
    pair.events_p.wait("checkpoint", 2)
    assert [event["stood_ms"] > 0 for event in pair.events_p.all("checkpoint")] == [False, True], (
        "it stood, and says so"
    )


# ---- with a spill file ----

SPILL_LIMIT = bookkeeping_of(TOY_BLOCKS, spills=True) + 100 * PAGE


def test_an_epoch_larger_than_the_limit_is_spilled_and_loses_no_page(
    bounded_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    pair = bounded_pair(spill=disk_folder(tmp_path))
    pair.make_secondary(memory_limit=SPILL_LIMIT)
    pair.make_primary(interval=0.02, verify="all")
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    pair.pvm.write_all(1, range(250), 77)
    spills = pair.events_s.wait("spills")
    assert "the others go into the spill file" in spills["sentence"]
    assert spills["wanted_pages"] > spills["room_pages"]
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    largest = max(pair.events_s.all("memory"), key=lambda one: one["spilled_bytes"])
    assert largest["spilled_bytes"] >= 100 * PAGE
    assert largest["bytes"] <= SPILL_LIMIT
    assert pair.events_s.all("memory")[-1]["spilled_bytes"] == 0
    no_page_wrong(pair)


@pytest.mark.usefixtures("slow_guest")
def test_private_pages_are_given_up_before_anything_is_spilled(
    bounded_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    pair = bounded_pair(LARGER, spill=disk_folder(tmp_path))
    pair.make_secondary(memory_limit=(6 << 20) + spill.WINDOW_BYTES)
    pair.make_primary(interval=0.1, verify="all")
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    with pair.secondary.svm._order:  # between two checkpoints
        for pfn in range(500):
            pair.svm.write(1, N_PAGES - 1 - pfn, 5)
        for pfn in range(1100):
            pair.pvm.write(1, pfn, 77)
    pair.events_s.wait("private_given_up")
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    assert pair.events_s.all("spills") == []
    assert {one["spilled_bytes"] for one in pair.events_s.all("memory")} == {0}
    assert pair.secondary.svm.wrong_pages == 0


def nobody_can_ask(_: int) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("free_bytes", [lambda _: 20 * PAGE, nobody_can_ask], ids=["full", "broken"])
def test_a_checkpoint_that_neither_memory_nor_disk_can_hold_ends_the_pair_with_the_primary_alone(
    bounded_pair: Callable[..., Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: Callable[[int], int],
) -> None:
    monkeypatch.setattr(spill, "free_bytes", free_bytes)
    pair = bounded_pair(spill=disk_folder(tmp_path))
    pair.make_secondary(memory_limit=SPILL_LIMIT)
    pair.make_primary(interval=0.02)
    primary, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    pair.pvm.write_all(1, range(250), 77)
    assert "memory limit of the secondary leaves room for" in primary.join().end
    assert "the primary goes on alone" in secondary.join().end
    no_page_wrong(pair)


def test_a_spill_folder_without_a_limit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="give --memory-limit"):
        check_limit(0, TOY_BLOCKS, "bounded", spills=True)
    least = bookkeeping_of(TOY_BLOCKS, spills=True) + LEAST_PAGES * PAGE
    with pytest.raises(ArgumentError, match=f"give at least {least}"):
        check_limit(least - 1, TOY_BLOCKS, "bounded", spills=True)


# ---- by the kernel's own figure ----

CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # version 1, version 2
PEAKS = {"memory.max_usage_in_bytes": "memory.usage_in_bytes", "memory.peak": "memory.current"}


@pytest.fixture
def group() -> Iterator[tuple[Path, Path, Path]]:
    """A control group of memory that counts its peak: its folder, the file of the peak, that of what is in use now."""
    for root in CGROUPS:
        folder = root / f"colocache-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            for peak, now in PEAKS.items():
                if (folder / peak).exists() and os.access(folder / peak, os.W_OK):  # 0 written to it: from now on
                    yield folder, folder / peak, folder / now
                    return
        finally:
            wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text().split())
            folder.rmdir()
    pytest.skip("no control group of memory, whose peak can be reset, can be made here")


def wait_until(found: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("spills", [False, True], ids=["in memory", "spills"])
@pytest.mark.parametrize("guest", [pytest.param("kvm", marks=[pytest.mark.kvm, needs_kvm]), "process"])
def test_a_pair_whose_guests_write_flat_out_stays_below_the_limit_by_the_kernels_own_peak(
    guest: str, spills: bool, group: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Either guest's working set fits the limit, so that no checkpoint is too large; both of them do not. Or it is
    so small that the primary's guest has mostly passed it before anybody looks, and there is a spill file."""
    limit = (4 if spills else 20) << 20
    folder, peak, now = group
    events = tmp_path / "events"
    common = ("--events", "--guest", guest, "--backing", "shm", "--ram", "128M", "--steps-per-second", "0")
    common += ("--working-set", "48M" if spills else "14M", "--run-on", "0.1")
    said = ("--listen", f"unix:{tmp_path}/s", "--memory", "bounded", "--memory-limit", str(limit))
    said += ("--memory-spill", str(disk_folder(tmp_path))) if spills else ()
    with events.open("wb") as out:
        secondary = subprocess.Popen(
            python_command("colocache.cli", "main", "secondary", *common, *said),
            stdout=out,
            preexec_fn=lambda: (folder / "cgroup.procs").write_text(str(os.getpid())),  # noqa: PLW1509
        )
    try:
        wait_until(lambda: b'"listening"' in events.read_bytes())
        to = ("--connect", f"unix:{tmp_path}/s", "--interval", "0.1", "--checkpoints", "20", "--verify", "none")
        primary = subprocess.Popen(
            python_command("colocache.cli", "main", "primary", *common, *to), stdout=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: b'"checkpoint"' in events.read_bytes() or secondary.poll() is not None)
            peak.write_text("0")  # the image is whole, and nothing of epoch 2 was let in
            # A socket may still hold something of the first copy: the base is the least from here on.
            used = [int(now.read_text())]
            while events.read_bytes().count(b'"event": "checkpoint"') < 10 and secondary.poll() is None:
                used.append(int(now.read_text()))
                time.sleep(0.002)
            assert primary.wait(120) == 0
        finally:
            primary.kill()
        assert secondary.wait(30) == 0
    finally:
        secondary.kill()
        secondary.wait()
    memory = [json.loads(line) for line in events.read_text().splitlines() if '"event": "memory"' in line]
    extra = int(peak.read_text()) - min(used)
    bookkeeping = memory[0]["bookkeeping_bytes"] - spills * spill.WINDOW_BYTES  # was in use before
    assert len(memory) == 20
    passed = max(one["passed_bytes"] for one in memory)  # only where this machine let nobody look for long
    assert extra + bookkeeping <= limit + passed
    assert max(one["private_bytes"] + one["staged_bytes"] for one in memory) > 0
    assert extra > 0
    # Whether a guest was too fast for whoever looks, so that something had to be spilled, is this machine's to say.
    assert spills or not any(one["spilled_bytes"] for one in memory)
