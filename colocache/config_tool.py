# SPDX-License-Identifier: Apache-2.0
"""`colocache-config`: where this installation's C library lies, for build systems.

Flags are quoted for a shell, as a path may hold spaces: `eval`, xargs and make read them right, a bare $(...) only
where no quotes are needed. Directories are printed as they are.

This module needs nothing but the standard library: run as a file (`python .../colocache/config_tool.py --cflags`) it
also answers where the package's own dependencies are missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def include_dir() -> Path:
    """The directory of colocache.h."""
    return PACKAGE / "include"


def lib_dir() -> Path:
    """The directory of libcolocache.so.0, libcolocache.so and libcolocache.a."""
    return PACKAGE / "lib"


def pkgconfig_dir() -> Path:
    """The directory of colocache.pc, for PKG_CONFIG_PATH."""
    return lib_dir() / "pkgconfig"


def cmake_dir() -> Path:
    """The directory of colocacheConfig.cmake, for CMake's colocache_DIR."""
    return lib_dir() / "cmake" / "colocache"


def version() -> str:
    """Of the installed package; its C library has the same."""
    return metadata.version("colocache")


def cflags() -> str:
    return f"-I{shlex.quote(str(include_dir()))}"


def libs() -> str:
    lib = shlex.quote(str(lib_dir()))
    return f"-L{lib} -Wl,-rpath,{lib} -lcolocache"


def static_libs() -> str:
    return f"{shlex.quote(str(lib_dir() / 'libcolocache.a'))} -pthread"


ANSWERS: dict[str, tuple[Callable[[], object], str]] = {
    "version": (version, "version of the package and of its C library"),
    "cflags": (cflags, "flags that find colocache.h"),
    "libs": (libs, "flags that link libcolocache.so.0 and find it when the program runs"),
    "static-libs": (static_libs, "flags that link libcolocache.a instead"),
    "pkgconfigdir": (pkgconfig_dir, "directory of colocache.pc, for PKG_CONFIG_PATH"),
    "cmakedir": (cmake_dir, "directory of the CMake package config, for -Dcolocache_DIR="),
    "includedir": (include_dir, "directory of colocache.h"),
    "libdir": (lib_dir, "directory of the libraries"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="colocache-config",
        description="What a C, C++ or Rust program needs to use the libcolocache of this Python installation.",
        epilog='eval "cc vmm.c $(colocache-config --cflags --libs) -o vmm": flags are quoted for a shell, so that the '
        "path may have spaces; directories are printed as they are.",
    )
    for name, (_, text) in ANSWERS.items():
        made.add_argument(f"--{name}", dest="asked", action="append_const", const=name, help=text)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answers on one line, in the order of the options. 2: nothing was asked; 1: nothing is installed."""
    made = parser()
    asked: list[str] = made.parse_args(argv).asked or []
    if not asked:
        made.print_usage(sys.stderr)
        return 2
    missing = [path for path in (include_dir() / "colocache.h", lib_dir() / "libcolocache.so.0") if not path.is_file()]
    if missing:
        print(f"colocache-config: {missing[0]} is not there: install the package with `pip install .`", file=sys.stderr)
        return 1
    print(" ".join(str(ANSWERS[name][0]()) for name in asked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
