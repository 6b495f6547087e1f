# SPDX-License-Identifier: Apache-2.0
"""Searches of the models in tests/model by the model checker spin, and what they find."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODELS = Path(__file__).parent / "model"
MEMORY_LIMIT_MB = 1500
SECONDS_LIMIT = 600  # a guard against a search that never ends, not a measure

needs_spin = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="the model checker is not installed: apt-get install spin"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="spin's search is a C program and gcc is not installed"),
]


@dataclass(frozen=True)
class Search:
    """What one run of spin's search found."""

    errors: int
    states: int
    depth: int
    seconds: float
    megabytes: float
    complete: bool
    broken: str | None  # the promise a counter-example breaks, or pan's own words for another error
    events: dict[str, int]  # how often each event of the model was taken

    def __str__(self) -> str:
        found = f"breaks {self.broken}, " if self.errors else ""
        return f"{found}{self.states} states, depth {self.depth}, {self.seconds:.1f} s, {self.megabytes:.0f} MB"


def search(model: Path, directory: Path, *defines: str, optimise: str) -> Search:
    """Build the search of `model` with `defines` in `directory`; run it to its end or to the first counter-example."""
    subprocess.run(["spin", *(f"-D{define}" for define in defines), "-a", str(model)], cwd=directory, check=True)
    # DNOREDUCE: no partial-order reduction, which finds nothing to leave out here; DMEMLIM: stop, and say so, above it.
    gcc = ["gcc", optimise, "-w", "-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEMORY_LIMIT_MB}", "-o", "pan", "pan.c"]
    subprocess.run(gcc, cwd=directory, check=True)
    run = subprocess.run(
        ["./pan", "-m10000"], cwd=directory, check=False, capture_output=True, text=True, timeout=SECONDS_LIMIT
    )
    out = run.stdout

    def number(pattern: str) -> float:
        match = re.search(pattern, out)
        assert match is not None, f"pan's output has no {pattern!r}:\n{out}{run.stderr}"
        return float(match[1])

    violation = re.search(r"pan:\d+: (?:assertion violated \((promise_\w+)|(.*) \(at depth)", out)
    return Search(
        errors=int(number(r"errors: (\d+)")),
        states=int(number(r"(\d+) states, stored")),
        depth=int(number(r"depth reached (\d+)")),
        seconds=number(r"elapsed time ([\d.e+-]+)"),
        megabytes=number(r"([\d.]+)\s+total actual memory usage"),
        complete="Search not completed" not in out and "max search depth too small" not in out,
        broken=None if violation is None else violation[1] or violation[2],
        events={name: int(n) for name, n in re.findall(r"^event (\w+) (\d+)$", out, re.MULTILINE)},
    )


def mutants_of(model: Path) -> set[str]:
    """The rules that it can be told to break."""
    return set(re.findall(r"^#ifn?def MUTANT_(\w+)$", model.read_text(encoding="utf-8"), re.MULTILINE))
