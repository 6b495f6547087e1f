# SPDX-License-Identifier: Apache-2.0
"""Numbers out of bounds are refused before anything is created, and the manual's own limits can be reached."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from colocache import backing as bk
from colocache.children import python_command

BLOCKS = """
    import os, resource, sys
    import colocache
    from colocache import BlockSpec, Cache, Memory

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
    blocks = [BlockSpec("n" * 250 + f"{n:05d}", 4096) for n in range(256)]
    with Memory.create("many-" + str(os.getpid()), blocks, backing="shm") as memory:
        with Cache.create(memory, threads=1, device_state_max=4096) as cache:
            cache.receive(1, 255, 0, b"x" * 4096)
            cache.device_state_buffer(1, 4)[:] = b"regs"
            cache.seal(1); cache.flush(); cache.loaded()
        with Cache.attach(memory, threads=1) as cache:
            print(len(cache.blocks), cache.status().sealed_epoch, bytes(cache.blocks[255].guest[0, :1]))
"""


def with_limit(hard: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCKS), str(hard)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_256_blocks_work_where_the_hard_limit_of_descriptors_allows_them() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("this process may not have 4096 descriptors")
    ran = with_limit(4096)
    assert (ran.returncode, ran.stdout) == (0, "256 1 b'x'\n"), ran.stderr


def test_too_few_descriptors_are_said_with_their_number_before_anything_is_made() -> None:
    before = sorted(bk.SHM_DIR.iterdir())
    ran = with_limit(700)
    assert ran.returncode == 1
    assert "256 RAM blocks take 1088 descriptors and this process may have 700" in ran.stderr
    assert "ulimit -n 1088" in ran.stderr
    assert [path for path in sorted(bk.SHM_DIR.iterdir()) if path not in before and "many-" in path.name] == []


@pytest.mark.parametrize(
    ("side", "option", "value"),
    [
        ("secondary", "--peer-timeout", "nan"),
        ("secondary", "--peer-timeout", "inf"),
        ("secondary", "--run-on", "-1"),
        ("secondary", "--reconnect-limit", "1e9"),
        ("secondary", "--connect-limit", "0"),
        ("secondary", "--ram", "4096"),
        ("secondary", "--ram", "17"),
        ("secondary", "--ram", "9999999T"),
        ("secondary", "--ram", "600G"),
        ("secondary", "--ram", "\u0663M"),
        ("secondary", "--working-set", "-1"),
        ("secondary", "--device-state-max", "99999999999T"),
        ("secondary", "--device-state-max", "2T"),
        ("secondary", "--dirty-limit", "x"),
        ("secondary", "--threads", "70000"),
        ("secondary", "--streams", "17"),
        ("secondary", "--steps-per-second", "nan"),
        ("secondary", "--pair", "x" * 300),
        ("secondary", "--name", ""),
        ("primary", "--interval", "nan"),
        ("primary", "--peer-timeout", "nan"),
        ("primary", "--checkpoints", "-1"),
        ("primary", "--ram", "17"),
        ("primary", "--pair", ""),
        ("demo", "--ram", "17"),
        ("demo", "--interval", "nan"),
        ("demo", "--run-on", "nan"),
    ],
)
def test_a_value_out_of_bounds_is_refused_before_anything_is_created(
    side: str, option: str, value: str, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/s"
    where = {"secondary": ["--listen", address], "primary": ["--connect", address], "demo": []}
    args = [side, "--guest", "process", "--backing", "shm", *where[side], option, value]
    ran = subprocess.run(
        python_command("colocache.cli", "main", *args),
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert "waiting for a primary" not in ran.stderr
    assert sentence
    assert list(tmp_path.iterdir()) == [], "the socket was made before the value was looked at"
