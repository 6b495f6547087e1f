# SPDX-License-Identifier: Apache-2.0
"""Two sides on one host meet on different cores; two hosts, and a host with one core, are left as they are."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from colocache.replication.apart import Apart

CORES = os.sched_getaffinity(0)
several = pytest.mark.skipif(len(CORES) < 2, reason="there is one core")


@pytest.fixture
def own_thread_keeps_its_cores() -> Iterator[None]:
    yield
    assert os.sched_getaffinity(0) == CORES


@several
@pytest.mark.usefixtures("own_thread_keeps_its_cores")
def test_two_sides_on_one_host_share_no_core_and_no_core_is_idle() -> None:
    for near, far in (socket.socketpair(), loopback("127.0.0.1")):
        with near, far:
            with Apart(near.fileno(), "primary"):
                primary = os.sched_getaffinity(0)
            with Apart(far.fileno(), "secondary"):
                secondary = os.sched_getaffinity(0)
        assert not primary & secondary  # nor is that of their other threads changed: see own_thread_keeps_its_cores
        assert primary | secondary == CORES


@several
@pytest.mark.usefixtures("own_thread_keeps_its_cores")
def test_a_peer_at_another_address_is_left_alone() -> None:
    near, far = loopback("127.0.0.2")
    with near, far, Apart(near.fileno(), "primary"):
        assert os.sched_getaffinity(0) == CORES


@pytest.mark.usefixtures("own_thread_keeps_its_cores")
def test_a_process_that_is_apart_from_its_peer_is_left_where_it_is_and_may_wait_awake() -> None:
    near, far = socket.socketpair()
    with near, far:
        apart = Apart(near.fileno(), "primary", own_cores=True)
        assert apart.own_core
        with apart:
            assert os.sched_getaffinity(0) == CORES


def test_one_core_is_shared() -> None:
    seen = []

    def on_one() -> None:
        os.sched_setaffinity(0, {min(CORES)})
        near, far = socket.socketpair()
        with near, far:
            for side in ("primary", "secondary"):
                apart = Apart(near.fileno(), side)
                assert not apart.own_core, "it would wait awake, and the peer for it"
                with apart:
                    seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=on_one)
    thread.start()
    thread.join()
    assert seen == [{min(CORES)}] * 2


@several
@pytest.mark.usefixtures("own_thread_keeps_its_cores")
def test_a_checkpoint_that_ends_in_an_error_gives_the_cores_back() -> None:
    near, far = socket.socketpair()
    with near, far, pytest.raises(RuntimeError), Apart(near.fileno(), "primary"):
        raise RuntimeError


def loopback(source: str) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), source_address=(source, 0))
        return near, listener.accept()[0]
