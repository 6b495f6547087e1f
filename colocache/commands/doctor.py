# SPDX-License-Identifier: Apache-2.0
"""`colocache doctor`: what this machine offers, and the command that enables each missing thing."""

from __future__ import annotations

import dataclasses

import click

from colocache.commands.options import foreseen, json_option, pair_option, print_json, tls_file_options
from colocache.replication.tls import HOW_TO


@click.command(epilog=HOW_TO)
@json_option
@pair_option
@tls_file_options
@foreseen
def doctor(as_json: bool, pair: str, **files: str) -> None:
    """Tell what this machine offers, and how to enable the rest. Nothing is changed.

    With --tls-cert, --tls-key and --tls-ca: also whether they can be used for one side of --pair.

    Exit status 0: a pair can run here, though perhaps not in the fastest way.
    """
    from rich.console import Console
    from rich.table import Table

    from colocache import doctor as examination
    from colocache.replication.certificates import examine_certificates

    findings = [*examination.examine(), *examine_certificates(pair, **files)]
    usable = examination.usable(findings)
    guest = examination.default_guest()
    table = Table(show_edge=False, box=None, pad_edge=False)
    for column in ("", "what", "found", "needed for"):
        table.add_column(column)
    for finding in findings:
        table.add_row(
            "[green]yes[/]" if finding.ok else "[yellow]no[/]", finding.name, finding.found, finding.needed_for
        )
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    fixes = [finding for finding in findings if not finding.ok and finding.fix]
    if fixes:
        console.print("\nTo enable the rest (as root):", highlight=False)
        for finding in fixes:
            console.print(f"  {finding.name}: {finding.fix}", highlight=False, markup=False, soft_wrap=True)
    verdict = f"`colocache demo` runs here, with a {guest} guest" if usable else "no pair can run here"
    console.print(f"\n{verdict}", highlight=False, markup=False)
    if as_json:
        print_json(
            {
                "usable": usable,
                "guest": guest,
                "versions": examination.versions(),
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
    if not usable or any(finding.name == "TLS" and not finding.ok for finding in findings):
        raise SystemExit(1)
