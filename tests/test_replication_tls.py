# SPDX-License-Identifier: Apache-2.0
"""Guest memory crosses a network only under TLS, and only the other side of the pair may be at its end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from certificates import make_certificates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import PAGE, QUICK, TOY_BLOCKS, Pair, no_page_wrong, pair_of

from colocache import ArgumentError, BlockSpec, Memory, message_header
from colocache.children import python_command
from colocache.replication.address import Address
from colocache.replication.channel import Channel
from colocache.replication.errors import ProtocolError, RefusedError, SessionEndedError
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, MessageType, encode_reason
from colocache.replication.security import Plain, Security, check_user, is_loopback, make_wrap
from colocache.replication.streams_in import take_streams
from colocache.replication.tls import Certificates, context_of, findings
from colocache.replication.transport import Transport
from colocache.replication.waiting_room import WaitingRoom

Make = Callable[..., Memory]
WIDE_BLOCKS = (BlockSpec("boot", 13 * PAGE), BlockSpec("pc.ram", (3 * 4096 + 2100) * PAGE))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of pair toy, those of pair other, and those of pair toy by an authority of somebody else's."""
    base = tmp_path_factory.mktemp("certificates")
    make_certificates(base / "toy", "toy")
    make_certificates(base / "other", "other")
    make_certificates(base / "theirs", "toy")
    return base


def security(folder: Path, side: str, *, ca: Path | None = None) -> Security:
    return Security(str(folder / f"{side}.pem"), str(folder / f"{side}.key"), str((ca or folder) / "ca.pem"))


def options(folder: Path, side: str) -> tuple[str, ...]:
    """The same for the command line."""
    given = security(folder, side)
    return ("--tls-cert", given.tls_cert, "--tls-key", given.tls_key, "--tls-ca", given.tls_ca)


def wraps(folder: Path) -> dict[str, object]:
    return {
        role: make_wrap(security(folder, role), pair="toy", role=role, timeout=2.0) for role in ("primary", "secondary")
    }


def over_tcp(pair: Pair, folder: Path) -> Pair:
    pair.listener.close()
    pair.listener, pair.address = Address.parse("127.0.0.1:0").listen()
    pair._stack.enter_context(pair.listener)
    pair.wraps = wraps(folder)  # type: ignore[assignment]
    return pair


@pytest.fixture
def pair(make_memory: Make, tmp_path: Path, folder: Path) -> Iterator[Pair]:
    timing = replace(QUICK, reconnect_limit=5.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield over_tcp(made, folder / "toy")


# ---- a pair over TLS ----


def test_a_pair_keeps_in_step_over_tls(pair: Pair) -> None:
    primary, secondary = pair.start(checkpoints=6)
    assert primary.join().checkpoints == 6
    assert (secondary.join().checkpoints, secondary.result.wrong_pages) == (6, 0)
    no_page_wrong(pair)


@pytest.mark.parametrize("streams", [1, 3])
def test_every_page_arrives_over_every_stream(make_memory: Make, tmp_path: Path, folder: Path, streams: int) -> None:
    timing = replace(QUICK, peer_timeout=5.0)
    with pair_of(make_memory(WIDE_BLOCKS), tmp_path, timing=timing) as pair:
        over_tcp(pair, folder / "toy")
        pair.streams = streams
        primary, secondary = pair.start(checkpoints=5)
        assert primary.join(60).checkpoints == 5
        assert secondary.join(60).wrong_pages == 0
        done = pair.events_s.all("checkpoint")
        assert [event["verified_pages"] for event in done] == [13 + 3 * 4096 + 2100] * len(done)
        assert pair.events_s.all("lost") == []


def test_a_takeover_while_pages_come_is_a_takeover(pair: Pair) -> None:
    """The packet that meets it is refused by an error, and what was read ahead is let go after it all the same."""
    pair.start(interval=0.0)
    pair.events_s.wait("checkpoint", 2)
    take, granted = pair.cache.receive_packets, threading.Event()

    def grant(data: memoryview, *, epoch: int = 0) -> tuple[int, bytes | None, int]:
        if int.from_bytes(data[6:8], "little") == MessageType.PAGES and not granted.is_set():
            granted.set()
            pair.secondary.request_failover()
        return take(data, epoch=epoch)

    pair.cache.receive_packets = grant  # type: ignore[method-assign]
    pair.events_s.wait("takeover")
    assert granted.is_set()
    assert "operator said" in pair.events_p.wait("stands")["reason"]
    no_page_wrong(pair)


def test_a_veto_and_a_takeover_are_told_over_tls(pair: Pair) -> None:
    """The last words of a session arrive as over a plain socket."""
    pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    pair.svm.veto = "this device is not known here"
    assert "this device is not known here" in pair.events_p.wait("aborted")["reason"]
    pair.svm.veto = None
    pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 2)
    pair.secondary.request_failover()
    assert "operator said" in pair.events_p.wait("stands")["reason"]
    no_page_wrong(pair)


