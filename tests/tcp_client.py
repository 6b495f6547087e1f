# SPDX-License-Identifier: Apache-2.0
"""A client of the guest's server (linux_guest.SERVER), by itself: one connection, a line each 20 ms until stdin says
enough, and then one line of JSON: replies, wrong, error, longest wait and the median in ms."""

from __future__ import annotations

import json
import select
import socket
import sys
import time

PATIENCE = 30.0  # for one reply


def connect() -> socket.socket:
    """As soon as the guest's server is there."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("10.9.0.2", 7777), timeout=3)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main() -> None:
    waits: list[float] = []
    wrong, error = 0, ""
    with connect() as talk:
        print("connected", flush=True)
        talk.settimeout(PATIENCE)
        lines = talk.makefile("rw")
        try:
            while not select.select([sys.stdin], [], [], 0.02)[0]:
                word = f"{len(waits) + 1}"
                begin = time.monotonic()
                print(word, file=lines, flush=True)
                reply = lines.readline()
                waits.append(time.monotonic() - begin)
                wrong += reply != f"{word} {word}\n"
        except OSError as problem:
            error = repr(problem)
    told = sorted(waits) or [0.0]
    result = {"replies": len(waits), "wrong": wrong, "error": error}
    print(json.dumps({**result, "longest_ms": told[-1] * 1e3, "median_ms": told[len(told) // 2] * 1e3}))


main()
