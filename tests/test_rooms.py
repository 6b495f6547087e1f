# SPDX-License-Identifier: Apache-2.0
"""The rooms of the C engine: each file includes what csrc/README.md says it may use, and uses nothing else."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# What stands below every room and may be used by all of them.
GROUND = {"colocache.h", "layout.h", "internal.h", "atomics.h", "clock.h", "error.h", "fault.h", "version.h"}

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="these tests are not in a source tree")


@cache
def text_of(name: str) -> str:
    return (CSRC / name).read_text()


@cache
def code_of(name: str) -> str:
    """Without comments and strings."""
    text = re.sub(r"/\*.*?\*/", " ", text_of(name), flags=re.DOTALL)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


def included(name: str) -> set[str]:
    return set(re.findall(r'^#include "([\w.]+)"', text_of(name), flags=re.MULTILINE))


def sources() -> list[str]:
    return sorted(path.name for path in CSRC.glob("*.c"))


def headers() -> list[str]:
    return sorted(path.name for path in CSRC.glob("*.h"))


def own_header(source: str) -> str:
    """bitmap.h also for bitmap_sweep.c, sender.h also for sender_send.c: rooms of two files."""
    name = source.removesuffix(".c")
    while not (CSRC / f"{name}.h").is_file() and "_" in name:
        name = name.rpartition("_")[0]
    return f"{name}.h"


def table() -> dict[str, set[str]]:
    """The table of csrc/README.md: file -> what it may use."""
    _, _, section = text_of("README.md").partition("\n## The rooms\n")
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", section, flags=re.MULTILINE)
    found = {}
    for files, may_use in rows:
        for file in re.findall(r"`([\w./]+)`", files):
            found[file] = {f"{name}.h" for name in re.findall(r"\w+", may_use)} - {"nothing.h"}
    return found


def test_every_file_is_in_the_table() -> None:
    assert {Path(name).name for name in table()} == {*sources(), *headers(), "colocache.h"}


@pytest.mark.parametrize("source", sources())
def test_a_file_includes_what_the_table_says_it_may_use(source: str) -> None:
    assert included(source) - GROUND - {own_header(source)} == table()[source]


@cache
def declared_in() -> dict[str, str]:
    """cc_function -> the header that declares it."""
    found: dict[str, str] = {}
    for header in headers():
        for name in re.findall(r"^[\w *]*?\b(cc_\w+)\(", code_of(header), flags=re.MULTILINE):
            assert found.setdefault(name, header) == header, f"{name} is declared twice"
    return found


@pytest.mark.parametrize("source", sources())
def test_nothing_is_used_that_is_not_included(source: str) -> None:
    """internal.h brings the structs of many rooms; their functions must be asked for by name."""
    used = {name: declared_in()[name] for name in re.findall(r"\bcc_\w+", code_of(source)) if name in declared_in()}
    direct = included(source) | GROUND
    assert {name: header for name, header in used.items() if header not in direct} == {}


@pytest.mark.parametrize("source", sources())
def test_nothing_is_included_that_is_not_used(source: str) -> None:
    words = set(re.findall(r"\w+", code_of(source)))
    for header in included(source) - GROUND - {own_header(source)}:
        names = set(re.findall(r"\b(?:cc|CC)_\w+|(?<=struct )\w+(?= \{)", code_of(header)))
        names.add(header.removesuffix(".h"))  # a pointer of the handle with the room's name: cc->strategy
        assert words & names, f"{source} includes {header} for nothing"


def test_rooms_are_in_no_circle() -> None:
    uses = {own_header(source): set[str]() for source in sources()}
    for source in sources():
        uses[own_header(source)] |= included(source) - GROUND - {own_header(source)}
    order: list[str] = []

    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, " -> ".join([*above, room])
        if room not in order:
            for below in sorted(uses.get(room, ())):
                visit(below, (*above, room))
            order.append(room)

    for room in sorted(uses):
        visit(room, ())
    assert order.index("checkpoint.h") > order.index("commit.h") > order.index("checksum.h")


def test_the_public_header_is_100_columns_wide() -> None:
    header = (CSRC / "include" / "colocache.h").read_text().splitlines()
    assert [line for line in header if len(line) > 100] == []


@pytest.mark.parametrize("name", [*sources(), *headers()])
def test_no_file_is_longer_than_one_subject_needs(name: str) -> None:
    assert len(text_of(name).splitlines()) <= 400