# ---- who may not ----


def as_client(pair: Pair, files: Certificates | None) -> str:
    """What becomes of a client with these certificates that says a proper HELLO: the error it meets, or ""."""
    hello = Hello("primary", "toy", None, 0, 0, False, "toy", pair.blocks).encode()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    with pair.address.connect(5.0) as connection:
        connection.settimeout(10)
        try:
            with context.wrap_socket(connection) as tls:
                tls.sendall(message_header(0x101, 0, len(hello)) + hello)
                answer = tls.recv(100)
        except OSError as error:
            return str(error)
        return "" if answer else "closed"


def test_a_stranger_ends_only_its_own_connection_and_the_primary_gets_in(pair: Pair, folder: Path) -> None:
    pair.make_secondary()
    secondary = pair.run_secondary()
    with pair.address.connect(5.0) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        plain.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while plain.recv(100):
                pass
    silent = pair.address.connect(5.0)
    half = pair.address.connect(5.0)
    half.sendall(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello that does not go on
    strangers = {
        "no certificate": None,
        "of another pair": security(folder / "other", "primary").certificates,
        "of another authority": Certificates(
            str(folder / "theirs/primary.pem"), str(folder / "theirs/primary.key"), ""
        ),
        "the wrong side": security(folder / "toy", "secondary").certificates,
    }
    for what, files in strangers.items():
        assert as_client(pair, files), f"{what} got an answer"
    reasons = " ".join(event["reason"] for event in pair.events_s.all("refused"))
    assert "the TLS handshake failed" in reasons
    assert "is for colocache:toy/secondary, not for colocache:toy/primary" in reasons
    assert pair.cache.status().receiving_epoch == 0
    pair.make_primary(checkpoints=2)
    assert pair.run_primary().join().checkpoints == 2
    assert secondary.join().wrong_pages == 0
    silent.close()
    half.close()
    no_page_wrong(pair)


@pytest.mark.parametrize(
    ("whose", "side", "what"),
    [
        ("other", "secondary", "certificate"),
        ("theirs", "secondary", "certificate"),
        ("toy", "primary", "is for colocache:toy/primary, not for colocache:toy/secondary"),
    ],
)
def test_a_primary_sends_no_byte_to_a_wrong_secondary(
    pair: Pair, folder: Path, whose: str, side: str, what: str
) -> None:
    pair.make_primary()
    files = security(folder / whose, side).certificates
    assert files is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    running = pair.run_primary()
    heard = b""
    with contextlib.suppress(OSError):
        connection, _ = pair.listener.accept()
        connection.settimeout(10)
        with connection, context.wrap_socket(connection, server_side=True) as tls:
            heard = tls.recv(100)
    with pytest.raises(ProtocolError, match=what):
        running.join()
    assert heard == b""


# ---- the bytes ----


@contextlib.contextmanager
def both_ends(folder: Path, *, buffer_bytes: int = 0) -> Iterator[tuple[Transport, Transport]]:
    """A primary's and a secondary's transport on one connection, hands shaken."""
    both = wraps(folder)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs) if buffer_bytes else ():
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    server = both["secondary"](theirs)  # type: ignore[operator]
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(both["primary"], ours)  # type: ignore[arg-type]
        while not connecting.done():
            assert server.receive(memoryview(bytearray(1))) is None
        client = connecting.result()
        with contextlib.closing(client), contextlib.closing(server):
            yield client, server


