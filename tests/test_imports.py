# SPDX-License-Identifier: Apache-2.0
"""Imports go down, never in a circle: every import statement of the package is read, those inside functions and those
for the type checker included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import colocache

ROOT = Path(colocache.__file__).resolve().parent


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the builders of compiled modules run apart from it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that one file names in an import statement, wherever it stands."""
    stub = path.with_suffix(".pyi")  # of colocache/__init__.py, whose names are loaded when they are used
    source = "\n".join(one.read_text(encoding="utf-8") for one in (path, stub) if one.exists())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relative to itself: the package writes whole names"
            for alias in node.names:
                # `from colocache import backing` takes the module backing, not a name of colocache/__init__.py.
                below = f"{node.module}.{alias.name}"
                if below in known:
                    yield below
                elif node.module in known:
                    yield str(node.module)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each circle that a walk along the arrows closes, as the modules on it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
            return
        if name in done:
            return
        for other in sorted(graph[name]):
            walk(other, [*trail, name])
        done.add(name)

    for name in graph:
        walk(name, [])
    return found


def test_no_import_goes_round_in_a_circle() -> None:
    known = modules()
    graph = {name: set(imports_of(name, path, known)) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > len(known), "the walk found hardly any import"
    assert not [" -> ".join(circle) for circle in circles(graph)]


def test_the_walk_finds_a_circle_where_there_is_one() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c", "a"]]


def test_the_names_that_are_loaded_when_used_are_those_that_the_type_checker_sees() -> None:
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    typed = {(alias.name, str(node.module)) for node in imports for alias in node.names}
    loaded = {(name, colocache._MODULE_OF[name]) for name in colocache.__all__}
    assert typed == loaded
    for name, module in loaded:
        assert getattr(colocache, name) is getattr(sys.modules[module], name)


def test_a_command_hears_ctrl_c_before_numpy_is_loaded() -> None:
    code = "import sys, colocache.cli; print('numpy' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "False\n"


def test_the_lists_of_choices_cost_no_library() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import choices; print('numpy' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "False\n"
