# SPDX-License-Identifier: Apache-2.0
"""Pages over several connections at once: no page is lost or mixed up, whichever of them breaks or lies."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_peer import STATE, FakePeer, packet
from toy import PAGE, QUICK, Pair, Rule, pair_of

from colocache import BlockSpec, Memory
from colocache.children import python_command
from colocache.errors import ArgumentError
from colocache.replication.address import Address
from colocache.replication.errors import RefusedError
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, MessageType, decode_reason
from colocache.replication.options import PrimaryOptions, SecondaryOptions

M = MessageType
# Pages are dealt out to the streams by 4096: with four streams each has some.
WIDE_BLOCKS = (BlockSpec("boot", 13 * PAGE), BlockSpec("pc.ram", (3 * 4096 + 2100) * PAGE))
WIDE_PAGES = 13 + 3 * 4096 + 2100
Make = Callable[..., Memory]


@pytest.fixture
def wide(make_memory: Make, tmp_path: Path) -> Iterator[Callable[[int], Pair]]:
    """A pair with so many streams, whose machines write all over their RAM."""
    with contextlib.ExitStack() as stack:

        def make(streams: int) -> Pair:
            timing = replace(QUICK, peer_timeout=5.0)  # a loaded machine is not a dead peer
            pair = stack.enter_context(pair_of(make_memory(WIDE_BLOCKS), tmp_path, timing=timing))
            pair.streams = streams
            return pair

        yield make


def every_page_was_right(pair: Pair) -> None:
    """Each checkpoint compared every page with the primary's checksum of it."""
    done = pair.events_s.all("checkpoint")
    assert [(event["verified_pages"], event["wrong_pages"]) for event in done] == [(WIDE_PAGES, 0)] * len(done)
    epochs = [event["epoch"] for event in done]
    assert epochs == sorted(set(epochs)), "an epoch number was used twice"


def once_on(pair: Pair, stream: int, kind: MessageType, verdict: str, *, after: int = 1) -> Rule:
    """The `after`-th message of this kind from the primary on this stream gets the verdict."""
    seen = [0]

    def rule(way: str, found: MessageType, _epoch: int) -> str:
        if way == "P→S" and found is kind and pair.link.here.stream == stream:
            seen[0] += 1
            if seen[0] == after:
                return verdict
        return "pass"

    return rule


# ---- the ordinary course ----


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_memory_is_equal_after_every_checkpoint(wide: Callable[[int], Pair], streams: int, transport: str) -> None:
    pair = wide(streams)
    if transport == "tcp":
        pair.listener.close()
        pair.listener, pair.link._target = Address.parse("127.0.0.1:0").listen()
        pair._stack.enter_context(pair.listener)
    used: dict[int, int] = {}

    def rule(_way: str, kind: MessageType, _epoch: int) -> str:
        if kind is M.PAGES:
            used[pair.link.here.stream] = used.get(pair.link.here.stream, 0) + 1
        return "pass"

    pair.link.rule = rule
    primary, secondary = pair.start(checkpoints=8)
    ended, followed = primary.join(60), secondary.join(60)
    assert (ended.checkpoints, ended.alone) == (8, False)
    assert (followed.checkpoints, followed.wrong_pages) == (8, 0)
    every_page_was_right(pair)
    assert sorted(used) == list(range(streams)), "a stream carried no page"
    assert all(count >= 3 for count in used.values())
    assert pair.events_p.all("lost") == pair.events_s.all("lost") == []
    assert sum(event["svm_pages"] for event in pair.events_s.all("checkpoint")) > 0, "the two never drifted apart"


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_an_epoch_that_either_side_gives_up_costs_no_connection(wide: Callable[[int], Pair], side: str) -> None:
    """The next epoch's pages on one stream never meet the old epoch still open because of another."""
    pair = wide(4)
    pair.start(interval=0.0)
    pair.events_s.wait("checkpoint", 2)
    for number in (1, 2, 3):
        if side == "primary":
            pair.pvm.fail_save = "a device is in the middle of something"
        else:
            pair.svm.veto = "this device is not known here"
        pair.events_p.wait("aborted", number)
        pair.pvm.fail_save = pair.svm.veto = None
        pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 2)
    assert pair.events_p.all("lost") == pair.events_s.all("lost") == []
    every_page_was_right(pair)


