# SPDX-License-Identifier: Apache-2.0
"""What both sides can be told: times in seconds and limits."""

from __future__ import annotations

from dataclasses import dataclass

from colocache.choices import RESUME_AT, STREAMS_MAX
from colocache.errors import ArgumentError


@dataclass(frozen=True)
class Timing:
    """Time limits of one side, in seconds."""

    peer_timeout: float = 2.0  # without a byte from the peer: it is lost
    reconnect_limit: float = 10.0  # after a loss, before the arbiter is asked
    connect_limit: float = 30.0  # for the first connection
    checkpoint_timeout: float = 60.0  # for each answer of a peer that lives but is busy
    run_on: float = 1.0  # how long a machine that goes on alone runs before its last check; 0 = until it is stopped

    def __post_init__(self) -> None:
        for name in ("peer_timeout", "connect_limit", "checkpoint_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise ArgumentError(f"{name} is {getattr(self, name):g} s: give more than 0 and at most a day")
        for name in ("reconnect_limit", "run_on"):
            if not 0 <= getattr(self, name) <= 86400:
                raise ArgumentError(f"{name} is {getattr(self, name):g} s: give 0 to a day")

    @property
    def ping_interval(self) -> float:
        """Four signs of life within the time after which silence counts as death."""
        return self.peer_timeout / 4


@dataclass(frozen=True)
class PrimaryOptions:
    """How a primary takes its checkpoints."""

    pair: str = "colocache"
    timing: Timing = Timing()
    interval: float = 0.5  # seconds between checkpoints
    checkpoints: int = 0  # end after so many; 0 = go on until stopped
    background: bool = True  # send pages between checkpoints too
    round_delay: float = (
        0.0  # seconds between two looks at how much is dirty; 0 = a quarter of the interval, 50 ms at least
    )
    round_pages: int = 1  # dirty pages that such a look starts a round of sending at
    dirty_limit_pages: int = 0  # dirty pages that call for a checkpoint before its time; 0 = no limit
    output_delay: float = 0.0  # seconds that output may wait before a checkpoint is taken for it; 0 = until its time
    streams: int = 1  # connections that carry pages at once
    rejoin: bool = False  # a secondary that is gone for good may be given up for a fresh one
    resume_at: str = "received"  # the machine runs again at RECEIVED, or, to compare, at LOADED
    own_cores: bool = False  # the peer is on this host, and on other cores: whoever waits for it may stay awake

    def __post_init__(self) -> None:
        if self.resume_at not in RESUME_AT:
            raise ArgumentError(f"resume_at is {self.resume_at!r}: give {' or '.join(RESUME_AT)}")
        _check_streams(self.streams)
        if not 0 <= self.round_delay <= 86400:
            raise ArgumentError(f"round_delay is {self.round_delay:g} s: give 0 to a day")
        if not 0 <= self.output_delay <= 86400:
            raise ArgumentError(f"output_delay is {self.output_delay:g} s: give 0 to a day")
        if not 0 <= self.interval <= 86400:
            raise ArgumentError(f"the interval is {self.interval:g} s: give 0 to a day")


@dataclass(frozen=True)
class SecondaryOptions:
    """How a secondary waits and takes over."""

    pair: str = "colocache"
    timing: Timing = Timing()
    ask_at_dirty_pages: int = 0  # ask the primary for a checkpoint when the SVM has dirtied so many; 0 = never
    streams: int = 1  # connections that carry pages at once; the primary must want the same
    own_cores: bool = False  # as the primary's
    memory_limit: int = 0  # bounded memory: bytes beside the one image; 0 = no limit

    def __post_init__(self) -> None:
        _check_streams(self.streams)


def _check_streams(streams: int) -> None:
    if not 1 <= streams <= STREAMS_MAX:
        raise ArgumentError(f"{streams} streams: give 1 to {STREAMS_MAX}")
