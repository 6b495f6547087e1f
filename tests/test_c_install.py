# SPDX-License-Identifier: Apache-2.0
"""`make -C csrc install`, as somebody without Python does it: the C examples build and run against what it installs.

Everything lies in paths with spaces. Compilers and CMake that are missing are skipped, with that reason.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from c_tools import GUEST_FLAGS, pkg_config, run, tool

SONAME = "libcolocache.so.0"
INSTALLED = {
    "include/colocache.h",
    f"lib/{SONAME}",
    "lib/libcolocache.so",
    "lib/libcolocache.a",
    "lib/pkgconfig/colocache.pc",
    "lib/cmake/colocache/colocacheConfig.cmake",
    "lib/cmake/colocache/colocacheConfigVersion.cmake",
}
EXAMPLES = ("smallest", "vmm_secondary", "vmm_ring", "vmm_pair")
SMALLEST_SAYS = "guest RAM: from the primary\ntook over from epoch 1\n"
STRICT = ["-O2", "-Wall", "-Wextra", "-Werror"]

CMAKE = """
cmake_minimum_required(VERSION 3.13)
project(examples C CXX)
set(CMAKE_C_STANDARD 11)
set(CMAKE_CXX_STANDARD 20)
find_package(colocache 0.1 CONFIG REQUIRED)
add_executable(smallest smallest.c)
target_link_libraries(smallest colocache::colocache)
add_executable(smallest_static smallest.c)
target_link_libraries(smallest_static colocache::static)
add_executable(caller "${TESTS}/caller.cpp")
target_link_libraries(caller colocache::colocache)
find_package(Threads REQUIRED)
foreach(example vmm_secondary vmm_ring vmm_pair)
  add_executable(${example} "${TESTS}/${example}.c" "${TESTS}/vmm_guest.c" "${GUEST}/guest_program.c")
  target_include_directories(${example} PRIVATE "${TESTS}" "${GUEST}")
  target_compile_options(${example} PRIVATE -fno-stack-protector -fno-jump-tables)
  target_link_libraries(${example} colocache::colocache Threads::Threads)
endforeach()
"""


def kernel_headers(compiler: str) -> list[str]:
    """Where musl has no headers of the kernel the system's serve, after its own."""
    if "musl" not in compiler:
        return []
    multiarch = run([tool("gcc"), "-print-multiarch"]).strip()
    return ["-idirafter", "/usr/include", "-idirafter", f"/usr/include/{multiarch}"]


def smallest(root: Path, to: Path, suffix: str = ".c") -> Path:
    """The secondary of csrc/README.md as a file."""
    found = re.search(r"```c\n(.*?)```", (root / "csrc" / "README.md").read_text(), re.DOTALL)
    assert found is not None
    source = to / f"smallest{suffix}"
    source.write_text(found[1])
    return source


def make(tree: Path, *arguments: str) -> str:
    return run([tool("make"), "-C", tree, "-j2", *arguments])


def install(root: Path, to: Path, *, compiler: str = "gcc") -> Path:
    """A copy of csrc, built and installed; the prefix, in a path with spaces."""
    tree, prefix = to / "the sources" / "csrc", to / "the prefix"
    shutil.copytree(root / "csrc", tree, ignore=shutil.ignore_patterns("build"))
    headers = shlex.join(kernel_headers(compiler))
    make(tree, "install", f"PREFIX={prefix}", f"CC={tool(compiler)}", f"CPPFLAGS={headers}", "CFLAGS=-O2 -Werror")
    return prefix


@pytest.fixture(scope="module")
def root() -> Path:
    tree = Path(__file__).resolve().parent.parent
    if not (tree / "csrc" / "Makefile").is_file():
        pytest.skip("these tests are not in a source tree")
    return tree


