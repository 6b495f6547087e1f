# SPDX-License-Identifier: Apache-2.0
"""Calls into the system that fail, and memory that is too small: C programs built from csrc, under sanitizers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent / "c" / "run_faults.sh"

# What csrc imports and what needs no wrapper, with the reason.
CANNOT_FAIL = {
    "no error to return": "free memcmp memcpy memset strchr strlen strcmp strcpy strncmp strnlen strtoull snprintf "
    "vsnprintf strerror_r getpid clock_gettime getenv qsort sysconf sigfillset pthread_sigmask bsearch",
    "can't fail as used here (own, valid objects)": "pthread_mutex_init pthread_mutex_lock pthread_mutex_unlock "
    "pthread_mutex_destroy pthread_cond_init pthread_cond_wait pthread_cond_signal pthread_cond_broadcast "
    "pthread_cond_destroy pthread_join",
    "the descriptor is gone whatever it returns": "close fclose",
    "without it a whole range is zapped, which does as well": "malloc",
    "waking early only means looking again": "usleep",
    "a list of mappings that breaks off is a mapping that is not covered: refused": "fgets sscanf",
    "a cgroup that can't be read has no quota": "read strtoll strrchr strsep strcspn",
    "a thread without a name works as well": "pthread_self pthread_setname_np",
    "crash points only": "kill pause",
}

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


def result_of(program: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("failing-calls")
    done = subprocess.run([str(SCRIPT), "build-sanitized", str(where)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


def test_every_imported_call_has_a_wrapper_or_a_reason(programs: Path) -> None:
    wrapped = subprocess.run([str(SCRIPT), "wrapped"], capture_output=True, text=True, check=True).stdout.split()
    harmless = {name for names in CANNOT_FAIL.values() for name in names.split()}
    objects = sorted(str(path) for path in (programs / "csrc").glob("*.o"))
    symbols = subprocess.run(["nm", "-u", "-P", *objects], capture_output=True, text=True, check=True).stdout
    imported = set(re.findall(r"^(\w+) U", symbols, flags=re.MULTILINE))
    # Names of the implementation: __asan_..., __errno_location, _GLOBAL_OFFSET_TABLE_, fortified variants __x_chk
    imported = {name for name in imported if not name.startswith(("_", "cc_", "colocache_"))}
    assert imported - harmless <= set(wrapped)


def test_no_failing_call_breaks_the_promise(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor() as pool:  # of programs: a thread only waits
        results = list(pool.map(lambda mode: result_of(programs / "fail", mode), ("mirror", "bounded")))
    calls = Counter[str]()
    for result in results:
        calls.update(result["calls"])
    uffd = results[0]["uffd"]
    never = {name for name in results[0]["calls"] if not calls[name]} - (set() if uffd else {"syscall"})
    assert not never, "the histories never call them"
    failures = sum(result["failures"] for result in results)
    assert failures > 2000
    with capsys.disabled():
        print(
            f"\nfailing calls: {len(calls)} functions, {calls.total()} calls in the histories of both memory modes, "
            f"{failures} runs with one failure each (under address, leak and undefined-behaviour sanitizers)"
            + ("" if uffd else "; without userfaultfd, which this kernel refuses")
        )


def test_too_little_memory_is_told_where_it_is_asked_for(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(programs / "fail_memory")
    with capsys.disabled():
        print(f"\ntoo little memory: {result['checks']} checks, skipped: {', '.join(result['skipped']) or 'nothing'}")
    if result["skipped"]:
        pytest.skip("; ".join(result["skipped"]))
    assert result["checks"] > 20
