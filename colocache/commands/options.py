# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the frame that turns foreseen errors into one sentence."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from colocache.choices import GUEST_KINDS
from colocache.errors import ColocacheError

F = TypeVar("F", bound=Callable[..., Any])

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
BACKINGS = ("auto", "hugetlb", "thp", "shm")
FLUSHES = ("copy",)


def parse_size(text: str) -> int:
    """A number of bytes: `64M`, `2G`, `1048576`; a unit is a power of 1024, `MiB` and `MB` mean the same as `M`."""
    short = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = short[-1:] if short[-1:] in UNITS else ""
    digits = short.removesuffix(unit)
    if not digits.isascii() or not digits.isdigit() or len(digits) > 15:
        raise click.BadParameter(f"{text!r} is no size: write 64M, 2G or a number of bytes")
    return int(digits) * UNITS[unit]


def size_option(*names: str, **given: Any) -> Callable[[F], F]:
    """A click.option that takes a size."""
    return click.option(*names, type=parse_size, metavar="SIZE", **given)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which --help shall show them."""

    def apply(function: F) -> F:
        return functools.reduce(lambda made, decorator: decorator(made), reversed(decorators), function)

    return apply


guest_options = options(
    click.option("--guest", type=click.Choice(GUEST_KINDS), default="auto", show_default=True, help="Kind of machine."),
    size_option("--ram", default="256M", show_default=True, help="Guest RAM."),
    size_option("--working-set", default="0", show_default="an eighth of RAM", help="Memory that the guest writes."),
    click.option(
        "--steps-per-second",
        type=click.FloatRange(min=0),
        default=20000.0,
        show_default=True,
        help="Rate of the guest; 0 = flat out.",
    ),
    click.option(
        "--backing",
        type=click.Choice(BACKINGS),
        default="auto",
        show_default=True,
        help="Memory of the guests.",
    ),
)

pair_option = click.option(
    "--pair", default="colocache", show_default=True, help="Name of the pair; both sides must give the same."
)

streams_option = click.option(
    "--streams",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Connections that carry pages at once; both sides must give the same.",
)

timing_options = options(
    click.option(
        "--peer-timeout",
        type=float,
        default=2.0,
        show_default=True,
        help="Seconds without a byte from the peer after which it is lost.",
    ),
    click.option(
        "--run-on",
        type=float,
        default=1.0,
        show_default=True,
        help="Seconds that a machine which goes on alone runs before every page is checked again; 0 = until stopped.",
    ),
)

arbiter_option = click.option(
    "--arbiter",
    type=click.Choice(("solo", "never")),
    default="solo",
    show_default=True,
    help="Who decides whether this side may go on alone.",
)

report_options = options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of stdout."),
    click.option("--events", is_flag=True, help="One JSON object per event on stdout."),
    click.option("--die-with-parent", type=int, default=0, hidden=True),
)


def foreseen(function: F) -> F:
    """Errors of this package end the command with their sentence and status 1."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ColocacheError as error:
            raise click.ClickException(str(error)) from error

    return wrapped  # type: ignore[return-value]


def print_json(report: dict[str, Any]) -> None:
    """The object of --json, on one line."""
    click.echo(json.dumps(report))


def sentence_first(value: object) -> str:
    """For a message that starts a line."""
    text = str(value)
    return text[:1].upper() + text[1:]
