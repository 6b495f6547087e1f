# SPDX-License-Identifier: Apache-2.0
"""Signs of life, time limits, and whole messages over one connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from colocache import PeerLostError, TimedOutError, message_header
from colocache.replication.channel import Channel
from colocache.replication.conversation import State
from colocache.replication.ending import end_with
from colocache.replication.errors import ProtocolError, SecondaryLostError
from colocache.replication.heartbeat import Heartbeat
from colocache.replication.inbox import CheckpointAbortedError, Inbox
from colocache.replication.messages import AbortKind, Message, MessageType
from colocache.replication.transport import PlainTransport


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_a_silent_side_beats_and_a_talking_one_does_not() -> None:
    beats = []
    idle = [0.0]
    beat = Heartbeat(interval=0.02, idle_seconds=lambda: idle[0], beat=lambda: beats.append(1) is None)
    beat.start()
    time.sleep(0.15)
    assert beats == []
    idle[0] = 1.0
    deadline = time.monotonic() + 10
    while len(beats) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    beat.stop()
    count = len(beats)
    assert count >= 3
    time.sleep(0.1)
    assert len(beats) == count


def test_a_heart_that_never_beats_is_refused() -> None:
    with pytest.raises(ValueError, match="positive interval"):
        Heartbeat(interval=0, idle_seconds=lambda: 0.0, beat=lambda: True)


def test_a_peer_that_only_beats_is_alive_and_one_that_stops_is_lost(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    with (
        Channel(PlainTransport(near), peer_timeout=0.4) as mine,
        Channel(PlainTransport(far), peer_timeout=0.4) as peer,
    ):
        peer.start_heartbeat(MessageType.PONG, 0.1)
        begin = time.monotonic()
        while time.monotonic() - begin < 1.2:  # three times the time after which silence counts
            assert mine.receive().type is MessageType.PONG
        assert peer._heartbeat is not None
        peer._heartbeat.stop()
        with pytest.raises(TimedOutError, match=r"did not say anything for 0\.4 s"):
            while True:
                mine.receive()


def test_a_beat_never_comes_inside_a_message(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with Channel(PlainTransport(near), peer_timeout=10) as mine, Channel(PlainTransport(far), peer_timeout=10) as peer:
        mine.start_heartbeat(MessageType.PING, 0.001)
        body = bytes(range(256)) * 4
        sending = threading.Thread(
            target=lambda: [mine.send(MessageType.ABORT, epoch=n, body=body) for n in range(200)]
        )
        sending.start()
        aborts = []
        while len(aborts) < 200:
            message = peer.receive()
            if message.type is MessageType.ABORT:
                aborts.append(message)
            else:
                assert message.type is MessageType.PING
        sending.join()
        assert [message.epoch for message in aborts] == list(range(200))
        assert {message.body for message in aborts} == {body}


def test_a_send_to_a_peer_that_takes_nothing_ends_in_time(ends: tuple[socket.socket, socket.socket]) -> None:
    near, _far = ends
    with Channel(PlainTransport(near), peer_timeout=0.2) as mine:
        with pytest.raises(TimedOutError):
            for n in range(100_000):
                mine.send(MessageType.ABORT, epoch=n, body=bytes(1024))
        with pytest.raises(TimedOutError, match="did not take a message"):  # half of one is out: no other may follow
            mine.send(MessageType.PING)


def test_a_message_that_does_not_exist_and_a_body_too_long_are_refused(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    with Channel(PlainTransport(near), peer_timeout=1) as mine:
        far.sendall(message_header(0x77, 1, 0))
        with pytest.raises(ProtocolError, match="message 0x77, which does not exist"):
            mine.receive()
        far.sendall(message_header(MessageType.ABORT, 1, 1 << 40))
        with pytest.raises(ProtocolError, match="announced 1099511627776 bytes for ABORT, at most 1024"):
            mine.receive()
        far.sendall(message_header(MessageType.PING, 1, 1))
        with pytest.raises(ProtocolError, match="announced 1 bytes for PING, at most 0"):
            mine.receive()
        far.sendall(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n")
        with pytest.raises(ProtocolError, match="no message of colocache"):
            mine.receive()


def test_the_last_word_arrives_though_the_peer_was_still_sending(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    with Channel(PlainTransport(near), peer_timeout=2) as mine:
        inbox = Inbox(mine)
        inbox.start()
        for _ in range(50):
            mine.send(MessageType.ABORT, body=bytes(1024))  # unread by the peer when it closes
        with Channel(PlainTransport(far), peer_timeout=2) as peer:
            end_with(peer, AbortKind.CHECKPOINT, "enough", epoch=5)
        with pytest.raises(CheckpointAbortedError, match="enough"):
            inbox.expect(State.SENT, 5, 2.0)
        inbox.stop()


def test_a_load_that_failed_late_is_still_told(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    with Channel(PlainTransport(near), peer_timeout=2) as mine:
        inbox = Inbox(mine)
        inbox.start()
        with pytest.raises(TimedOutError) as caught:
            inbox.expect(State.SEALED, 5, 0.01)
        with Channel(PlainTransport(far), peer_timeout=2) as peer:
            end_with(peer, AbortKind.LOAD, "the disk is gone", epoch=5)
        why = inbox.why_ended(caught.value)
        assert isinstance(why, SecondaryLostError)
        assert "the disk is gone" in str(why)
        inbox.stop()


def test_silence_wakes_a_sender_that_is_stuck(ends: tuple[socket.socket, socket.socket]) -> None:
    """A stopped peer takes no bytes: whoever sends must hear from the ear that it is silent."""
    near, _far = ends
    with Channel(PlainTransport(near), peer_timeout=0.3) as mine:
        inbox = Inbox(mine)
        inbox.start()
        begin = time.monotonic()
        with pytest.raises((PeerLostError, TimedOutError)) as caught:
            while True:
                mine.send(MessageType.ABORT, body=bytes(1024))
        assert isinstance(inbox.why_ended(caught.value), TimedOutError)
        assert time.monotonic() - begin < 5
        inbox.stop()


def test_silence_in_a_checkpoint_is_noticed_while_whoever_expects_the_answer_is_busy(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A sender in C, stuck at a peer that is stopped, is woken by the end of the channel."""
    near, far = ends
    with Channel(PlainTransport(near), peer_timeout=0.3) as mine:
        inbox = Inbox(mine)
        inbox.start()
        inbox.hear_here(True)
        far.settimeout(5.0)
        assert far.recv(1) == b"", "the channel is not broken"
        assert isinstance(inbox.why_ended(PeerLostError("a broken pipe")), TimedOutError)
        inbox.stop()


