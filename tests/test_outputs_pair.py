# SPDX-License-Identifier: Apache-2.0
"""The laws of what the world sees, on real pairs: each line of the guest's console once and in order, whoever dies."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_sides import Process, Sides
from test_demo import demo, report_of
from toy import QUICK, TOY_BLOCKS, Pair, once, pair_of
from vmm_support import Host

from colocache.demo.world import told_steps
from colocache.errors import ArgumentError, PacketError
from colocache.outputs.apart import ApartOutput
from colocache.outputs.front import FileFront
from colocache.outputs.held import HeldOutput
from colocache.outputs.piece import CARD, CONSOLE, Piece
from colocache.outputs.travel import BODY_BYTES_MAX, Origin, pack, unpack
from colocache.replication.arbiter import NeverArbiter
from colocache.replication.messages import MessageType
from colocache.vmm.kvm import kvm_trouble

LINE = re.compile(rb"steps (\d+) to (\d+), salt ([0-9a-f]{16})\n")
GUESTS = [
    pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.skipif(kvm_trouble() is not None, reason="no KVM")]),
    "process",
]


def stretches(console: bytes) -> list[tuple[int, int]]:
    """What each line tells: the guest did the steps from here to there. Every byte belongs to a line."""
    found = LINE.findall(console)
    assert b"".join(b"steps %s to %s, salt %s\n" % one for one in found) == console
    return [(int(first), int(last)) for first, last, _ in found]


def assert_unbroken(console: bytes, *, of_a_whole_life: bool = True) -> None:
    """Each step is told once and in order: what was told of an epoch that was lost would be told again."""
    told = stretches(console)
    assert len(told) > 2
    if of_a_whole_life:
        assert told[0][0] == 0
    assert [first for first, _ in told[1:]] == [last for _, last in told[:-1]]


def test_steps_that_are_missing_and_told_again_are_counted() -> None:
    def line(first: int, last: int) -> bytes:
        return b"steps %d to %d, salt %016x\n" % (first, last, 7)

    assert told_steps(line(0, 5) + line(5, 9)) == {"lines": 2, "steps_missing": 0, "steps_again": 0}
    assert told_steps(line(0, 5) + line(7, 9) + line(8, 12)) == {"lines": 3, "steps_missing": 2, "steps_again": 1}
    assert told_steps(line(3, 5)) == {"lines": 1, "steps_missing": 3, "steps_again": 0}


# ---- both on one host ----


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("point", ["running", "receiving", "sealed", "random"])
def test_each_line_of_the_console_is_there_once_over_the_takeover(tmp_path: Path, guest: str, point: str) -> None:
    console = tmp_path / "console"
    args = ("--guest", guest, "--ram", "16M", "--checkpoints", "4", "--interval", "0.1", "--run-on", "0.1")
    report = report_of(demo(*args, "--console", str(console), "--kill-primary-at", point, "--json"))
    assert report["world"] == {"lines": len(stretches(console.read_bytes())), "steps_missing": 0, "steps_again": 0}
    assert_unbroken(console.read_bytes())


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


def paired(sides: Sides, primary: Path, secondary: Path, *more: str) -> tuple[Process, Process]:
    two = sides.secondary("--console", str(secondary), "--run-on", "0.3", "--reconnect-limit", "0.3")
    one = sides.primary("--console", str(primary), "--run-on", "0.3", "--peer-timeout", "1", *more)
    two.until("checkpoint", 4)
    return one, two


def test_a_primary_that_lives_and_was_cut_off_tells_the_world_nothing_more(sides: Sides, tmp_path: Path) -> None:
    """It stands still for a while, its secondary takes over, and then it goes on, with a machine that has much to say:
    on the same file as the secondary's machine."""
    console = tmp_path / "console"
    primary, secondary = paired(sides, console, console, "--arbiter", "never", "--reconnect-limit", "1")
    os.kill(primary.process.pid, signal.SIGSTOP)
    secondary.until("takeover")
    os.kill(primary.process.pid, signal.SIGCONT)
    secondary.end()
    primary.end()
    assert_unbroken(console.read_bytes())


