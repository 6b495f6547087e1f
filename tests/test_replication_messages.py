# SPDX-License-Identifier: Apache-2.0
"""The words of the conversation: what may be said, and that nothing else gets through."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache import ArgumentError, message_header, parse_header
from colocache._native import ffi, lib
from colocache.replication.address import UNIX_PATH_BYTES_MAX, Address
from colocache.replication.conversation import Meeting, meet
from colocache.replication.errors import ProtocolError
from colocache.replication.hello import Hello, HelloBlock
from colocache.replication.messages import (
    EPOCH_LIMIT,
    REASON_BYTES_MAX,
    U64_MAX,
    AbortKind,
    MessageType,
    body_bytes_max,
    decode_reason,
    encode_reason,
    join_u64,
    name_of,
    parse_message,
    split_u64,
)
from colocache.spec import BLOCKS_MAX

HISTORY = bytes(range(16))
names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=40)
blocks = st.builds(
    lambda name, pages, shift: HelloBlock(name, pages << shift, 1 << shift),
    names,
    st.integers(1, 1 << 30),
    st.integers(12, 21),
)
hellos = st.builds(
    Hello,
    role=st.sampled_from(["primary", "secondary"]),
    pair=names.filter(lambda name: len(name.encode()) <= 64),
    history=st.none() | st.binary(min_size=16, max_size=16),
    sealed_epoch=st.integers(0, EPOCH_LIMIT - 1),
    used_epoch=st.integers(0, EPOCH_LIMIT - 1),
    in_flight=st.integers(0, EPOCH_LIMIT - 1),
    rejoin=st.booleans(),
    lost=st.booleans(),
    machine=names,
    blocks=st.lists(
        st.none() | blocks, min_size=1, max_size=8, unique_by=lambda block: block.name if block else object()
    ).map(tuple),
    streams=st.integers(1, 16),
    session=st.none() | st.binary(min_size=16, max_size=16),
    disks=st.lists(st.integers(0, U64_MAX), max_size=16).map(tuple),
    disk_log=st.integers(0, U64_MAX),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "role": "primary",
        "pair": "colocache",
        "history": HISTORY,
        "sealed_epoch": 3,
        "used_epoch": 4,
        "lost": False,
        "machine": "kvm",
        "blocks": (HelloBlock("boot", 13 * 4096, 4096), HelloBlock("pc.ram", 1 << 30, 4096)),
    }
    return Hello(**{**fields, **changes})


def raw(**changes: Any) -> bytes:
    """The body of a HELLO with fields replaced by anything; None of `drop` stays."""
    fields = json.loads(hello().encode())
    drop = changes.pop("drop", ())
    fields.update(changes)
    return json.dumps({name: value for name, value in fields.items() if name not in drop}).encode()


def decode(body: bytes) -> tuple[Hello | None, str]:
    """A HELLO, or the sentence with which it was refused."""
    try:
        return Hello.decode(body), ""
    except ProtocolError as error:
        return None, str(error)


@given(hellos)
def test_a_hello_arrives_as_it_was_sent(sent: Hello) -> None:
    assert Hello.decode(sent.encode()) == sent


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_hello_and_no_crash(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        Hello.decode(body)


@settings(max_examples=300)
@given(st.sampled_from(sorted(json.loads(hello().encode()))), json_values)
def test_any_value_in_any_field_is_taken_or_refused_in_one_sentence(field: str, value: object) -> None:
    body = raw(**{field: value})
    found, sentence = decode(body)
    assert len(sentence.splitlines()) <= 1
    assert len(sentence) < 400
    assert found is None or json.loads(found.encode()) == json.loads(body)


@settings(max_examples=200)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_is_another_valid_hello(position: int, value: int) -> None:
    body = bytearray(hello().encode())
    body[position % len(body)] = value
    found, sentence = decode(bytes(body))
    assert len(sentence.splitlines()) <= 1
    assert found is None or Hello.decode(found.encode()) == found


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (raw(wire_version=1), "speaks version 1 of the conversation, this side 7"),
        (raw(wire_version=True), "wire_version is not a number"),
        (raw(drop=("lost",)), "its fields are not those"),
        (raw(more=1), "its fields are not those"),
        (raw(role="observer"), "role is not one of primary, secondary"),
        (raw(pair=""), "pair is not printable text"),
        (raw(pair="x" * 65), "pair is not printable text of 1 to 64 bytes"),
        (raw(pair="a\nb"), "pair is not printable text"),
        (raw(history="12"), "history is not 32 hexadecimal digits"),
        (raw(history="G" * 32), "history is not 32 hexadecimal digits"),
        (raw(sealed_epoch=-1), "sealed_epoch is not a number"),
        (raw(sealed_epoch=1 << 64), "sealed_epoch is not a number"),
        (raw(used_epoch=EPOCH_LIMIT), "used_epoch is 281474976710656; epoch numbers are below 2^48"),
        (raw(in_flight=EPOCH_LIMIT), "in_flight is 281474976710656; epoch numbers are below 2^48"),
        (raw(sealed_epoch=10**30), "a number has 31 digits"),
        (raw(used_epoch=1.5), "1.5 is not a whole number"),
        (raw(lost=1), "lost is neither true nor false"),
        (raw(blocks=[]), f"blocks is not a list of 1 to {BLOCKS_MAX}"),
        (raw(blocks=[["a", 4096, 4096]] * (BLOCKS_MAX + 1)), f"blocks is not a list of 1 to {BLOCKS_MAX}"),
        (raw(blocks=[["a", 4096]]), "a block is not"),
        (raw(blocks=[["a", 4097, 4096]]), "a block of 4097 bytes is not a multiple of its pages of 4096"),
        (raw(blocks=[["a", 0, 4096]]), "a block of 0 bytes"),
        (raw(blocks=[["a", 8192, 8191]]), "pages of 8191 bytes are not a power of two"),
        (raw(blocks=[["a", 2048, 2048]]), "pages of 2048 bytes"),
        (raw(blocks=[["a", 4096, 4096], ["a", 8192, 4096]]), "two blocks have the same name"),
        (raw(blocks=[False]), "a block is not"),
        (raw(blocks=[None, ["a", 4096, 4096], ["a", 8192, 4096]]), "two blocks have the same name"),
        (raw(blocks=[["x" * 256, 4096, 4096]]), "the name of a block is not printable text of 1 to 255 bytes"),
        (b'{"wire_version":1,"wire_version":1}', "a field occurs twice"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"wire_version":NaN}', "NaN is not a whole number"),
        (b"[1]", "it is not an object"),
        (b"\xff\xfe", "can't be read"),
    ],
)  # fmt: skip
def test_a_wrong_hello_is_refused_with_what_is_wrong(body: bytes, what: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Hello.decode(body)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hello_with_the_most_and_longest_blocks_keeps_its_bound() -> None:
    longest = tuple(HelloBlock(f"{n:03d}" + "\u20ac" * 84, 1 << 40, 4096) for n in range(BLOCKS_MAX))
    assert len(hello(blocks=longest).encode()) <= body_bytes_max(MessageType.HELLO, 0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"role": "primary"}, "both sides are a primary"),
        ({"pair": "other"}, "the peer belongs to pair 'other'"),
        ({"machine": "process"}, "the peer's machine is 'process'"),
        (
            {"blocks": (HelloBlock("boot", 13 * 4096, 4096),)},
            "RAM block 1, pc.ram (1073741824 bytes in pages of 4096), is here and not at the peer: add or remove it",
        ),
        (
            {"blocks": (*hello().blocks, HelloBlock("dimm", 4096, 4096))},
            "RAM block 2, dimm (4096 bytes in pages of 4096), is at the peer and not here: add or remove it",
        ),
        (
            {"blocks": (None, *hello().blocks[1:])},
            "RAM block 0, boot (53248 bytes in pages of 4096), is here and not at",
        ),
        ({"blocks": (*hello().blocks, None)}, "the peer has had 3 RAM blocks, this side 2"),
        (
            {"blocks": (HelloBlock("boot", 13 * 4096, 4096), HelloBlock("pc.ram", 1 << 29, 4096))},
            "RAM block 1 is pc.ram (536870912 bytes in pages of 4096) at the peer",
        ),
    ],
)
def test_two_that_do_not_belong_together_are_told_why(change: dict[str, Any], what: str) -> None:
    peer = hello(**{"role": "secondary", **change})
    meeting, reason = meet(hello(), peer)
    assert meeting is Meeting.REFUSED
    assert what in reason
    assert meet(hello(), hello(role="secondary"))[0] is Meeting.GO_ON


def test_message_numbers_are_qemus_and_ours_from_0x100() -> None:
    assert [MessageType(n).name for n in range(7)] == [
        "CHECKPOINT_READY",
        "CHECKPOINT_REQUEST",
        "CHECKPOINT_REPLY",
        "VMSTATE_SEND",
        "VMSTATE_SIZE",
        "VMSTATE_RECEIVED",
        "VMSTATE_LOADED",
    ]
    assert [MessageType(0x100 + n).name for n in range(10)] == [
        "PAGES", "HELLO", "ABORT", "PING", "PONG", "STREAM", "OUTPUT", "INPUT", "DISK", "DISKS",
    ]  # fmt: skip
    assert name_of(77) == "message 0x4d"


def test_only_eight_messages_have_a_body_and_each_a_bound() -> None:
    with_body = {kind for kind in MessageType if body_bytes_max(kind, 100)}
    assert with_body == {
        MessageType.HELLO,
        MessageType.ABORT,
        MessageType.VMSTATE_SEND,
        MessageType.STREAM,
        MessageType.OUTPUT,
        MessageType.INPUT,
        MessageType.DISK,
        MessageType.DISKS,
    }
    assert body_bytes_max(MessageType.VMSTATE_SEND, 100) == 100


@given(st.sampled_from(list(MessageType)), st.integers(0, U64_MAX))
def test_no_message_carries_an_epoch_that_a_pair_could_not_go_on_from(kind: MessageType, epoch: int) -> None:
    header = bytearray(message_header(MessageType.PING, 1, 0))
    struct.pack_into("<HQ", header, 6, kind, epoch)
    struct.pack_into("<Q", header, 32, lib.colocache_checksum(ffi.from_buffer(header), 32))
    if epoch < EPOCH_LIMIT:
        assert parse_message(bytes(header)).epoch == epoch
    else:
        with pytest.raises(ProtocolError, match=f"has epoch {epoch}, the most is {EPOCH_LIMIT - 1}"):
            parse_message(bytes(header))


def test_epochs_have_one_bound() -> None:
    assert lib.COLOCACHE_EPOCH_MAX == EPOCH_LIMIT - 1


@given(st.integers(0, U64_MAX))
def test_a_count_of_64_bits_survives_the_two_words(value: int) -> None:
    assert join_u64(*split_u64(value)) == value
    header = parse_header(message_header(4, 1, 0, *split_u64(value)))
    assert join_u64(header.a, header.b) == value


@given(st.text(max_size=2000))
def test_a_reason_fits_its_bound_and_one_line(reason: str) -> None:
    body = encode_reason(reason)
    assert len(body) <= REASON_BYTES_MAX
    shown = decode_reason(body)
    assert shown.isprintable()
    assert shown


@given(st.binary(max_size=1200))
def test_any_bytes_make_a_printable_reason(body: bytes) -> None:
    assert decode_reason(body).isprintable()


def test_abort_kinds_do_not_move() -> None:
    assert [(kind.name, int(kind)) for kind in AbortKind] == [
        ("CHECKPOINT", 1),
        ("SESSION", 2),
        ("REFUSED", 3),
        ("LOAD", 4),
        ("END", 5),
        ("TOOK_OVER", 6),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("host:1", "host:1"),
        ("tcp:127.0.0.1:65535", "127.0.0.1:65535"),
        ("[::1]:80", "[::1]:80"),
        ("unix:/tmp/x", "unix:/tmp/x"),
        ("[fe80::1%eth0]:80", "[fe80::1%eth0]:80"),
    ],
)
def test_an_address_is_read_and_shown(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:x",
        "host:65536",
        "host:-1",
        "::1:80",
        "unix:",
        "unix:" + "x" * 108,
        "host:٣",
        "a..b:80",
        "." + "a:80",
        "x" * 64 + ".example:80",
        "a b:80",
        "a\0b:80",
        "a\nb:80",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        Address.parse(text)
    assert UNIX_PATH_BYTES_MAX == 107


def test_a_unix_path_may_be_any_bytes(tmp_path: Path) -> None:
    """As they come from a command line that is no UTF-8."""
    text = f"unix:{tmp_path}/" + os.fsdecode(b"s\xff\xfe")
    listener, address = Address.parse(text).listen()
    with listener:
        with address.connect(1.0), listener.accept()[0]:
            pass
        assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"s\xff\xfe"]
        assert json.loads(json.dumps({"address": str(address)}))["address"] == text
    address.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="has 204 bytes"):
        Address.parse("unix:" + os.fsdecode(b"\xff" * 204))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_a_host_is_listened_on_and_reached_whatever_family_it_has(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no ::1")
    listener, address = Address(host, 0, "").listen()
    with listener, Address.parse(str(address)).connect(1.0) as made:
        made.close()


def test_a_name_with_only_an_aaaa_record_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _has_ipv6():
        pytest.skip("this machine has no ::1")
    real = socket.getaddrinfo

    def only_v6(host: str, *args: Any, **named: Any) -> Any:
        return real("::1" if host == "six.example" else host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", only_v6)
    listener, address = Address("six.example", 0, "").listen()
    with listener, address.connect(1.0):
        assert listener.family == socket.AF_INET6


def test_a_link_local_address_keeps_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound with the scope that getaddrinfo finds for the zone: without it the kernel does not know which link."""
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    bound: list[Any] = []

    class Seen(socket.socket):
        def bind(self, name: Any) -> None:
            bound.append(name)
            super().bind(("::1", 0))

    monkeypatch.setattr(socket, "socket", Seen)
    listener, _ = Address.parse("[fe80::1%lo]:0").listen()
    listener.close()
    assert [name[3] for name in bound] == [socket.if_nametoindex("lo")]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
