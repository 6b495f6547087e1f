# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml can't say: the C engine is built once, as libcolocache.so.0, and the Python module links to it.

The package then holds

    colocache/lib/libcolocache.so.0   the engine (SONAME libcolocache.so.0; versions from csrc/libcolocache.map)
    colocache/lib/libcolocache.so     a linker script, for `cc -lcolocache`
    colocache/lib/libcolocache.a      the same objects
    colocache/lib/pkgconfig/          colocache.pc, relative to itself
    colocache/lib/cmake/colocache/    the CMake package config, relative to itself
    colocache/include/colocache.h     the public header
    colocache/_engine.abi3.so         cffi's module, run path $ORIGIN/lib
    colocache/vmm/qemu/preload.so     what runs inside a QEMU guest's process

One build serves every Python from 3.10 on (abi3).  Free-threaded Python has no such interface before 3.15: there the
modules are built for the one Python that builds them, and need cffi 2.0.  Nothing holds debug information or symbols
that a program does not link to, unless COLOCACHE_BUILD_CFLAGS has -g.  csrc/Makefile builds the library without Python.

Variables of the environment that the build reads:

    COLOCACHE_BUILD_WERROR=1   warnings of the C compiler are errors (CI)
    COLOCACHE_BUILD_FAULTS=1   a test build with crash points (-DCOLOCACHE_FAULTS); never ship it
    COLOCACHE_BUILD_CFLAGS     more flags for csrc/*.c, after ours (sanitizers)
    CC, CFLAGS, LDFLAGS        as for every extension module
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
GUEST = ROOT / "colocache" / "vmm" / "_guest_build.py"
QEMU_GUEST = ROOT / "colocache" / "vmm" / "qemu" / "_guest_build.py"
PRELOAD = ROOT / "colocache" / "vmm" / "qemu" / "preload.c"
BASELINE = ROOT / "colocache" / "measure" / "_baseline_build.py"
SONAME = "libcolocache.so.0"

# No -march: functions that need AVX carry their own target attribute and are picked at run time.
CFLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]


def need_headers() -> None:
    """Stop with one sentence where Python.h is missing, before a compiler's pages of errors say it."""
    paths = sysconfig.get_paths()
    where = sorted({paths["include"], paths["platinclude"]})
    if not any((Path(path) / "Python.h").is_file() for path in where):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"Python.h of Python {version} is missing (looked in {', '.join(where)}): install Python's headers, "
            f"on Debian or Ubuntu with `apt install python3-dev` (or python{version}-dev)"
        )


def need_compiler() -> None:
    """Stop with one sentence where there is no C compiler."""
    compiler = compiler_words()[0]
    if shutil.which(compiler) is None:
        raise SetupError(
            f"no C compiler ({compiler}): install one, on Debian or Ubuntu with `apt install gcc libc6-dev`"
        )


def compiler_words() -> list[str]:
    """The C compiler's command, as setuptools would pick it."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def free_threaded() -> bool:
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def need_cffi() -> None:
    """Stop with one sentence where cffi is too old for this Python."""
    found = metadata.version("cffi")
    if free_threaded() and int(found.split(".")[0]) < 2:
        raise SetupError(
            f"cffi {found} can't build for free-threaded Python: `pip install 'cffi>=2.0'`, or use another Python"
        )


def link_command(command: list[str], *, strip: bool) -> list[str]:
    """Python's own command to link a module, without the directories of the machine where that Python was built.

    Some Pythons carry -Wl,-rpath of their own libraries: every module would look for libcolocache there first.
    One that is in LDFLAGS of the environment is meant.
    """
    wanted = shlex.split(os.environ.get("LDFLAGS", ""))
    kept = [part for part in command if part in wanted or not part.startswith(("-Wl,-rpath", "-Wl,-R"))]
    return [*kept, "-Wl,-s"] if strip else kept


def replace_file(source: str, target: str) -> str:
    """Copies by way of a new file: programs that have the old one mapped keep it."""
    made = f"{target}.new"
    shutil.copy2(source, made)
    Path(made).replace(target)
    return target


def tree(*suffixes: str) -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in suffixes)


class BuildEngine(build_ext):
    """Builds csrc/*.c into the library, then the extension modules that link to it."""

    def run(self) -> None:
        need_compiler()
        need_headers()
        need_cffi()
        # setuptools sets inplace to 0 while it builds and copies the modules to the source tree afterwards.
        self.in_source = bool(self.inplace)
        super().run()

    def build_extensions(self) -> None:
        lib = Path(self.build_lib) / "colocache" / "lib"
        include = Path(self.build_lib) / "colocache" / "include"
        lib.mkdir(parents=True, exist_ok=True)
        include.mkdir(parents=True, exist_ok=True)
        strip = not any(flag.startswith("-g") for flag in self.flags())
        self.compiler.linker_so = link_command(self.compiler.linker_so, strip=strip)
        self.build_library(lib)
        if PRELOAD.is_file():
            self.build_preload()
        shutil.copyfile(CSRC / "include" / "colocache.h", include / "colocache.h")
        for ext in self.extensions:
            ext.library_dirs.append(str(lib))
        super().build_extensions()
        if self.in_source:
            # An editable install runs from the source tree: what the modules load must lie beside them there.
            for made in (lib, include):
                shutil.copytree(made, ROOT / "colocache" / made.name, dirs_exist_ok=True, copy_function=replace_file)

    def flags(self) -> list[str]:
        flags = list(CFLAGS)
        if os.environ.get("COLOCACHE_BUILD_WERROR") == "1":
            flags.append("-Werror")
        if os.environ.get("COLOCACHE_BUILD_FAULTS") == "1":
            flags.append("-DCOLOCACHE_FAULTS")
        return flags + shlex.split(os.environ.get("COLOCACHE_BUILD_CFLAGS", ""))

    def build_library(self, lib: Path) -> None:
        sources = sorted(CSRC.glob("*.c"))
        flags = self.flags()
        objects = self.compile_all(sources, flags)
        script = CSRC / "libcolocache.map"
        link = [f"-Wl,-soname,{SONAME}", "-Wl,-z,relro", "-pthread"]
        if script.is_file():
            link.append(f"-Wl,--version-script={script}")
        link += [flag for flag in flags if flag.startswith("-fsanitize")]
        made = lib / f"{SONAME}.new"
        self.compiler.link_shared_object(objects, str(made), extra_postargs=link, build_temp=self.build_temp)
        made.replace(lib / SONAME)  # never written in place: a process that runs on the old one would die of SIGBUS
        (lib / "libcolocache.so").write_text(f"/* GNU ld script */\nINPUT({SONAME})\n", encoding="utf-8")
        self.fill_in(CSRC / "colocache.pc.in", lib / "pkgconfig")
        for template in (CSRC / "cmake").glob("*.in"):
            self.fill_in(template, lib / "cmake" / "colocache")
        archive = lib / "libcolocache.a"
        archive.unlink(missing_ok=True)  # ar adds to what is there: an object of a removed source would stay
        self.compiler.create_static_lib(objects, "colocache", output_dir=str(lib))

    def build_preload(self) -> None:
        """With flags of its own: it runs in a program that was built without our sanitizers and crash points."""
        made = Path(self.build_lib) / PRELOAD.relative_to(ROOT).with_suffix(".so")
        made.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *compiler_words(),
            *CFLAGS,
            "-shared",
            "-pthread",
            "-Wl,-z,relro,-z,now",
            "-Wl,-s",
            str(PRELOAD),
            "-o",
            str(made),
        ]
        if os.environ.get("COLOCACHE_BUILD_WERROR") == "1":
            command.append("-Werror")
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise CompileError(f"{PRELOAD.relative_to(ROOT)} does not compile")
        if self.in_source:
            replace_file(str(made), str(PRELOAD.with_suffix(".so")))

    def fill_in(self, template: Path, directory: Path) -> None:
        """`template` without its .in, for libraries in lib/ that no loader would find by itself."""
        words = {
            "@VERSION@": self.distribution.get_version(),
            "@UP@": "..",  # from lib/ to the directory that also holds include/
            "@RPATH@": " -Wl,-rpath,${libdir}",
        }
        text = template.read_text(encoding="utf-8")
        for word, meant in words.items():
            text = text.replace(word, meant)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / template.stem).write_text(text, encoding="utf-8")

    def compile_all(self, sources: list[Path], flags: list[str]) -> list[str]:
        """Object files of `sources`: those older than their source, a header or this file, or of other flags, anew."""
        temp = Path(self.build_temp) / "libcolocache"  # modules that have a source of csrc use csrc/, with other flags
        temp.mkdir(parents=True, exist_ok=True)
        stamp = temp / "flags"
        # CFLAGS of the environment come last; those that Python itself was built with are its own business.
        compile_one = [
            *compiler_words(),
            *flags,
            *shlex.split(os.environ.get("CFLAGS", "")),
            "-I",
            "csrc/include",
            "-I",
            "csrc",
        ]
        used = shlex.join(compile_one)
        same = stamp.is_file() and stamp.read_text(encoding="utf-8") == used
        stamp.unlink(missing_ok=True)
        newest = max(path.stat().st_mtime for path in [*tree(".h"), ROOT / "setup.py"])

        def one(source: Path) -> str:
            target = temp / (source.stem + ".o")
            if same and target.is_file() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
                return str(target)
            name = source.relative_to(ROOT)
            command = [*compile_one, "-c", str(name), "-o", str(target.resolve())]
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                target.unlink(missing_ok=True)
                raise CompileError(f"{name} does not compile")
            return str(target)

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(one, sources))
        stamp.write_text(used, encoding="utf-8")
        return objects


modules = ["colocache/_native_build.py:ffibuilder"]
if GUEST.is_file():
    modules.append("colocache/vmm/_guest_build.py:ffibuilder")
if QEMU_GUEST.is_file():
    modules.append("colocache/vmm/qemu/_guest_build.py:ffibuilder")
if BASELINE.is_file():
    modules.append("colocache/measure/_baseline_build.py:ffibuilder")

setup(
    cffi_modules=modules,
    cmdclass={"build_ext": BuildEngine},
    options={} if free_threaded() else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