@given(
    parts=st.lists(st.lists(st.integers(1, 300_000), min_size=1, max_size=3), min_size=1, max_size=6),
    rooms=st.lists(st.integers(500, 400_000), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_byte_arrives_in_order_however_little_the_socket_takes(
    folder: Path, parts: list[list[int]], rooms: list[int], seed: int
) -> None:
    """The oracle: all that was sent, one after the other."""
    order = Random(seed)
    sent = order.randbytes(sum(map(sum, parts)))
    came, at = bytearray(), 0
    with both_ends(folder / "toy", buffer_bytes=20_000) as (client, server):
        waiting: list[list[memoryview]] = []
        for group in parts:
            waiting.append([])
            for n in group:
                waiting[-1].append(memoryview(sent)[at : at + n])
                at += n
        turn = 0
        while len(came) < len(sent) and turn < 50_000:
            if waiting and order.random() < 0.5:
                group_left = waiting[0]
                taken = client.send(group_left) or 0
                while group_left and taken >= len(group_left[0]):
                    taken -= len(group_left.pop(0))
                if group_left:
                    group_left[0] = group_left[0][taken:]
                else:
                    waiting.pop(0)
                continue
            room = bytearray(rooms[turn % len(rooms)])
            turn += 1
            came += room[: server.receive(memoryview(room)) or 0]
        assert bytes(came) == sent
        client.shut_down(socket.SHUT_WR)
        assert server.receive(memoryview(bytearray(1))) == 0


def test_what_came_behind_another_message_is_heard_at_once(folder: Path) -> None:
    """Over TLS a poll does not tell of it: a primary that gives up does not cost the time for its streams."""
    own = Hello("secondary", "toy", None, 0, 0, False, "toy", (), streams=2, session=b"s" * 16)
    hello = Hello("primary", "toy", None, 0, 0, False, "toy", (), streams=2).encode()
    reason = encode_reason("I think again")
    words = [
        message_header(int(MessageType.HELLO), 0, len(hello)) + hello,
        message_header(int(MessageType.PING), 0, 0),
        message_header(int(MessageType.ABORT), 0, len(reason), int(AbortKind.SESSION)) + reason,
    ]
    with both_ends(folder / "toy") as (client, server), socket.create_server(("127.0.0.1", 0)) as nobody:
        assert client.send([memoryview(word) for word in words]) == sum(map(len, words))
        channel = Channel(server, peer_timeout=5.0)
        assert channel.receive().type is MessageType.HELLO
        room = WaitingRoom(nobody, peer_timeout=5.0, device_state_max=0)
        with contextlib.closing(room), pytest.raises(SessionEndedError, match="I think again"):
            take_streams(room, channel, own, seconds=1.0, refused=print)


def test_nobody_waits_awake_for_what_is_here_already(folder: Path) -> None:
    word = message_header(int(MessageType.PING), 0, 0)
    with both_ends(folder / "toy") as (client, server):
        assert client.send([memoryview(word), memoryview(word)]) == 2 * len(word)
        channel = Channel(server, peer_timeout=5.0)
        channel.may_spin = True
        assert channel.receive().type is MessageType.PING

        def poll(_: int) -> list[object]:
            raise AssertionError("the socket was asked")

        channel._readable = SimpleNamespace(poll=poll)  # type: ignore[assignment]
        channel.spin()
        assert channel.receive().type is MessageType.PING


# ---- plain sockets ----


def test_plain_tcp_leaves_this_machine_only_by_the_operators_word() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("192.0.2.1")
    assert not is_loopback("fe80::1%eth0")

    class Far(socket.socket):
        def getpeername(self) -> tuple[str, int]:
            return ("192.0.2.1", 7)

    with Far() as far, pytest.raises(RefusedError, match=r"plain TCP with 192\.0\.2\.1 would show guest memory"):
        Plain()(far)
    with Far() as far:
        Plain(insecure=True)(far).close()


def test_a_unix_socket_is_this_users() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which lets nobody else through
        listener, address = Address.parse(f"unix:{folder}/s").listen()
        with listener:
            assert Path(address.path).stat().st_mode & 0o777 == 0o600
            with address.connect(1.0) as mine, listener.accept()[0] as theirs:
                check_user(mine)
                check_user(theirs)
            if os.geteuid() != 0:
                pytest.skip("only root can become somebody else")
            Path(address.path).chmod(0o666)  # as if it had been opened to all
            Path(folder).chmod(0o755)
            code = "import os,socket,sys; os.setuid(65534); s=socket.socket(1); s.connect(sys.argv[1]); s.recv(1)"
            with subprocess.Popen([sys.executable, "-c", code, address.path]) as other:
                listener.settimeout(10)
                connection = listener.accept()[0]
                with pytest.raises(RefusedError, match="of user 65534, this is user 0"):
                    Plain()(connection)
                other.wait(10)


# ---- the files, and what is said of them ----


def test_files_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    toy = folder / "toy"
    with pytest.raises(ArgumentError, match="TLS needs all three"):
        Security(tls_cert="x")
    with pytest.raises(ArgumentError, match="can't be read: No such file"):
        context_of(
            Certificates(str(tmp_path / "none"), str(toy / "primary.key"), str(toy / "ca.pem")), server_side=False
        )
    with pytest.raises(ArgumentError, match="are no certificate and its key: key values mismatch"):
        context_of(
            Certificates(str(toy / "primary.pem"), str(toy / "secondary.key"), str(toy / "ca.pem")), server_side=False
        )
    good = security(toy, "primary").certificates
    assert good is not None
    assert findings(good, "toy", "primary") == []
    assert "is for colocache:toy/primary, not for colocache:else/primary" in findings(good, "else", "primary")[0]


def test_doctor_looks_at_certificates(folder: Path) -> None:
    toy = folder / "toy"

    def doctor(*args: str) -> tuple[int, dict[str, object]]:
        command = python_command("colocache.cli", "main", "doctor", "--json", *args)
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        report = json.loads(ran.stdout.splitlines()[-1])
        return ran.returncode, next(one for one in report["findings"] if one["name"] == "TLS")

    files = options(toy, "secondary")
    status, found = doctor("--pair", "toy", *files)
    assert found["ok"]
    assert "certificates of the secondary of pair toy" in str(found["found"])
    assert status == 0
    status, found = doctor("--pair", "mine", *files)
    assert not found["ok"]
    assert status == 1


def test_the_commands_pair_over_tls_and_refuse_plain_tcp_beyond_this_machine(folder: Path) -> None:
    toy = folder / "toy"

    common = ("--pair", "toy", "--guest", "process", "--ram", "8M", "--backing", "shm", "--events")
    args = ["secondary", "--listen", "127.0.0.1:0", *common, *options(toy, "secondary")]
    secondary = subprocess.Popen(
        python_command("colocache.cli", "main", *args),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert secondary.stdout is not None
    try:
        address = ""
        while not address:
            event = json.loads(secondary.stdout.readline())
            address = event.get("address", "") if event["event"] == "listening" else ""
        args = ["primary", "--connect", address, *common, "--checkpoints", "3", *options(toy, "primary")]
        command = python_command("colocache.cli", "main", *args)
        primary = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert primary.returncode == 0, primary.stdout + primary.stderr
        assert secondary.wait(60) == 0
    finally:
        secondary.kill()
        secondary.wait()
        secondary.stdout.close()
    refused = subprocess.run(
        python_command("colocache.cli", "main", "secondary", "--listen", "0.0.0.0:0", *common),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "plain TCP with 0.0.0.0 would show guest memory" in refused.stderr
    assert "--insecure" in refused.stderr


def test_pages_over_tls_are_measured_beside_ssl() -> None:
    """bench/beside_ssl.py, with the least of everything; it compares what came with what was sent."""
    script = Path(__file__).resolve().parent.parent / "bench" / "beside_ssl.py"
    if not script.is_file():
        pytest.skip("these tests are not in a source tree")
    least = ["--ram", "8M", "--rounds", "1", "--streams", "2", "--backing", "shm", "--json"]
    done = subprocess.run([sys.executable, script, *least], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [len(rates) for rates in json.loads(done.stdout)["gb_per_s"]["2"].values()] == [1, 1, 1, 1]