# ---- a stream breaks ----


@pytest.mark.parametrize(
    ("stream", "kind", "after", "verdict"),
    [
        (1, M.STREAM, 1, "half-cut"),
        (2, M.STREAM, 1, "pass-cut"),
        (1, M.PAGES, 1, "half-cut"),  # in the initial copy
        (2, M.PAGES, 3, "cut"),
        (1, M.PAGES, 5, "half-cut"),
        (2, M.PAGES, 8, "pass-cut"),
        (2, M.PAGES, 8, "half-cut"),
        (0, M.PAGES, 5, "half-cut"),
        (1, M.PING, 4, "cut"),
        (1, M.PING, 4, "pass-cut"),
        (0, M.VMSTATE_SIZE, 3, "half-cut"),
    ],
)
def test_a_stream_that_breaks_costs_no_page(
    wide: Callable[[int], Pair], stream: int, kind: MessageType, after: int, verdict: str
) -> None:
    pair = wide(3)
    pair.link.rule = once_on(pair, stream, kind, verdict, after=after)
    primary, secondary = pair.start(checkpoints=6)
    ended, followed = primary.join(60), secondary.join(60)
    assert (ended.checkpoints, ended.alone) == (6, False)
    assert (followed.wrong_pages, followed.took_over) == (0, False)
    every_page_was_right(pair)


def test_after_the_loss_of_one_stream_all_are_opened_anew_and_only_what_is_missing_is_sent(
    wide: Callable[[int], Pair],
) -> None:
    pair = wide(3)
    pair.start(interval=3600)
    pair.events_p.wait("checkpoint", 1)
    before = pair.link.pages()
    assert before >= WIDE_PAGES
    pair.link.rule = once_on(pair, 2, M.PAGES, "cut")
    pair.pvm.write_all(1, range(3 * 4096), 77)
    pair.primary.request_checkpoint()
    pair.events_s.wait("lost")
    pair.events_s.wait("checkpoint", 2)
    assert [event["fresh"] for event in pair.events_p.all("connected")] == [True, False]
    assert sum(kind is M.STREAM for _, kind, _, _ in pair.link.log) == 4
    assert pair.link.pages() - before < 2 * WIDE_PAGES
    every_page_was_right(pair)


def test_when_the_primary_is_gone_with_all_its_streams_the_secondary_takes_over(wide: Callable[[int], Pair]) -> None:
    pair = wide(4)
    pair.timing = replace(pair.timing, reconnect_limit=0.1)
    _, secondary = pair.start(interval=0.0)
    pair.events_s.wait("checkpoint", 3)
    pair.link.close()
    followed = secondary.join()
    assert followed.took_over
    assert followed.wrong_pages == 0
    every_page_was_right(pair)


def test_a_stream_that_stalls_is_noticed_though_the_others_live(wide: Callable[[int], Pair]) -> None:
    pair = wide(2)
    pair.timing = replace(pair.timing, peer_timeout=1.0)
    pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    stalled = threading.Event()
    rule = once_on(pair, 1, M.PAGES, "stall")
    pair.link.rule = lambda *message: ((verdict := rule(*message)) == "stall" and stalled.set()) or verdict
    pair.pvm.write(1, 5000, 1)
    assert stalled.wait(20)
    cause = pair.events_s.wait("lost")["cause"]
    assert "the primary says that it sent" in cause or "stream 1 broke" in cause, cause
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    every_page_was_right(pair)


# ---- who lies ----


class Peers:
    """A fake primary that brings its streams as it likes."""

    def __init__(self, pair: Pair, stack: contextlib.ExitStack, streams: int) -> None:
        self._pair, self._stack, self._n = pair, stack, streams
        self.control = self.connect()
        hello = Hello("primary", "toy", None, 0, 0, False, "toy", pair.blocks, streams=streams)
        self.control.say(M.HELLO, body=hello.encode())
        kind, _, body = self.control.hear()
        assert kind is M.HELLO
        self.token = Hello.decode(body).stream_token()

    def connect(self) -> FakePeer:
        return FakePeer(self._stack.enter_context(self._pair.address.connect(5.0)))

    def stream(self, index: int, *, n: int = 0, token: bytes | None = None) -> FakePeer:
        made = self.connect()
        made.say(M.STREAM, body=self.token if token is None else token, a=index, b=n or self._n)
        return made


