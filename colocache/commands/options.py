# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the frame that turns foreseen errors into one sentence."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from colocache.choices import (
    ACCELERATORS,
    BACKINGS,
    GUEST_KINDS,
    MEMORY_MODES,
    PAIR_BYTES_MAX,
    RESUME_AT,
    STREAMS_MAX,
    VERIFY,
)
from colocache.errors import ColocacheError

if TYPE_CHECKING:
    from colocache.replication.security import Security

F = TypeVar("F", bound=Callable[..., Any])

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE_MAX = 1 << 62  # bytes: sums of a few sizes still fit 64 bits
SECONDS_MAX = 86400.0  # a day
RATE_MAX = 1e11


def parse_size(text: str) -> int:
    """A number of bytes: `64M`, `2G`, `1048576`; a unit is a power of 1024, `MiB` and `MB` mean the same as `M`."""
    short = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = short[-1:] if short[-1:] in UNITS else ""
    digits = short.removesuffix(unit)
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19:
        raise click.BadParameter(f"{text!r} is not a size: write 64M, 2G or a number of bytes")
    n_bytes = int(digits) * UNITS[unit]
    if n_bytes > SIZE_MAX:
        raise click.BadParameter(f"{text!r} is more than any machine has: give at most {SIZE_MAX >> 40}T")
    return n_bytes


def bounded_size(most: int) -> Callable[[str], int]:
    """parse_size with a bound of its own."""

    def size(text: str) -> int:
        n_bytes = parse_size(text)
        if n_bytes > most:
            raise click.BadParameter(f"{text!r} is more than {most >> 20}M")
        return n_bytes

    return size


def pair_name(text: str) -> str:
    """A name that both sides can say to each other."""
    n_bytes = len(text.encode(errors="replace"))
    if not text.isprintable() or not 1 <= n_bytes <= PAIR_BYTES_MAX:
        raise click.BadParameter(f"{text!r} is not printable text of 1 to {PAIR_BYTES_MAX} bytes")
    return text