def test_a_secondary_that_is_killed_and_comes_back_loses_no_line(sides: Sides, tmp_path: Path) -> None:
    console = tmp_path / "console"
    primary, secondary = paired(sides, console, console)
    os.kill(secondary.child(), signal.SIGKILL)
    secondary.until("restarted")
    done = len([event for event in secondary.events if event["event"] == "checkpoint"])
    secondary.until("checkpoint", done + 3)
    primary.process.kill()
    secondary.until("ran_on")
    assert secondary.end()[0] == 0
    assert_unbroken(console.read_bytes())


def test_a_primary_whose_secondary_is_gone_tells_all_when_it_is_alone(sides: Sides, tmp_path: Path) -> None:
    console = tmp_path / "console"
    primary, secondary = paired(sides, console, tmp_path / "other", "--reconnect-limit", "0.3")
    secondary.process.terminate()
    primary.until("alone")
    primary.end()
    assert_unbroken(console.read_bytes())


# ---- a front for each host ----


def test_with_a_front_on_each_host_nothing_is_missing_and_at_most_one_epoch_is_told_twice(
    sides: Sides, tmp_path: Path
) -> None:
    primary, secondary = paired(sides, tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"", "the world sees one machine"
    primary.process.kill()
    secondary.until("ran_on")
    secondary.end()
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert_unbroken(two, of_a_whole_life=False)
    first = two.splitlines(keepends=True)[0]
    assert_unbroken(one[: one.index(first)] + two if first in one else one + two)


# ---- output on its way, with machines that say what a test tells them ----


class Speaking:
    """A toy pair with both queues; `world` is what either side let out."""

    def __init__(self, pair: Pair, **options: float) -> None:
        self.pair, self.world = pair, b""
        pair.make_secondary()
        pair.make_primary(interval=3600, **options)
        self.held = pair.primary.pvm.output = HeldOutput(self._emit)
        self.apart = pair.secondary.svm.output = ApartOutput(self._emit)
        self.primary, self.secondary = pair.run_primary(), pair.run_secondary()
        self.n_checkpoints = 0
        self.checkpoint()

    def _emit(self, _channel: int, data: bytes) -> None:
        self.world += data

    def say(self, data: bytes) -> None:
        self.held.put(CONSOLE, data)

    def checkpoint(self) -> None:
        self.n_checkpoints += 1
        if self.n_checkpoints > 1:
            self.pair.primary.request_checkpoint()
        self.pair.events_p.wait("checkpoint", self.n_checkpoints)


@pytest.fixture
def speaking(make_memory, tmp_path: Path) -> Iterator[Speaking]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=QUICK, arbiter=None) as pair:
        yield Speaking(pair)


def test_output_travels_before_its_epoch_can_be_sealed(speaking: Speaking) -> None:
    speaking.say(b"one")
    speaking.checkpoint()
    kinds = [kind for way, kind, epoch, _ in speaking.pair.link.log if way == "P→S" and epoch == 2]
    assert kinds.index(MessageType.OUTPUT) < kinds.index(MessageType.VMSTATE_SIZE)
    assert speaking.world == b"one"


def test_nothing_is_seen_before_its_epoch_is_received(speaking: Speaking) -> None:
    speaking.say(b"one")
    seen: list[bytes] = []

    def look(_way: str, kind: MessageType, _epoch: int) -> str:
        if kind in (MessageType.VMSTATE_SIZE, MessageType.VMSTATE_RECEIVED):
            seen.append(speaking.world)
            speaking.say(b"later ")  # the machine's state is saved already: this is of the next epoch
        return "pass"

    speaking.pair.link.rule = look
    speaking.checkpoint()
    assert seen == [b"", b""]
    assert speaking.world == b"one"
    speaking.pair.link.rule = lambda *_: "pass"
    speaking.checkpoint()
    assert speaking.world == b"onelater later "