@pytest.fixture
def bring(wide: Callable[[int], Pair]) -> Iterator[Callable[..., tuple[Pair, Peers]]]:
    with contextlib.ExitStack() as stack:

        def start(streams: int = 2, **timing: float) -> tuple[Pair, Peers]:
            pair = wide(streams)
            pair.timing = replace(pair.timing, reconnect_limit=0.1, **timing)
            pair.make_secondary()
            pair.running = pair.run_secondary()  # type: ignore[attr-defined]
            return pair, Peers(pair, stack, streams)

        yield start


def test_strangers_among_the_streams_are_sent_away_and_the_session_begins(
    bring: Callable[..., tuple[Pair, Peers]],
) -> None:
    pair, peers = bring(3)
    silent = peers.connect()
    first = peers.stream(1)
    token = peers.token
    wrong = {
        "belongs to another session": peers.stream(2, token=bytes(16) + token[16:]),
        "shows no token": peers.stream(2, token=b""),
        "is one of 4, this session has 3": peers.stream(2, n=4),
        "has index 0": peers.stream(0),
        "has index 3": peers.stream(3),
        "has index 1": peers.stream(1),
    }
    for reason, stranger in wrong.items():
        assert reason in stranger.hear_end()
    longer = peers.stream(2, token=token + b"x")
    assert "another session" in longer.hear_end()
    noise = peers.connect()
    noise.socket.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(40))
    assert "no message of colocache" in noise.hear_end()
    another = peers.connect()  # another primary: it is to try again later
    another.say(M.HELLO, body=Hello("primary", "toy", None, 0, 0, False, "toy", pair.blocks, streams=3).encode())
    with contextlib.suppress(ConnectionResetError):
        assert another.socket.recv(1) == b""
    second = peers.stream(2)
    assert peers.control.hear()[0] is M.CHECKPOINT_READY
    assert silent.socket.recv(1) == b""
    assert len(pair.events_s.all("refused")) == len(wrong) + 1  # a reason that comes again at once is not repeated

    for index, peer in enumerate((peers.control, first, second)):
        peer.socket.sendall(packet(1, [(4096 * index + 5, 1, 0)], data=bytes([9 + index]) * PAGE))
    checkpoint(peers.control, 1, 3)
    assert peers.control.hear()[:2] == (M.VMSTATE_RECEIVED, 1)
    assert peers.control.hear()[:2] == (M.VMSTATE_LOADED, 1)
    assert [int(pair.guest_ram()[1][4096 * index + 5][0]) for index in range(3)] == [9, 10, 11]


def checkpoint(control: FakePeer, epoch: int, n_pages: int) -> None:
    """All that a primary says until it waits for RECEIVED."""
    control.say(M.CHECKPOINT_REQUEST, epoch)
    assert control.hear()[:2] == (M.CHECKPOINT_REPLY, epoch)
    control.say(M.VMSTATE_SEND, epoch, STATE)
    control.say(M.VMSTATE_SIZE, epoch, a=n_pages)


def test_a_count_that_is_never_reached_ends_the_session_with_one_sentence(
    bring: Callable[..., tuple[Pair, Peers]],
) -> None:
    pair, peers = bring(2, peer_timeout=1.0)
    stream = peers.stream(1)
    assert peers.control.hear()[0] is M.CHECKPOINT_READY
    stream.socket.sendall(packet(1, [(5, 2, 0)]))
    stream.say(M.PING, 1)
    checkpoint(peers.control, 1, 3)
    reason = peers.control.hear_end()
    assert "epoch 1: the primary says that it sent 3 pages, 2 came within" in reason
    assert "\n" not in reason
    assert reason in pair.events_s.wait("lost")["cause"]
    assert pair.cache.status().sealed_epoch == 0
    assert all(not np.any(view) for view in pair.guest_ram())


