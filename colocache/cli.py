# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command lives in a module of its own under colocache.commands and is imported when it is
called, so that `colocache --help` is quick and no command pays for the dependencies of another."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys

import click

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
    # Until a command is loaded there is nothing to clean up, and Ctrl-C in the middle of an import no traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = cli.main(prog_name="colocache", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