class Number(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number with a fraction, from `least` to `most`. click's own range lets `nan` pass: it is on no side of any."""

    def __init__(self, name: str, least: float, most: float) -> None:
        self.name, self.least, self.most = name, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; BadParameter with the bounds."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most:
            self.fail(f"{value!r} is not in the range {self.least:g} to {self.most:.12g}", param, ctx)
        return number


def size_option(*names: str, most: int = SIZE_MAX, **given: Any) -> Callable[[F], F]:
    """A click.option that takes a size of at most `most` bytes."""
    return click.option(*names, type=bounded_size(most), metavar="SIZE", **given)


def seconds_option(*names: str, default: float, least: float = 0.0, **given: Any) -> Callable[[F], F]:
    """A click.option that takes a time: seconds, up to a day."""
    kind = Number("SECONDS", least, SECONDS_MAX)
    return click.option(*names, type=kind, default=default, show_default=True, metavar="SECONDS", **given)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which --help shall show them."""

    def apply(function: F) -> F:
        return functools.reduce(lambda made, decorator: decorator(made), reversed(decorators), function)

    return apply


guest_kind_option = click.option(
    "--guest",
    type=click.Choice(GUEST_KINDS),
    default="auto",
    show_default=True,
    help="Kind of virtual machine; auto takes the first that runs here.",
)
steps_option = click.option(
    "--steps-per-second",
    type=Number("RATE", 0, RATE_MAX),
    default=20000.0,
    show_default=True,
    metavar="RATE",
    help="How many times a second the guest writes; 0 = as often as it can.",
)
backing_option = click.option(
    "--backing",
    type=click.Choice(BACKINGS),
    default="auto",
    show_default=True,
    help="What guest memory is made of; auto takes the fastest that has room.",
)
memory_option = click.option(
    "--memory",
    "memory_mode",
    type=click.Choice(MEMORY_MODES),
    default=None,
    show_default="mirror; with --guest qemu bounded",
    help="Memory of the secondary. mirror: two images of guest RAM; bounded: one, and what the primary has sent and "
    "the secondary has written since the last checkpoint.",
)
memory_limit_option = size_option(
    "--memory-limit",
    default="0",
    show_default="none",
    help="With --memory bounded: the most memory that the secondary takes beside its one image of guest RAM. Near it a "
    "checkpoint is asked for, and its machine stands before it is passed.",
)
memory_spill_option = click.option(
    "--memory-spill",
    default="",
    metavar="DIR",
    help="With --memory-limit: a folder on a disk, for pages of a checkpoint that the limit leaves no memory for even "
    "when the secondary has given up its own. Without it such a checkpoint ends the pair.",
)
guest_options = options(
    guest_kind_option,
    size_option("--ram", default="256M", show_default=True, help="Size of guest RAM."),
    size_option(
        "--working-set",
        default="0",
        show_default="an eighth of guest RAM",
        help="How much of guest RAM the guest writes.",
    ),
    steps_option,
    backing_option,
    click.option(
        "--accel",
        type=click.Choice(ACCELERATORS),
        default="auto",
        show_default=True,
        help="With --guest qemu and no QEMU ARGS: what runs its small guest; auto takes kvm where it works.",
    ),
    click.option(
        "--console",
        default="",
        metavar="FILE|unix:PATH|-",
        show_default="nowhere",
        help="Where the guest's console is seen, on the side that the world sees: its first serial port, or the device "
        "of QEMU ARGS that says chardev=colocache.console, as virtconsole can. FILE: what it says is added. "
        "unix:PATH: a Unix socket for one client at a time (`socat -,rawer unix:PATH`, `nc -U PATH`), who sees what is "
        "new and types to a QEMU guest. '-': standard output, and standard input if that is a terminal or a pipe. What "
        "the guest says is held until its epoch is sealed, which makes it late by up to an --interval; what is typed "
        "goes to the guest at once, and to the secondary for a takeover. On one host give both sides the same FILE, "
        "which nothing else writes, or the same PATH. In a FILE each line is there once; otherwise the second side may "
        "say one epoch's lines again.",
    ),
    click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- QEMU ARGS...]"),
)


def interval_option(default: float) -> Callable[[F], F]:
    """The trade of a pair, with what it was where it was measured."""
    return seconds_option(
        "--interval",
        default=default,
        help="Time between two checkpoints. What the guest sends is held until its epoch is sealed: a client that "
        "waits for each answer waited 540 ms with 0.5, 205 ms with 0.2 and 150 ms with 0.05, where the same guest "
        "alone answered in 2 (Linux on two busy cores). The shorter it is, the more of its time a guest stands.",
    )


net_options = options(
    click.option(
        "--net",
        default="",
        metavar="tap:NAME",
        show_default="none",
        help="With --guest qemu and QEMU ARGS: a virtio network card, connected to the TAP device NAME of this host. "
        "The world sees the packets of the primary when their epoch is sealed, so an answer takes up to an --interval "
        "longer, and after a takeover the secondary's: put both devices into one network, as ports of a bridge. It "
        "needs root, or a device that root has made for you.",
    ),
    click.option(
        "--mac", default="", show_default="by the pair's name", help="The card's address: alike on both sides."
    ),
)

disk_option = click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="FILE[,format=qcow2]",
    help="With --guest qemu and QEMU ARGS: a virtio disk; give it again for each further one. On the primary's host "
    "FILE is the guest's disk, raw or qcow2. On the secondary's it is a raw image of the same size, which becomes a "
    "copy of it: whatever it holds is overwritten (`truncate -s SIZE FILE` makes one).",
)
disk_log_options = options(
    click.option(
        "--disk-log",
        default="",
        metavar="DIR",
        show_default="beside the first image",
        help="Where writes to disks wait for their epoch, and what the secondary's own machine writes.",
    ),
    size_option(
        "--disk-log-limit",
        default="1G",
        show_default=True,
        help="The most that writes of one epoch may take, 32M or more for each disk. Near it a checkpoint is taken, "
        "and the guest's writes wait.",
    ),
)

pair_option = click.option(
    "--pair",
    type=pair_name,
    metavar="NAME",
    default="colocache",
    show_default=True,
    help="Name of the pair; both sides must give the same.",
)

streams_option = click.option(
    "--streams",
    type=click.IntRange(1, STREAMS_MAX),
    default=1,
    show_default=True,
    help="Number of connections that carry pages at the same time; it must be the same on both sides.",
)

timing_options = options(
    seconds_option(
        "--peer-timeout",
        default=2.0,
        least=0.01,
        help="How long the peer may be silent before it counts as lost.",
    ),
    seconds_option(
        "--run-on",
        default=1.0,
        help="How long a machine that goes on alone runs before every page is checked again; 0 = until it is stopped.",
    ),
)

arbiter_option = click.option(
    "--arbiter",
    metavar="NAME[:ARGS]",
    default="solo",
    show_default=True,
    help="Who decides whether this side may go on alone: solo always says yes, never always no.",
)

tls_file_options = options(
    click.option("--tls-cert", default="", metavar="FILE", help="Certificate of this side, in PEM: TCP is TLS then."),
    click.option("--tls-key", default="", metavar="FILE", help="Private key of --tls-cert, in PEM, no password."),
    click.option("--tls-ca", default="", metavar="FILE", help="Certificate of the authority that issued both sides'."),
)

security_options = options(
    tls_file_options,
    click.option(
        "--insecure",
        is_flag=True,
        help="Let guest memory travel over TCP as plain text, to and from whoever reaches the port.",
    ),
)


def security_of(given: dict[str, Any], event: Callable[..., None]) -> Security:
    """What the options say about TLS; plain TCP by the operator's word is said aloud."""
    from colocache.replication.security import Security

    names = ("tls_cert", "tls_key", "tls_ca", "insecure")
    security = Security(**{name: given[name] for name in names})
    if security.insecure:
        event(
            "insecure", "--insecure: over TCP guest memory travels as plain text, and whoever reaches the port may pair"
        )
    return security


verify_option = click.option(
    "--verify",
    type=click.Choice(VERIFY),
    default="all",
    show_default=True,
    help="The checkpoints after whose flush every page is compared with the primary's hash of it.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Write the report as one JSON object on the last line of stdout."
)

report_options = options(
    json_option,
    click.option("--events", is_flag=True, help="Write each event as one JSON object per line on stdout."),
    click.option("--die-with-parent", type=int, default=0, hidden=True),
    click.option("--own-cores", default="", hidden=True),
)


background_options = options(
    click.option(
        "--background/--no-background",
        default=True,
        show_default=True,
        help="Send pages between checkpoints too, while the guest runs, and in shrinking rounds just before each.",
    ),
    seconds_option(
        "--round-delay",
        default=0.0,
        help="Time between two looks at how much the guest has written; 0 = a quarter of --interval, at least 0.05.",
    ),
    click.option(
        "--round-pages",
        type=click.IntRange(0, 1 << 40),
        default=0,
        show_default=True,
        help="Written pages from which on such a look starts a round of sending. (A stock QEMU's are not known before: "
        "each look starts one.)",
    ),
)

resume_option = click.option(
    "--resume-at",
    type=click.Choice(RESUME_AT),
    default="received",
    show_default=True,
    help="When the primary's machine runs again. received: its epoch is sealed and can't be lost by one failure; "
    "loaded, to compare: the secondary runs from it too, so that its flush is part of the primary's pause.",
)

trace_option = click.option(
    "--trace",
    default="",
    metavar="FILE",
    help="Write the stages of each checkpoint to FILE, as trace events that chrome://tracing and ui.perfetto.dev open.",
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
