# SPDX-License-Identifier: Apache-2.0
"""Where the `colocache` command begins: Ctrl-C must end it without a traceback before much has been loaded."""

import signal


def main() -> None:
    """The command, with a Ctrl-C that Python turns into no exception until there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from colocache import cli

    cli.main()
