# SPDX-License-Identifier: Apache-2.0
"""Python and the C header say the same: codes, enums, functions, structs; and nothing else is exported."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import colocache
from colocache import _native, _native_build, errors, results
from colocache._native import ffi, lib

HEADER = colocache.include_dir() / "colocache.h"
DECLARED = _native_build.declarations(HEADER)
FUNCTIONS = sorted(set(re.findall(r"^\w[\w ]*?\**(colocache_\w+)\(", DECLARED, re.MULTILINE)))


def enum_of(name: str) -> dict[str, int]:
    """Names and numbers of a C enum, as the compiler saw them."""
    return dict(ffi.typeof(f"enum {name}").relements)


def test_the_header_declares_what_this_test_reads() -> None:
    code = re.sub(r"/\*.*?\*/", "", DECLARED, flags=re.DOTALL)
    assert len(FUNCTIONS) == code.count(");") - 3  # three of them are callbacks in structs
    assert {"colocache_create", "colocache_seal", "colocache_sender_send", "colocache_message_parse"} <= set(FUNCTIONS)


def test_every_error_code_has_one_class_and_every_class_a_code() -> None:
    assert sorted(errors.BY_CODE) == sorted(enum_of("colocache_error").values())
    for name, code in enum_of("colocache_error").items():
        words = name.removeprefix("COLOCACHE_E_").title().replace("_", "")
        cls = errors.BY_CODE[code]
        assert cls.__name__ == {"Timeout": "TimedOut"}.get(words, words) + "Error"
        assert issubclass(cls, colocache.ColocacheError)
        assert getattr(colocache, cls.__name__) is cls
        assert cls.__doc__


@pytest.mark.parametrize(("name", "enum"), [("colocache_phase", results.Phase), ("colocache_action", results.Action)])
def test_enums_are_the_headers(name: str, enum: type[results.Phase] | type[results.Action]) -> None:
    def short(c_name: str) -> str:
        return re.sub(r"^COLOCACHE_(PHASE|RECOVERED)_", "", c_name)

    assert {member.name: member.value for member in enum} == {
        short(c_name): number for c_name, number in enum_of(name).items()
    }


def test_ways_to_copy_are_the_headers() -> None:
    numbers = enum_of("colocache_copy")
    assert {f"COLOCACHE_COPY_{name.upper()}": number for name, number in results.COPY_NAMES.items()} == numbers


@pytest.mark.parametrize(
    ("cls", "struct", "left_out"),
    [
        (results.SealResult, "colocache_seal_result", set()),
        (results.FlushResult, "colocache_flush_result", set()),
        (results.Stats, "colocache_stats", set()),
        (results.SendResult, "colocache_send_result", set()),
        (results.Status, "colocache_status", {"copy_variant"}),
        (results.BlockInfo, "colocache_block_info", {"guest_addr", "cache_addr"}),
        (results.Recovery, "colocache_recovery", set()),
    ],
)
def test_results_carry_every_field_of_their_struct(cls: type, struct: str, left_out: set[str]) -> None:
    fields = {name for name, _ in ffi.typeof(f"struct {struct}").fields} - {"struct_size", "reserved"} - left_out
    assert fields <= set(cls.__dataclass_fields__)  # type: ignore[attr-defined]


def test_errors_carry_code_sentence_and_hint() -> None:
    error = errors.error_for(-20002, "it is owned by process 7")
    assert isinstance(error, colocache.BusyError)
    assert (error.code, error.sentence) == (-20002, "it is owned by process 7")
    assert error.hint
    assert error.hint in str(error)
    system = errors.error_for(-errno.EACCES, "opening it")
    assert isinstance(system, colocache.SystemCallError)
    assert isinstance(system, OSError)
    assert (system.errno, system.code, str(system)) == (errno.EACCES, -errno.EACCES, "opening it")
    assert errors.error_for(-30000, "a newer library").code == -30000


def test_every_code_has_a_sentence_in_the_library() -> None:
    sentences = {}
    for code in [*errors.BY_CODE, 0, -errno.ENOENT, -errno.ENOMEM]:
        sentences[code] = ffi.string(lib.colocache_strerror(code)).decode()
        assert sentences[code]
    assert len(set(sentences.values())) == len(sentences)
    assert ffi.string(lib.colocache_strerror(-29999))
    assert ffi.string(lib.colocache_strerror(12345))


def test_functions_are_all_exported_and_nothing_else_is() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    library = colocache.lib_dir() / "libcolocache.so.0"
    run = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].split("@")[0] for line in run.stdout.splitlines() if line.split()[-2] != "A"}
    faults = {symbol for symbol in symbols if symbol.startswith("colocache_fault_")}  # of a test build
    assert symbols - faults == set(FUNCTIONS)


def test_every_function_can_be_called_from_python() -> None:
    assert [name for name in FUNCTIONS if not callable(getattr(lib, name))] == []


def test_the_module_runs_the_library_of_its_own_package() -> None:
    library = (colocache.lib_dir() / "libcolocache.so.0").resolve()
    maps = Path("/proc/self/maps").read_text()
    loaded = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libcolocache" in line}
    assert loaded == {str(library)}


def test_a_null_handle_is_an_error_and_no_crash() -> None:
    for call in (lib.colocache_validate, lib.colocache_loaded):
        assert call(ffi.NULL, 0) < 0
    assert lib.colocache_get_status(ffi.NULL, ffi.NULL) < 0
    assert lib.colocache_flush(ffi.NULL, ffi.NULL) < 0
    assert lib.colocache_seal(ffi.NULL, ffi.NULL, ffi.NULL) < 0
    assert lib.colocache_sender_mark_all(ffi.NULL) < 0
    with pytest.raises(colocache.ArgumentError, match="NULL"):
        _native.check(lib.colocache_validate(ffi.NULL, 0))


def test_a_struct_of_no_size_is_refused(memory: colocache.Memory) -> None:
    out = ffi.new("struct colocache **")
    options = ffi.new("struct colocache_options *")
    with pytest.raises(colocache.ArgumentError, match="struct_size"):
        _native.check(lib.colocache_create(memory.control_fd, options, out))


def test_declarations_need_their_marks(tmp_path: Path) -> None:
    for text in ("", "/* cffi: end */ int f(void); /* cffi: begin */", "/* cffi: begin */ int f(void);"):
        header = tmp_path / "colocache.h"
        header.write_text(text)
        with pytest.raises(ValueError, match="cffi: begin"):
            _native_build.declarations(header)