@pytest.mark.parametrize("at", [MessageType.OUTPUT, MessageType.VMSTATE_SIZE, MessageType.VMSTATE_RECEIVED])
@pytest.mark.parametrize("how", ["cut", "pass-cut"])
def test_a_lost_connection_costs_no_output_and_doubles_none(speaking: Speaking, at: MessageType, how: str) -> None:
    speaking.say(b"one ")
    speaking.pair.link.rule = once(at, how)
    speaking.pair.primary.request_checkpoint()
    speaking.pair.events_p.wait("connected", 2)
    speaking.say(b"two ")
    done = len(speaking.pair.events_p.all("checkpoint"))
    speaking.pair.primary.request_checkpoint()
    speaking.pair.events_p.wait("checkpoint", done + 1)
    speaking.pair.primary.request_checkpoint()
    speaking.pair.events_p.wait("checkpoint", done + 2)
    assert speaking.world == b"one two "


def test_an_epoch_that_is_given_up_keeps_its_output_for_the_next(speaking: Speaking) -> None:
    speaking.say(b"one ")
    speaking.pair.svm.veto = "not this one"
    speaking.pair.primary.request_checkpoint()
    speaking.pair.events_p.wait("aborted")
    assert speaking.world == b""
    speaking.pair.svm.veto = None
    speaking.say(b"two ")
    speaking.checkpoint()
    assert speaking.world == b"one two "


def test_a_takeover_lets_out_what_its_state_has_sent_and_forgets_the_rest(speaking: Speaking) -> None:
    """RECEIVED is lost: the world has not seen that epoch's output, and the primary never lets it out."""
    pair = speaking.pair
    speaking.say(b"one ")
    pair.link.rule = once(MessageType.VMSTATE_RECEIVED, "stall")
    speaking.pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 2)
    speaking.say(b"never ")
    speaking.apart.put(CONSOLE, b"mine ")
    assert speaking.world == b""
    assert pair.secondary.request_failover()
    pair.events_s.wait("takeover")
    assert speaking.world == b"one mine "


def test_after_a_lost_connection_the_secondary_has_all_of_it_once(speaking: Speaking) -> None:
    """What had come of the epoch that was not sealed comes again, and is the secondary's to let out."""
    pair = speaking.pair
    speaking.say(b"one ")
    pair.link.rule = once(MessageType.VMSTATE_SIZE, "cut")
    pair.primary.request_checkpoint()
    pair.events_p.wait("connected", 2)
    pair.events_p.wait("checkpoint", 2)  # a pair that has met again takes one at once
    speaking.say(b"two ")
    cut, stall = once(MessageType.VMSTATE_SIZE, "cut"), once(MessageType.VMSTATE_RECEIVED, "stall")
    pair.link.rule = lambda *one: (cut if one[1] is MessageType.VMSTATE_SIZE else stall)(*one)
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 3)
    assert pair.secondary.request_failover()
    pair.events_s.wait("takeover")
    assert speaking.world == b"one two "


def test_a_takeover_does_not_tell_again_what_the_primary_has_let_out(speaking: Speaking) -> None:
    speaking.say(b"one ")
    speaking.checkpoint()
    speaking.say(b"two ")
    speaking.checkpoint()
    speaking.checkpoint()
    assert speaking.pair.secondary.request_failover()
    speaking.pair.events_s.wait("takeover")
    assert speaking.world == b"one two "


def test_the_secondary_soon_hears_that_an_epochs_output_is_out(speaking: Speaking) -> None:
    """Without another checkpoint: a takeover in the middle of a long interval does not tell it again."""
    speaking.say(b"one ")
    speaking.checkpoint()
    deadline = time.monotonic() + 10
    while speaking.apart._arrived and time.monotonic() < deadline:
        time.sleep(0.005)
    assert speaking.pair.secondary.request_failover()
    speaking.pair.events_s.wait("takeover")
    assert speaking.world == b"one "


def test_output_that_waits_too_long_brings_a_checkpoint_and_an_idle_pair_takes_none(
    make_memory, tmp_path: Path
) -> None:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as pair:
        speaking = Speaking(pair, output_delay=0.02)
        time.sleep(0.3)
        assert len(pair.events_p.all("checkpoint")) == 1
        for n, word in enumerate((b"one ", b"two "), 2):
            speaking.say(word)
            pair.events_p.wait("checkpoint", n)
        time.sleep(0.3)
        assert len(pair.events_p.all("checkpoint")) == 3
        assert speaking.world == b"one two "


