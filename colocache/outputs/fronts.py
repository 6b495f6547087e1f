# SPDX-License-Identifier: Apache-2.0
"""All fronts of one side as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from colocache.outputs.front import FileFront, Front, NoFront
from colocache.outputs.keyboard import Keyboard
from colocache.outputs.tap import TapFront, tap_name
from colocache.outputs.travel import Origin
from colocache.outputs.typed import TypedInput
from colocache.outputs.unix_front import UnixFront


class Fronts(NoFront):
    """Several, each for another channel."""

    def __init__(self, fronts: Sequence[Front]) -> None:
        self._fronts = fronts

    def show(self) -> None:
        """See Front."""
        for one in self._fronts:
            one.show()

    def listen(self, on_packet: Callable[[bytes], None]) -> None:
        """See Front."""
        for one in self._fronts:
            one.listen(on_packet)

    def hear(self, typed: TypedInput | None) -> None:
        """See Front."""
        for one in self._fronts:
            one.hear(typed)

    def emit(self, channel: int, data: bytes) -> None:
        """See Front."""
        for one in self._fronts:
            one.emit(channel, data)

    def origin(self) -> Origin:
        """See Front."""
        return next((one.origin() for one in self._fronts if one.origin() != Origin()), Origin())

    def seen(self, origin: Origin, channel: int) -> int:
        """See Front."""
        return max((one.seen(origin, channel) for one in self._fronts), default=0)

    def close(self) -> None:
        """See Front."""
        for one in self._fronts:
            one.close()


def make_front(console: str, net: str = "", *, takes_over: bool = False, stdin: int = 0) -> Front:
    """The front for `--console`, "" for none, FILE, unix:PATH or "-", whose input comes from the descriptor `stdin`.

    `net`: that of `--net`, "" or tap:NAME. `takes_over`: for a secondary. ArgumentError.
    """
    fronts: list[Front] = []
    if console.startswith("unix:"):
        fronts.append(UnixFront(console.removeprefix("unix:"), takes_over=takes_over))
    elif console:
        fronts.append(FileFront(console))
    if console == "-":
        fronts.append(Keyboard(stdin))
    if net:
        fronts.append(TapFront(tap_name(net)))
    return Fronts(fronts)
