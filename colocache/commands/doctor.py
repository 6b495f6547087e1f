# SPDX-License-Identifier: Apache-2.0
"""`colocache doctor`: what this machine offers, and the command that enables each missing thing."""

from __future__ import annotations

import dataclasses

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@json_option
@foreseen
def doctor(as_json: bool) -> None:
    """Tell what this machine offers, and how to enable the rest. Nothing is changed.

    Exit status 0: a pair can run here, though perhaps not in the fastest way.
    """
    from rich.console import Console
    from rich.table import Table

    from colocache import doctor as examination

    findings = examination.examine()
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
    if not usable:
        raise SystemExit(1)