def test_both_alive_with_the_link_cut_the_world_sees_one_machine(make_memory, tmp_path: Path) -> None:
    timing = replace(QUICK, reconnect_limit=0.2, connect_limit=0.5)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing, arbiter=NeverArbiter()) as pair:
        speaking = Speaking(pair)
        pair.link.close()
        speaking.say(b"of a primary that may not go on")
        speaking.apart.put(CONSOLE, b"of a secondary that may not take over")
        with pytest.raises(Exception, match="may not take over"):
            speaking.secondary.join()
        speaking.primary.join()
        assert speaking.world == b""


# ---- the queue's ends ----


def test_pieces_travel_whole_in_bodies_that_are_bounded() -> None:
    pieces = [Piece(7, n % 2, n, bytes([n % 256]) * n) for n in (0, 1, 1500, 65536, 3 << 20)]
    origin = Origin(b"0123456789abcdef", -5)
    bodies = list(pack(pieces, origin))
    assert max(map(len, bodies)) <= BODY_BYTES_MAX
    told = [unpack(7, body) for body in bodies]
    assert {one for one, _ in told} == {origin}
    for channel in (CONSOLE, CARD):
        sent = b"".join(piece.data for piece in pieces if piece.channel == channel)
        assert b"".join(piece.data for _, some in told for piece in some if piece.channel == channel) == sent
    assert list(pack([], origin)) == []


@pytest.mark.parametrize("cut", [1, 30, 37])
def test_a_body_that_is_cut_short_is_refused(cut: int) -> None:
    (body,) = pack([Piece(1, CONSOLE, 0, b"12")], Origin())
    with pytest.raises(PacketError, match="damaged"):
        unpack(1, body[:cut])
    with pytest.raises(PacketError, match="channel 2"):
        unpack(1, body[:24] + b"\2" + body[25:])


def test_the_second_of_one_host_goes_on_where_the_first_died_in_mid_write(tmp_path: Path) -> None:
    path = str(tmp_path / "console")
    Path(path).write_bytes(b"said by another guest")
    first, second = FileFront(path), FileFront(path)
    first.emit(CONSOLE, b"free ")
    held = HeldOutput(first.emit, origin=first.origin)
    held._sent[CONSOLE] = 5
    held.move(2)
    held.put(CONSOLE, b"one two ")
    other = ApartOutput(second.emit, seen=second.seen)
    for body in pack(held.take(), held.origin()):
        origin, pieces = unpack(2, body)
        for piece in pieces:
            other.arrived(piece, origin)
    first.emit(CONSOLE, b"one")  # of this epoch's; then it died
    other.take_over(2)
    assert Path(path).read_bytes() == b"said by another guestfree one two "
    first.close()
    second.close()


def test_a_console_that_can_not_be_a_file_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, why in (
        ("fifo", "No such device|no regular file"),
        ("no/where", "No such file"),
        ("", "no regular|Is a"),
    ):
        with pytest.raises(ArgumentError, match=why):
            FileFront(str(tmp_path / name))


def test_a_reference_guest_is_held_up_while_there_is_no_room_for_what_it_says() -> None:
    """Nothing is dropped and nothing grows: the guest stands until there is room, and an order to stop is obeyed."""
    host = Host("process", "shm")
    try:
        machine = host.machine(steps_per_second=20_000.0)
        machine.boot()
        said: list[bytes] = []
        full = [False]
        machine.on_output, machine.output_full = said.append, lambda: full[0]
        machine.resume()
        while not said:
            time.sleep(0.001)
        full[0] = True
        time.sleep(0.05)
        steps, n_said = machine.steps, len(said)
        time.sleep(0.2)
        assert (machine.steps, len(said)) == (steps, n_said)
        machine.pause()
        full[0] = False
        machine.resume()
        while len(said) < n_said + 2:
            time.sleep(0.001)
        machine.pause()
        assert_unbroken(b"".join(said))
        assert stretches(b"".join(said))[-1][1] == machine.steps, "all of it was handed on before pause came back"
        salts = {int(one[2], 16) for one in LINE.findall(b"".join(said))}
        assert salts <= {int(salt) for _, salt in machine._history.array}
    finally:
        host.stack.close()
