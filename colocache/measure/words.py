# SPDX-License-Identifier: Apache-2.0
"""Times, sizes and shares as a person reads them."""

from __future__ import annotations

import math

from colocache.measure.clock import MIN_ROUNDS, Spread
from colocache.measure.rows import Row

NONE = "–"
QUIET, NOISY = 0.10, 0.30  # spread of the peak
GB_PER_S = (
    "GB/s: 1e9 bytes copied in a second, each byte counted once, though it is read and written; MB and GB are decimal, "
    "MiB and GiB binary."
)


def unit_of(seconds: float) -> tuple[float, str]:
    """What one of it is in seconds, and its name."""
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def time(seconds: float) -> str:
    """With its unit."""
    one, unit = unit_of(seconds)
    return f"{digits(seconds / one)} {unit}"


def spread(seconds: Spread) -> str:
    """p10 and p90 in the unit of the median."""
    if not seconds.known:
        return NONE
    one, _ = unit_of(seconds.p50)
    return f"{digits(seconds.p10 / one)}–{digits(seconds.p90 / one)}"


def share(value: float) -> str:
    """Of guest RAM."""
    if value >= 0.095 or not value:
        return f"{value:.0%}"
    return f"{value:.1%}" if value >= 0.0009 else f"{100 * value:.1g}%"


def ratio(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.2f}"


def spread_of_ratio(ratios: Spread) -> str:
    """p10 and p90 of the rounds' own ratios."""
    return f"{ratios.p10:.2f}–{ratios.p90:.2f}" if ratios.known else NONE


def threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def rounds(count: int) -> str:
    return f"{count} round{'s' if count != 1 else ''}"


def ram(n_bytes: int) -> str:
    """Guest RAM, in powers of 1024."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if n_bytes >= size:
            return f"{n_bytes / size:.4g} {unit}"
    return f"{n_bytes / (1 << 20):.4g} MiB"


def dirty(n_bytes: float) -> str:
    """Bytes to copy, in powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= 0.9995 * size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"


def pattern(row: Row) -> str:
    """How the dirty pages lie."""
    if row.pattern != "synthetic":
        return row.pattern
    if row.dirty_ratio >= 1:
        return "one run"
    return runs(row.run_pages)


def runs(pages: float) -> str:
    return "single pages" if round(pages) == 1 else f"runs of {pages:.0f}"


def noise(value: float | None) -> str:
    """How far the figures can be trusted, as a sentence."""
    if value is None:
        return f"How noisy this machine was can't be told from fewer than {MIN_ROUNDS} rounds."
    how = "quiet" if value <= QUIET else "noisy" if value <= NOISY else "very noisy"
    advice = ""
    if value > QUIET:
        advice = "; trust the ratios more than the figures"
    if value > NOISY:
        advice = "; something else was running here: stop it and measure again"
    return f"This machine was {how}: its peak copy bandwidth varied by {value:.0%} (p10 to p90 of the rounds){advice}."
