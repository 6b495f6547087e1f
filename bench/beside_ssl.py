# SPDX-License-Identifier: Apache-2.0
"""Pages over TLS beside what Python's ssl moves at best: one process sends, another receives, TCP on loopback.

    .venv/bin/python bench/beside_ssl.py [--ram 512M] [--rounds 5] [--streams 1 --streams 2] [--backing auto] [--json]

In each round, one after the other: `ssl`, bytes of one buffer into one buffer; `tls`, pages of a guest into a COLO
cache by the very channel of a pair; and the same two without TLS, `socket` and `plain`. Told are medians in GB/s with
the lowest and highest round, and pages over TLS as a share of what ssl moved in the same round.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import ssl
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from colocache import BlockSpec, Cache, Memory, Sender
from colocache.commands.options import parse_size
from colocache.replication.channel import Channel
from colocache.replication.messages import MessageType
from colocache.replication.security import Security, make_wrap
from colocache.replication.tls import HOW_TO
from colocache.replication.transport import Wrap

PAGE = 4096
PIECE = 1 << 20
SECONDS = 60.0
Pages = npt.NDArray[np.uint8]  # (n_pages, 4096)


def make_certificates(folder: Path) -> None:
    """By the commands that the help gives."""
    commands = HOW_TO[HOW_TO.index("  openssl") :].replace("PAIR", "bench")
    subprocess.run(["sh", "-e"], input=commands, text=True, cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def in_a_child(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a process of its own, which is gone afterwards."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def connections(n: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Both ends of `n` connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = [], []
        for _ in range(n):
            ours.append(socket.create_connection(listener.getsockname()))
            theirs.append(listener.accept()[0])
    return ours, theirs


# ---- bytes ----------------------------------------------------------------------------------------------------------


def bytes_rate(n_bytes: int, n: int, folder: Path | None) -> float:
    """GB/s of `n_bytes` over `n` connections; `folder`: of the certificates, None: without TLS."""
    ours, theirs = connections(n)

    def send(connection: socket.socket) -> None:
        if folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        piece = memoryview(bytearray(os.urandom(PIECE)))
        while True:
            left = piece
            while left:
                left = left[connection.send(left) :]

    def receive(connection: socket.socket) -> None:
        room, left = memoryview(bytearray(PIECE)), n_bytes // n
        while left > 0:
            left -= connection.recv_into(room)

    with in_a_child(lambda: at_once(send, ours)):
        if folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "secondary.pem", folder / "secondary.key")
            theirs = [context.wrap_socket(connection, server_side=True) for connection in theirs]
        for connection in theirs:
            connection.recv(1)
        begun = time.perf_counter()
        at_once(receive, theirs)
        taken = time.perf_counter() - begun
    for connection in (*ours, *theirs):
        connection.close()
    return n_bytes / taken / 1e9


# ---- pages ----------------------------------------------------------------------------------------------------------


def pages_rate(guest: Pages, cache: Cache, epoch: int, n: int, wraps: dict[str, Wrap]) -> float:
    """GB/s of all of `guest` into `cache`, as `epoch`, over `n` streams."""
    ours, theirs = connections(n)

    def primary() -> None:
        with Sender() as sender:
            sender.add_block("pc.ram", int(guest.ctypes.data), guest.nbytes)
            sender.mark_all()

            def send(index: int) -> None:
                channel = Channel(wraps["primary"](ours[index]), peer_timeout=SECONDS)
                channel.send(MessageType.PING)
                channel.receive()  # the other side is ready
                channel.send_pages(sender, epoch=epoch, timeout=SECONDS, stripe=index, n_stripes=n)
                channel.send(MessageType.PING)

            at_once(send, range(n))
            time.sleep(SECONDS)

    with in_a_child(primary):
        channels = [Channel(wraps["secondary"](connection), peer_timeout=SECONDS) for connection in theirs]
        for channel in channels:
            channel.receive()  # a server shakes hands while it receives
            channel.send(MessageType.PING)
        n_pages: list[int] = []
        begun = time.perf_counter()
        at_once(lambda channel: n_pages.append(channel.receive_past_pages(cache, epoch)[1]), channels)
        taken = time.perf_counter() - begun
    for channel in channels:
        channel.close()
    for connection in ours:
        connection.close()
    if sum(n_pages) * PAGE != guest.nbytes or not np.array_equal(cache.blocks["pc.ram"].cache, guest):
        raise click.ClickException(f"{sum(n_pages)} pages came of {len(guest)}, or some are wrong")
    cache.abort(epoch, "measured")
    return guest.nbytes / taken / 1e9


Item = TypeVar("Item")


def at_once(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """`work` on each item in a thread of its own; a single one in this thread."""
    threads = [threading.Thread(target=work, args=(item,), daemon=True) for item in items[1:]]
    for thread in threads:
        thread.start()
    work(items[0])
    for thread in threads:
        thread.join()


# ---- the rounds ------------------------------------------------------------------------------------------------------


@click.command(help=__doc__)
@click.option("--ram", type=parse_size, default="512M", help="bytes in a round (default 512M)")
@click.option("--rounds", default=5, help="how often each is measured")
@click.option("--streams", multiple=True, type=click.IntRange(1, 16), default=(1, 2), help="connections; repeatable")
@click.option("--backing", default="auto", help="memory of the secondary: auto, hugetlb, thp or shm")
@click.option("--json", "as_json", is_flag=True, help="every figure instead of the table")
def main(ram: int, rounds: int, streams: tuple[int, ...], backing: str, as_json: bool) -> None:
    guest = np.frombuffer(np.random.default_rng(1).bytes(ram), np.uint8).reshape(-1, PAGE)
    found: dict[int, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_certificates(folder)
        memory = stack.enter_context(Memory.create(None, [BlockSpec("pc.ram", ram)], backing=backing))
        cache = stack.enter_context(Cache.create(memory))
        epochs = itertools.count(1)  # no number is used twice
        tls, plain = wraps(folder, tls=True), wraps(folder, tls=False)
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = progress.add_task("rounds", total=rounds * len(streams))
        for _ in range(rounds):
            for n in streams:
                kinds = found.setdefault(n, {"ssl": [], "tls": [], "socket": [], "plain": []})
                kinds["ssl"].append(bytes_rate(ram, n, folder))
                kinds["tls"].append(pages_rate(guest, cache, next(epochs), n, tls))
                kinds["socket"].append(bytes_rate(ram, n, None))
                kinds["plain"].append(pages_rate(guest, cache, next(epochs), n, plain))
                progress.advance(task)
    if as_json:
        print(json.dumps({"ram_bytes": ram, "memory": memory.why, "gb_per_s": found}))
    else:
        Console().print(table_of(found))


def wraps(folder: Path, *, tls: bool) -> dict[str, Wrap]:
    """Of both sides."""

    def of(role: str) -> Wrap:
        cert, key, ca = (str(folder / name) if tls else "" for name in (f"{role}.pem", f"{role}.key", "ca.pem"))
        return make_wrap(Security(cert, key, ca), pair="bench", role=role, timeout=SECONDS)

    return {role: of(role) for role in ("primary", "secondary")}


def table_of(found: dict[int, dict[str, list[float]]]) -> Table:
    """Medians, lowest and highest."""
    table = Table(box=SIMPLE)
    for title in ("", "ssl, GB/s", "pages, TLS", "of ssl", "socket, GB/s", "pages, plain"):
        table.add_column(title, justify="right")
    for n, kinds in found.items():
        share = [mine / best for mine, best in zip(kinds["tls"], kinds["ssl"], strict=True)]
        rates = {kind: spread_of(values) for kind, values in kinds.items()}
        table.add_row(str(n), rates["ssl"], rates["tls"], spread_of(share), rates["socket"], rates["plain"])
    return table


def spread_of(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
