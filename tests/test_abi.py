# SPDX-License-Identifier: Apache-2.0
"""What a program linked to libcolocache.so.0 relies on: header, version map, exported symbols and cffi agree, and stay.

abi_0.json is what the first version promised: programs built against it must find every function with the same
signature, every number with the same value and every field at the same place. What is new is written there by

    python tests/test_abi.py --write

What changes or goes away needs another SONAME.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from c_tools import run, tool

from colocache import config_tool

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "abi_0.json"
# In a test build with crash points, and in no other.
FAULTS = {"colocache_fault_crash_at", "colocache_fault_passed"}


def header_text() -> str:
    return (config_tool.include_dir() / "colocache.h").read_text(encoding="utf-8")


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def header_functions() -> set[str]:
    """Functions that the header declares."""
    plain = without_comments(header_text())
    return set(re.findall(r"^[a-z][\w\s*]*?\b(colocache_\w+)\(", plain, flags=re.MULTILINE))


def exported() -> dict[str, str]:
    """Defined dynamic symbols of the installed library: name and version."""
    found = {}
    for line in run([tool("nm"), "-D", "--defined-only", config_tool.lib_dir() / "libcolocache.so.0"]).splitlines():
        _, kind, symbol = line.split(maxsplit=2)
        name, _, version = symbol.partition("@@")
        if kind != "A":  # the name of the version itself
            found[name] = version
    return found


def described() -> dict[str, Any]:
    """The declarations as cffi reads them."""
    from colocache._engine import ffi, lib

    text = without_comments(header_text())
    structs = {}
    for name in re.findall(r"^struct (colocache_\w+) \{", text, flags=re.MULTILINE):
        fields = ffi.typeof(f"struct {name}").fields
        structs[name] = {
            "bytes": ffi.sizeof(f"struct {name}"),
            "fields": {field: [one.offset, one.type.cname] for field, one in fields},
        }
    numbers = {name: getattr(lib, name) for name in sorted(set(re.findall(r"\bCOLOCACHE_[A-Z0-9_]+\b", text)))
               if name != "COLOCACHE_H"}  # fmt: skip
    functions = {}
    for name in sorted(header_functions()):
        kind = ffi.typeof(ffi.addressof(lib, name))
        functions[name] = f"{kind.result.cname} ({', '.join(arg.cname for arg in kind.args)})"
    return {"functions": functions, "numbers": numbers, "structs": structs}


def test_the_library_exports_exactly_what_the_header_declares() -> None:
    names = set(exported())
    assert names - FAULTS == header_functions()
    assert names & FAULTS in (set(), FAULTS)


def test_every_symbol_has_the_version_of_the_map(source_tree: Path) -> None:
    """A program records the version it was linked with; one without could be met by any library of this name."""
    text = (source_tree / "csrc" / "libcolocache.map").read_text()
    version = re.match(r"(\w+) \{", text)
    assert version is not None
    assert set(exported().values()) == {version[1]}
    assert re.search(r"local:\s*\*;", text)


def test_the_installed_header_is_the_one_in_the_tree(source_tree: Path) -> None:
    assert header_text() == (source_tree / "csrc" / "include" / "colocache.h").read_text()


def test_cffi_sees_every_declaration() -> None:
    """Functions, structs and numbers of the header are all in the part that cffi reads."""
    from colocache._engine import ffi, lib

    found = described()
    assert set(found["functions"]) == {name for name in dir(lib) if name.startswith("colocache_")} - {
        "colocache_py_check",
        "colocache_py_log",
    }
    assert {"colocache_options", "colocache_status", "colocache_seal_args"} <= set(found["structs"])
    assert all(name in found["structs"] or not ffi.sizeof(f"struct {name}") for name in found["structs"])


def test_nothing_promised_has_changed() -> None:
    promised, found = json.loads(GOLDEN.read_text()), json.loads(json.dumps(described()))
    for what in ("functions", "numbers"):
        changed = {name: found[what].get(name) for name, was in promised[what].items() if found[what].get(name) != was}
        assert changed == {}, f"{what} that programs rely on"
    for name, was in promised["structs"].items():
        now = found["structs"][name]
        moved = {field: now["fields"].get(field) for field, place in was["fields"].items()
                 if now["fields"].get(field) != place}  # fmt: skip
        assert moved == {}, f"fields of struct {name}"
        # Only a struct that tells its size may grow.
        assert now["bytes"] == was["bytes"] or ("struct_size" in now["fields"] and now["bytes"] > was["bytes"]), name


def test_what_is_new_was_written_down() -> None:
    """abi_0.json names every function, struct and number there is: the next version is compared with all of them."""
    promised, found = json.loads(GOLDEN.read_text()), json.loads(json.dumps(described()))
    assert found == promised, "run `python tests/test_abi.py --write` if this is an addition"


def test_growing_structs_begin_with_their_size() -> None:
    for name, struct in described()["structs"].items():
        if "struct_size" in struct["fields"]:
            assert struct["fields"]["struct_size"] == [0, "uint64_t"], name


def test_only_fixed_width_numbers(source_tree: Path) -> None:
    """No long, size_t, bool or bare unsigned: the same bytes for each compiler, and readable from any language."""
    body = without_comments(header_text())
    assert re.findall(r"\b(long|short|size_t|ssize_t|bool|_Bool|unsigned|off_t)\b", body) == []
    assert "static inline" not in body
    assert header_text().count("#include") == 1


@pytest.fixture(scope="module")
def c_tests() -> str:
    """All C and C++ of the tests in one text, without comments."""
    sources = [path for path in sorted((TESTS / "c").iterdir()) if path.suffix in (".c", ".cpp", ".h")]
    return without_comments("\n".join(path.read_text(encoding="utf-8") for path in sources))


def test_every_function_is_called_through_c(c_tests: str) -> None:
    missing = {name for name in header_functions() if not re.search(rf"\b{name}\s*\(", c_tests)}
    assert missing == set()


def test_every_error_is_provoked_through_c(c_tests: str) -> None:
    codes = set(re.findall(r"\bCOLOCACHE_E_[A-Z_]+\b", without_comments(header_text())))
    assert {code for code in codes if code not in c_tests} == set()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(json.dumps(described(), indent=1) + "\n")
    else:
        sys.exit(__doc__)