@pytest.fixture(scope="module")
def prefix(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(root, tmp_path_factory.mktemp("made with gcc"))


@pytest.fixture(scope="module")
def musl_prefix(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(root, tmp_path_factory.mktemp("made with musl"), compiler="musl-gcc")


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    made = tmp_path / "my own program"
    made.mkdir()
    return made


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def program(root: Path, prefix: Path, example: str, to: Path, compiler: str) -> Path:
    """One of EXAMPLES, linked as its pkg-config file says, by a compiler's own command line."""
    c, guest, made = root / "tests" / "c", root / "colocache" / "vmm", to / example
    sources = [smallest(root, to)]
    if example != "smallest":
        sources = [c / f"{example}.c", c / "vmm_guest.c", guest / "guest_program.c"]
    flags = [*STRICT, "-std=gnu11", *GUEST_FLAGS, *kernel_headers(compiler), "-I", guest, "-I", c]
    link = [*pkg_config("--cflags", "--libs", where=prefix / "lib" / "pkgconfig"), f"-Wl,-rpath,{prefix / 'lib'}"]
    run([tool(compiler), *flags, *sources, *link, "-pthread", "-o", made])
    return made


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_build_with(compiler: str, example: str, root: Path, prefix: Path, spaced: Path) -> None:
    tool(compiler)
    made = program(root, prefix, example, spaced, compiler)
    if example == "smallest":
        assert run([made]) == SMALLEST_SAYS


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_build_with_musl(example: str, root: Path, musl_prefix: Path, spaced: Path) -> None:
    made = program(root, musl_prefix, example, spaced, "musl-gcc")
    assert "musl" in run([tool("readelf"), "-p", ".interp", made])
    if example == "smallest":
        assert run([made]) == SMALLEST_SAYS


def test_the_kernels_errors_have_names_with_musl(musl_prefix: Path, spaced: Path) -> None:
    """strerror_r of POSIX and of GNU return different things."""
    source, made = spaced / "errors.c", spaced / "errors"
    source.write_text(
        "#include <colocache.h>\n#include <errno.h>\n#include <stdio.h>\n"
        "int main(void) { return puts(colocache_strerror(-ENOENT)) < 0; }\n"
    )
    link = [musl_prefix / "lib" / "libcolocache.a", "-pthread"]
    run([tool("musl-gcc"), *STRICT, "-I", musl_prefix / "include", source, *link, "-static", "-o", made])
    assert run([made]) == "No such file or directory\n"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_examples_build_as_cpp(compiler: str, root: Path, prefix: Path, spaced: Path) -> None:
    link = [*pkg_config("--cflags", "--libs", where=prefix / "lib" / "pkgconfig"), f"-Wl,-rpath,{prefix / 'lib'}"]
    rest_is_zero = ["-Wno-missing-field-initializers"]  # as the header asks for; in C there is no warning
    for source in (smallest(root, spaced, ".cpp"), root / "tests" / "c" / "caller.cpp"):
        made = spaced / source.stem
        run([tool(compiler), *STRICT, *rest_is_zero, "-std=gnu++20", source, *link, "-o", made])
        said = run([made])
        assert said == SMALLEST_SAYS or said.endswith(" right\n")


def test_the_examples_build_with_cmake(root: Path, prefix: Path, spaced: Path) -> None:
    """find_package: shared, archive and C++; the version that is asked for counts."""
    cmake = tool("cmake")
    smallest(root, spaced)
    lists = spaced / "CMakeLists.txt"
    lists.write_text(CMAKE)
    where = [
        f"-DTESTS={root / 'tests' / 'c'}",
        f"-DGUEST={root / 'colocache' / 'vmm'}",
        f"-DCMAKE_PREFIX_PATH={prefix}",
    ]
    run([cmake, "-S", spaced, "-B", spaced / "build", *where])
    run([cmake, "--build", spaced / "build", "--parallel", "2"])
    for name in ("smallest", "smallest_static"):
        assert run([spaced / "build" / name]) == SMALLEST_SAYS
    assert run([spaced / "build" / "caller"]).endswith(" right\n")
    assert SONAME in run([tool("readelf"), "-d", spaced / "build" / "smallest"])
    assert SONAME not in run([tool("readelf"), "-d", spaced / "build" / "smallest_static"])

    lists.write_text(CMAKE.replace("colocache 0.1 ", "colocache 1.0 "))
    newer = subprocess.run(
        [cmake, "-S", spaced, "-B", spaced / "newer", *where], capture_output=True, text=True, check=False
    )
    assert newer.returncode != 0
    assert "requested version" in newer.stderr


def test_what_is_installed_and_removed(root: Path, prefix: Path, tmp_path: Path) -> None:
    assert files_in(prefix) == INSTALLED
    tree, stage = tmp_path / "csrc", tmp_path / "the stage"
    shutil.copytree(root / "csrc", tree, ignore=shutil.ignore_patterns("build"))
    where = ["PREFIX=/usr", "LIBDIR=lib/some-linux-gnu", f"DESTDIR={stage}", "CFLAGS=-O0"]
    make(tree, "install", *where)
    assert files_in(stage) == {f"usr/{name.replace('lib/', 'lib/some-linux-gnu/', 1)}" for name in INSTALLED}
    installed = stage / "usr" / "lib" / "some-linux-gnu"
    (include,) = pkg_config("--variable=includedir", where=installed / "pkgconfig")
    assert Path(include).resolve() == stage / "usr" / "include"
    make(tree, "uninstall", *where)
    assert files_in(stage) == set()


def test_a_directory_of_libraries_outside_the_prefix_is_refused(root: Path, tmp_path: Path) -> None:
    tree = tmp_path / "csrc"
    shutil.copytree(root / "csrc", tree, ignore=shutil.ignore_patterns("build"))
    command = [
        tool("make"),
        "-s",
        "-C",
        str(tree),
        "install",
        "LIBDIR=/usr/lib64",
        f"DESTDIR={tmp_path}/stage",
        "CFLAGS=-O0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "LIBDIR is /usr/lib64: give it as a directory beneath PREFIX" in done.stderr
    assert not (tmp_path / "stage").exists()


def test_the_installed_library_is_stripped_and_names_no_directory(prefix: Path) -> None:
    library = prefix / "lib" / SONAME
    sections = run([tool("readelf"), "-SW", library])
    assert ".dynsym" in sections
    assert ".symtab" not in sections
    assert ".debug" not in sections
    dynamic = run([tool("readelf"), "-d", library])
    assert f"[{SONAME}]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert str(prefix.parent) not in library.read_bytes().decode("latin-1")


def test_every_source_compiles_for_aarch64(root: Path, tmp_path: Path) -> None:
    """Without one warning, with and without crash points; the library's code is not run here."""
    compiler = tool("aarch64-linux-gnu-gcc")
    for faults in ("", "-DCOLOCACHE_FAULTS"):
        tree = tmp_path / f"csrc{faults}"
        shutil.copytree(root / "csrc", tree, ignore=shutil.ignore_patterns("build"))
        make(tree, f"CC={compiler}", "AR=aarch64-linux-gnu-ar", f"CPPFLAGS={faults}", "CFLAGS=-O3 -Werror")
        assert "AArch64" in run([tool("readelf"), "-h", tree / "build" / SONAME])
