# SPDX-License-Identifier: Apache-2.0
"""What is installed is whole: C and Python users get the same library, and the README's promises run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import colocache
from colocache import _native

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

PROGRAM = r"""
#include <colocache.h>
#include <stdio.h>
#include <sys/mman.h>

int main(void)
{
    static unsigned char page[4096] = {42};
    struct colocache_options options = {.struct_size = sizeof options, .n_threads = 1};
    struct colocache_images images = {.struct_size = sizeof images, .name = "ram", .len_bytes = 10 * 4096,
                                      .page_size = 4096, .guest_fd = -1, .cache_fd = -1};
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = 1, .n_pages = COLOCACHE_ANY_COUNT};
    struct colocache *cc;
    void *state;
    int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    unsigned char *guest = mmap(0, images.len_bytes, protection, flags, -1, 0);
    images.guest_addr = guest;
    images.cache_addr = mmap(0, images.len_bytes, protection, flags, -1, 0);
    int rc = colocache_create(memfd_create("control", 0), &options, &cc);
    if (!rc) rc = colocache_add_block(cc, &images, 0);
    if (!rc) rc = colocache_receive_page(cc, 1, 0, 9, page, sizeof page);
    if (!rc) rc = colocache_device_state_begin(cc, 1, 0, &state);
    if (!rc) rc = colocache_seal(cc, &args, 0);
    if (!rc) rc = colocache_flush(cc, 0);
    if (!rc) rc = colocache_loaded(cc, 1);
    printf("%d %s %u %06x\n", rc, colocache_last_error(), guest[9 * 4096], colocache_version());
    return colocache_close(cc);
}
"""


def test_one_version_everywhere(source_tree: Path) -> None:
    version = importlib.metadata.version("colocache")
    assert colocache.__version__ == version
    assert _native.version() == version
    assert f'version = "{version}"' in (source_tree / "pyproject.toml").read_text()


def test_the_tests_run_against_what_is_installed(source_tree: Path) -> None:
    """In CI the package is not installed in editable mode, and the clone must not be imported in its place."""
    if os.environ.get("CI") != "true":
        pytest.skip("only CI installs without -e")
    assert Path(colocache.__file__).resolve().parent != source_tree / "colocache"


def test_the_package_is_typed_and_complete() -> None:
    root = Path(colocache.__file__).parent
    for name in (
        "py.typed",
        "include/colocache.h",
        "lib/libcolocache.so.0",
        "lib/libcolocache.so",
        "lib/libcolocache.a",
        "lib/pkgconfig/colocache.pc",
        "vmm/qemu/preload.so",
        "lib/cmake/colocache/colocacheConfig.cmake",
    ):
        assert (root / name).is_file(), name
    assert colocache.include_dir() == root / "include"
    assert colocache.lib_dir() == root / "lib"
    for name in colocache.__all__:
        assert hasattr(colocache, name)


def test_every_file_that_the_modules_read_is_installed(source_tree: Path) -> None:
    """Data beside the modules: a new kind of file must be named in pyproject.toml."""
    made = {source_tree / "colocache" / "lib", source_tree / "colocache" / "include"}
    for path in (source_tree / "colocache").rglob("*"):
        built = path.suffix in (".py", ".pyc", ".c", ".h", ".so", ".o") or made & set(path.parents)
        if path.suffix == ".md":
            continue  # pages for people
        if path.is_file() and not built:
            assert (Path(colocache.__file__).parent / path.relative_to(source_tree / "colocache")).is_file(), path


def test_the_installed_header_is_the_sources(source_tree: Path) -> None:
    installed = (colocache.include_dir() / "colocache.h").read_text()
    assert installed == (source_tree / "csrc" / "include" / "colocache.h").read_text()


@needs_cc
@pytest.mark.parametrize("kind", ["shared", "static"])
def test_a_c_program_links_to_the_same_library(tmp_path: Path, kind: str) -> None:
    library = colocache.lib_dir()
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    link = {
        "shared": ["-L", str(library), "-lcolocache", f"-Wl,-rpath,{library}"],
        "static": [str(library / "libcolocache.a")],
    }
    flags = [
        "-std=gnu11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-I",
        str(colocache.include_dir()),
    ]
    subprocess.run(["cc", *flags, str(source), "-o", str(program), *link[kind]], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    major, minor, patch = (int(part) for part in colocache.__version__.split("."))
    assert run.stdout == f"0  42 {major << 16 | minor << 8 | patch:06x}\n"


@needs_cc
@pytest.mark.parametrize(("language", "standard"), [("c", "c99"), ("c", "c11"), ("c++", "c++11")])
def test_the_header_is_plain(tmp_path: Path, language: str, standard: str) -> None:
    if language == "c++" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "plain"
    source.write_text("#include <colocache.h>\n#include <colocache.h>\nint main(void) { return 0; }\n")
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(colocache.include_dir())]
    compiler = "cc" if language == "c" else "c++"
    subprocess.run([compiler, "-x", language, *flags, str(source)], check=True)


NO_HEADERS = """
import runpy, sys, sysconfig
real, temp = sysconfig.get_paths, sys.argv[1]
sysconfig.get_paths = lambda *a, **k: {**real(*a, **k), "include": temp, "platinclude": temp}
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", temp, "--build-temp", temp]
runpy.run_path("setup.py", run_name="__main__")
"""


def build(source_tree: Path, code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools")
    command = [sys.executable, "-W", "ignore", "-c", code, *args]
    return subprocess.run(
        command, cwd=source_tree, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False
    )


def test_without_python_h_the_build_says_exactly_that(source_tree: Path, tmp_path: Path) -> None:
    run = build(source_tree, NO_HEADERS, str(tmp_path))
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"error: Python\.h of Python 3\.\d+ is missing \(looked in {tmp_path}\): .*python3-dev.*", last
    )
    assert "Traceback" not in run.stderr


def test_without_a_compiler_the_build_says_exactly_that(source_tree: Path, tmp_path: Path) -> None:
    code = NO_HEADERS.replace("sysconfig.get_paths =", "_ =")
    run = build(source_tree, code, str(tmp_path), CC="no-such-compiler")
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith("error: no C compiler (no-such-compiler): install one")


def test_every_file_names_its_licence(source_tree: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=source_tree, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git clone")
    without = []
    for name in listed.stdout.splitlines():
        path = source_tree / name
        if path.suffix in (".py", ".c", ".h", ".toml", ".sh", ".pml", ".js", ".css") and path.is_file():
            head = path.read_text().splitlines()[:2]  # a #! line may come before it
            if not any("SPDX-License-Identifier: Apache-2.0" in line for line in head):
                without.append(name)
    assert without == []


def readme_blocks(source_tree: Path, language: str) -> list[str]:
    text = (source_tree / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_example_runs(source_tree: Path, tmp_path: Path) -> None:
    (example,) = readme_blocks(source_tree, "python")
    assert len(example.splitlines()) <= 14
    command = [sys.executable, "-c", example]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    printed = re.findall(r"# -> (.*)", example)
    assert run.stdout.splitlines() == printed


def test_the_readmes_commands_are_what_ci_runs(source_tree: Path) -> None:
    commands = [line for block in readme_blocks(source_tree, "sh") for line in block.splitlines()]
    ci = (source_tree / ".ci" / "run").read_text()
    assert len(commands) == 2
    for command in commands:
        install, pytest, more = command.partition(" && .venv/bin/pytest")
        assert install in ci
        for part in ("programs", '"not programs"') if pytest else ():  # all tests, in two parts beside each other
            assert f".venv/bin/pytest -m {part}{more}" in ci
