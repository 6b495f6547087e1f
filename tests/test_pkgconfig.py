# SPDX-License-Identifier: Apache-2.0
"""A program in C, C++ or Rust finds the installed library, whichever way its build system asks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from c_tools import WARNINGS, config, pkg_config, run, tool

import colocache
from colocache import config_tool

HELLO = """
#include <colocache.h>
#include <stdio.h>
int main(void)
{
    printf("%x %s\\n", (unsigned)colocache_version(), colocache_strerror(COLOCACHE_E_BUSY));
    return 0;
}
"""
SONAME = "libcolocache.so.0"


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    source = tmp_path / "hello.c"
    source.write_text(HELLO)
    return source


def version_number() -> int:
    major, minor, patch = (int(part) for part in config_tool.version().split("."))
    return major << 16 | minor << 8 | patch


def expected() -> str:
    return f"{version_number():x} another live process owns this control region\n"


def needed_libraries(program: Path) -> str:
    return run([tool("readelf"), "-d", program])


def test_every_version_is_the_same() -> None:
    """Package, C library, pkg-config and colocache-config speak of one version."""
    assert config("--version") == [config_tool.version()] == pkg_config("--modversion")
    from colocache._engine import lib

    assert lib.colocache_version() == version_number()
    assert colocache.__version__.startswith(config_tool.version())


def test_pkg_config_links_the_shared_library(hello: Path, tmp_path: Path) -> None:
    made = tmp_path / "hello"
    run([tool("cc"), "-std=c11", *WARNINGS, hello, *pkg_config("--cflags", "--libs"), "-o", made])
    assert f"[{SONAME}]" in needed_libraries(made)
    assert run([made]) == expected()


def test_colocache_config_links_the_shared_library(hello: Path, tmp_path: Path) -> None:
    made = tmp_path / "hello"
    run([tool("cc"), "-std=c11", *WARNINGS, hello, *config("--cflags", "--libs"), "-o", made])
    assert f"[{SONAME}]" in needed_libraries(made)
    assert run([made]) == expected()


def test_the_archive_needs_no_library_at_run_time(hello: Path, tmp_path: Path) -> None:
    made = tmp_path / "hello"
    run([tool("cc"), "-std=c11", *WARNINGS, hello, *config("--cflags", "--static-libs"), "-o", made])
    assert "libcolocache" not in needed_libraries(made)
    assert run([made]) == expected()
    archive = pkg_config("--variable=staticlib")
    assert [Path(path).resolve() for path in archive] == [config_tool.lib_dir() / "libcolocache.a"]


def test_the_package_may_be_copied_elsewhere(hello: Path, tmp_path: Path) -> None:
    """colocache.pc speaks of itself only: what was copied is what is used."""
    prefix = tmp_path / "elsewhere"
    shutil.copytree(config_tool.include_dir(), prefix / "include")
    shutil.copytree(config_tool.lib_dir(), prefix / "lib")
    made = tmp_path / "hello"
    flags = pkg_config("--cflags", "--libs", where=prefix / "lib" / "pkgconfig")
    assert not [flag for flag in flags if str(config_tool.PACKAGE) in flag]
    run([tool("cc"), hello, *flags, "-o", made])
    assert run([made]) == expected()
    (prefix / "lib" / SONAME).rename(prefix / "lib" / "gone")
    assert subprocess.run([made], capture_output=True, check=False).returncode != 0, "it ran with another library"


@pytest.fixture
def spaced_shell(tmp_path: Path) -> Callable[[str], str]:
    """Runs a shell's line where package, commands and program lie in paths that a shell would take apart."""
    package, programs, work = (tmp_path / name for name in ("it's $HOME/colo cache", "b i n", "my own program"))
    for made in (package, programs, work):
        made.mkdir(parents=True)
    shutil.copytree(config_tool.include_dir(), package / "include")
    shutil.copytree(config_tool.lib_dir(), package / "lib")
    shutil.copyfile(config_tool.__file__, package / "config_tool.py")
    command = programs / "colocache-config"
    python, tool_file = shlex.quote(sys.executable), shlex.quote(str(package / "config_tool.py"))
    command.write_text(f'#!/bin/sh\nexec {python} {tool_file} "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    for name in ("program.c", "vmm.c"):
        (work / name).write_text(HELLO)

    def shell(line: str) -> str:
        return run(["sh", "-c", line], cwd=work, env=environment)

    return shell


def test_the_readmes_command_works_in_any_path(source_tree: Path, spaced_shell: Callable[[str], str]) -> None:
    tool("cc")
    (command,) = re.findall(r"^.*colocache-config.*$", (source_tree / "README.md").read_text(), re.MULTILINE)
    assert spaced_shell(f"{command} && ./a.out") == expected()


def test_the_c_readmes_commands_work_in_any_path(source_tree: Path, spaced_shell: Callable[[str], str]) -> None:
    """Its `eval` lines one by one, after the `export` that stands before them."""
    tool("cc")
    tool("pkg-config", "pkgconf")
    lines = (source_tree / "csrc" / "README.md").read_text().splitlines()
    (export,) = (line for line in lines if line.startswith("export PKG_CONFIG_PATH"))
    commands = [line for line in lines if line.startswith("eval ")]
    assert len(commands) == 3
    for command in commands:
        assert spaced_shell(f"{export}\n{command}\n./vmm") == expected(), command


def test_cmake_finds_the_installed_package(spaced_shell: Callable[[str], str]) -> None:
    cmake = tool("cmake")
    lists = (
        "cmake_minimum_required(VERSION 3.13)\nproject(vmm C)\nfind_package(colocache CONFIG REQUIRED)\n"
        "add_executable(vmm vmm.c)\ntarget_link_libraries(vmm colocache::colocache)\n"
    )
    spaced_shell(f"cat >CMakeLists.txt <<'END'\n{lists}END\n")
    spaced_shell(f'{cmake} -S . -B build -Dcolocache_DIR="$(colocache-config --cmakedir)" && {cmake} --build build')
    assert spaced_shell("build/vmm") == expected()


def test_no_generated_sources_are_needed(hello: Path, source_tree: Path, tmp_path: Path) -> None:
    """`cc -Icsrc/include csrc/*.c` is a whole build, with each compiler there is."""
    sources = sorted(source_tree.glob("csrc/*.c"))
    for compiler in ("gcc", "clang"):
        if shutil.which(compiler) is None:
            continue
        library, made = tmp_path / f"lib{compiler}.so", tmp_path / compiler
        flags = ["-I", source_tree / "csrc" / "include", "-shared", "-fPIC", "-pthread"]
        run([compiler, *flags, *sources, "-o", library])
        run([compiler, hello, "-I", source_tree / "csrc" / "include", library, "-o", made])
        assert run([made]) == expected()


def test_the_program_in_the_readme(source_tree: Path, tmp_path: Path) -> None:
    """csrc/README.md: its secondary compiles without a warning and does what its text says."""
    found = re.search(r"```c\n(.*?)```", (source_tree / "csrc" / "README.md").read_text(), re.DOTALL)
    assert found is not None
    source, made = tmp_path / "vmm.c", tmp_path / "vmm"
    source.write_text(found[1])
    run([tool("cc"), *WARNINGS, source, *pkg_config("--cflags", "--libs"), "-o", made])
    assert run([made]) == "guest RAM: from the primary\ntook over from epoch 1\n"


def test_the_header_stands_alone(tmp_path: Path) -> None:
    """As the first and only include: C11 and C++17, without one warning."""
    header = config_tool.include_dir() / "colocache.h"
    for name, standard in (("gcc", "c11"), ("clang", "c11"), ("g++", "c++17"), ("clang++", "c++17")):
        if shutil.which(name) is None:
            continue
        source = tmp_path / ("only.cpp" if "++" in name else "only.c")
        source.write_text(f'#include "{header}"\n#include "{header}"\n')
        run([name, f"-std={standard}", *WARNINGS, "-Wshadow", "-Wconversion", "-fsyntax-only", source])


def test_a_caller_in_cpp(source_tree: Path, tmp_path: Path) -> None:
    made = tmp_path / "caller"
    source = source_tree / "tests" / "c" / "caller.cpp"
    run([tool("c++", "g++"), "-std=c++17", *WARNINGS, source, *pkg_config("--cflags", "--libs"), "-o", made])
    assert run([made]) == f"{version_number():x} right\n"


def test_a_caller_in_rust(source_tree: Path, tmp_path: Path) -> None:
    rustc = tool("rustc")
    made, lib = tmp_path / "caller", config_tool.lib_dir()
    source = source_tree / "tests" / "c" / "caller.rs"
    link = ["-L", lib, "-C", f"link-arg=-Wl,-rpath,{lib}"]
    run([rustc, "--edition", "2021", "-D", "warnings", *link, source, "-o", made])
    assert run([made]) == f"{version_number():x} right\n"


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).parent / "colocache-config"
    if not script.is_file():
        pytest.skip("the console scripts are not beside this interpreter")
    assert run([script, "--pkgconfigdir"]).strip() == str(config_tool.pkgconfig_dir())


def test_colocache_config_says_what_is_missing(tmp_path: Path) -> None:
    """Asked for nothing, or in a tree that was never built: one sentence and a status of its own."""
    ask = [sys.executable, "-m", "colocache.config_tool"]
    nothing = subprocess.run(ask, capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert "usage" in nothing.stderr
    copied = tmp_path / "config_tool.py"
    shutil.copyfile(config_tool.__file__, copied)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    bare = subprocess.run(
        [sys.executable, copied, "--cflags"], capture_output=True, text=True, check=False, env=environment
    )
    assert bare.returncode == 1
    assert "pip install" in bare.stderr
    assert bare.stdout == ""
