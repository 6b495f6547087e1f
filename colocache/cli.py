# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command lives in a module of its own under colocache.commands and is imported when it is
called, so that `colocache --help` is quick and no command pays for the dependencies of another."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import signal
import sys

import click

from colocache.errors import ColocacheError, reason_of
from colocache.inherited import settle

# name: (module, attribute, one line of help)
COMMANDS = {
    "demo": ("colocache.commands.demo", "demo", "Run a pair, kill the primary, watch the takeover, check every page."),
    "primary": (
        "colocache.commands.primary",
        "primary",
        "Run a primary virtual machine, keep its secondary in step.",
    ),
    "secondary": (
        "colocache.commands.secondary",
        "secondary",
        "Follow a primary, take over when it dies.",
    ),
    "bench": ("colocache.commands.bench", "bench", "Measure what a flush costs on this machine."),
    "teach": ("colocache.commands.teach", "teach", "The two-bitmap design as a lesson, drawn from the real engine."),
    "record": ("colocache.commands.record", "record", "A run of the machines as a heat map of pages and epochs."),
    "inspect": ("colocache.commands.inspect", "inspect", "Show a control region without touching it."),
    "recover": ("colocache.commands.recover", "recover", "Attach to what a killed secondary left, and finish it."),
    "clean": ("colocache.commands.clean", "clean", "Remove what killed runs left and nobody owns."),
    "doctor": ("colocache.commands.doctor", "doctor", "Tell what this machine offers, and how to enable the rest."),
}


class LazyGroup(click.Group):
    """Lists the commands from the table above and imports one only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """All commands, in the order of the table."""
        return [name for name, (module, _, _) in COMMANDS.items() if _there(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command itself; None if there is none of this name."""
        if cmd_name not in COMMANDS or not _there(COMMANDS[cmd_name][0]):
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{attribute} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list for --help, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from colocache._native import version

        click.echo(f"colocache {version()}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """The COLO cache of a secondary virtual machine.

    Start with `colocache demo`; `colocache doctor` tells what this machine can do.
    """


def main() -> None:
    """Entry point of the `colocache` command: errors that were foreseen are one sentence, not a traceback."""
    settle()
    status: object = 1
    try:
        status = _run()
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if sentence:
            click.echo(f"Error: {sentence}", err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _run() -> object:
    """The exit status of the command."""
    try:
        return cli.main(prog_name="colocache", standalone_mode=False)
    except SystemExit as end:
        return end.code


# What a write to stdout fails with; other calls that can have a name with their error.
OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG, errno.EDQUOT)


def _sentence(error: OSError | MemoryError | RuntimeError) -> str | None:
    """What to say of an error that no command foresaw; "" if there is nobody to tell, None if it is a fault of ours."""
    if isinstance(error, RuntimeError):
        return "no further thread can be started: raise the limit (`ulimit -u`)" if "new thread" in str(error) else None
    if isinstance(error, MemoryError):
        return "memory is used up: use a smaller guest, or stop other programs"
    if error.errno in OUTPUT_ERRORS and error.filename is None and not isinstance(error, ColocacheError):
        # What could not be written would be tried once more at exit, and told in a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "" if error.errno == errno.EPIPE else f"the output can't be written: {reason_of(error)}"
    return str(error)


if __name__ == "__main__":
    main()