def test_an_answer_is_heard_by_the_thread_that_expects_it(ends: tuple[socket.socket, socket.socket]) -> None:
    """No other lies between RECEIVED and a machine that stands."""
    near, far = ends
    readers: list[int] = []
    with Channel(PlainTransport(near), peer_timeout=5) as mine, Channel(PlainTransport(far), peer_timeout=5) as peer:
        sort, inbox = Inbox._sort, Inbox(mine)

        def sorted_by(message: Message) -> None:
            readers.append(threading.get_ident())
            sort(inbox, message)

        inbox._sort = sorted_by  # type: ignore[method-assign]
        inbox.start()
        for epoch in range(1, 20):  # the reading goes to and fro, and no message is lost on the way
            inbox.hear_here(True)
            late = threading.Timer(0.005, lambda: peer.send(MessageType.VMSTATE_RECEIVED, epoch=epoch))  # noqa: B023
            late.start()
            assert inbox.expect(State.SENT, epoch, 5.0).epoch == epoch
            assert readers[-1] == threading.get_ident()
            inbox.hear_here(False)
            late.join()
            peer.send(MessageType.CHECKPOINT_REQUEST)
            assert inbox.checkpoint_wanted.wait(5.0)
            inbox.checkpoint_wanted.clear()
            assert readers[-1] != threading.get_ident()
            inbox.check_idle()
        inbox.stop()


def test_a_peer_that_goes_in_a_checkpoint_is_told_to_whoever_expects(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    with Channel(PlainTransport(near), peer_timeout=5) as mine:
        inbox = Inbox(mine)
        inbox.start()
        inbox.hear_here(True)
        far.shutdown(socket.SHUT_RDWR)
        for _ in range(2):  # the end stays the end
            with pytest.raises(PeerLostError, match="closed the connection"):
                inbox.expect(State.SENT, 1, 5.0)
        assert isinstance(inbox.why_ended(TimedOutError("nothing came")), PeerLostError)
        inbox.stop()


def test_closing_twice_is_allowed_and_ends_the_beat(ends: tuple[socket.socket, socket.socket]) -> None:
    near, _far = ends
    channel = Channel(PlainTransport(near), peer_timeout=1)
    channel.start_heartbeat(MessageType.PING, 0.01)
    channel.close()
    channel.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "colocache-heartbeat"]
    with pytest.raises(PeerLostError, match="this side has closed"):
        channel.send(MessageType.PING)