def test_pages_that_come_after_their_count_was_told_are_waited_for(bring: Callable[..., tuple[Pair, Peers]]) -> None:
    _pair, peers = bring(2)
    stream = peers.stream(1)
    assert peers.control.hear()[0] is M.CHECKPOINT_READY
    whole = packet(1, [(5, 2, 0)], data=bytes([9]) * 2 * PAGE)
    stream.socket.sendall(whole[:5000])
    checkpoint(peers.control, 1, 2)
    peers.control.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        peers.control.hear()  # nothing is sealed before the last byte
    peers.control.socket.settimeout(10)
    stream.socket.sendall(whole[5000:])
    assert peers.control.hear()[:2] == (M.VMSTATE_RECEIVED, 1)


def test_a_late_page_of_an_epoch_that_was_given_up_never_enters(bring: Callable[..., tuple[Pair, Peers]]) -> None:
    pair, peers = bring(2)
    stream = peers.stream(1)
    assert peers.control.hear()[0] is M.CHECKPOINT_READY
    peers.control.socket.sendall(packet(1, [(3, 1, 0)], data=bytes([1]) * PAGE))
    peers.control.say(M.ABORT, 1, b"no more of it", a=int(AbortKind.CHECKPOINT), b=1)
    pair.events_s.wait("aborted")
    stream.socket.sendall(packet(1, [(9, 1, 0)], data=bytes([2]) * PAGE))
    assert "on stream 1: a packet of the peer was refused before a byte of it was stored" in peers.control.hear_end()
    pair.events_s.wait("lost")
    assert np.any(pair.cache.blocks[1].cache[3])
    assert not np.any(pair.cache.blocks[1].cache[9])


@pytest.mark.parametrize("what", ["a message that is none of a stream", "garbage", "a page past the end"])
def test_a_stream_that_says_wrong_things_ends_the_session_with_its_reason(
    bring: Callable[..., tuple[Pair, Peers]], what: str
) -> None:
    pair, peers = bring(2)
    stream = peers.stream(1)
    assert peers.control.hear()[0] is M.CHECKPOINT_READY
    if what == "garbage":
        stream.socket.sendall(bytes(range(100)))
    elif what == "a page past the end":
        stream.socket.sendall(packet(1, [(WIDE_PAGES, 1, 0)]))
    else:
        stream.say(M.CHECKPOINT_REQUEST, 1)
    reason = peers.control.hear_end()
    assert reason.startswith("on stream 1: ")
    assert reason in pair.events_s.wait("lost")["cause"]
    assert all(not np.any(np.array(block.cache)) for block in pair.cache.blocks.values())


def test_streams_that_never_come_are_not_waited_for_without_end(bring: Callable[..., tuple[Pair, Peers]]) -> None:
    pair, peers = bring(3, peer_timeout=1.0)
    peers.stream(2)
    kind, _, body = peers.control.hear()
    assert kind is M.ABORT
    assert "1 of the primary's 2 further streams came within 0.8 s" in decode_reason(body)
    assert "further streams" in pair.events_s.wait("lost")["cause"]


def test_two_sides_with_different_numbers_of_streams_are_no_pair(wide: Callable[[int], Pair]) -> None:
    pair = wide(3)
    pair.make_secondary()
    pair.make_primary(streams=2)
    primary, _ = pair.run_primary(), pair.run_secondary()
    reason = "the peer uses 2 streams, this side 3: give both the same --streams"
    with pytest.raises(RefusedError, match=reason):
        primary.join()
    assert pair.events_s.wait("refused")["reason"] == reason


@pytest.mark.parametrize("kind", [PrimaryOptions, SecondaryOptions])
@pytest.mark.parametrize("streams", [0, 17])
def test_a_number_of_streams_out_of_range_is_refused(kind: type, streams: int) -> None:
    with pytest.raises(ArgumentError, match=f"{streams} streams: give 1 to 16"):
        kind(streams=streams)


# ---- the command ----


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_the_demo_with_three_streams_takes_over_with_every_page_right(transport: str) -> None:
    args = ["demo", "--streams", "3", "--ram", "64M", "--checkpoints", "4", "--interval", "0.05", "--guest", "process",
            "--backing", "shm", "--kill-primary-at", "receiving", "--transport", transport, "--json"]  # fmt: skip
    command = python_command("colocache.cli", "main", *args)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["wrong_pages"] == 0
    assert report["checkpoints"] == 4
