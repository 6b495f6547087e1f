# SPDX-License-Identifier: Apache-2.0
"""Limits of control groups are seen before memory is taken: in made-up trees of both versions, under a real limit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colocache import backing as bk
from colocache import cgroups
from colocache.children import python_command
from colocache.errors import MemoryShortError

MIB = 1 << 20
Tree = Callable[..., None]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Makes /proc/self and the hierarchies that it speaks of."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    (tmp_path / "proc").mkdir()

    def make(groups: str, mounts: dict[str, str], files: dict[str, str]) -> None:
        (tmp_path / "proc" / "cgroup").write_text(groups)
        lines = [
            f"35 31 0:32 {root} {tmp_path}/{where} rw,relatime - {kind}\n"
            for where, (root, kind) in ((where, text.split(" ", 1)) for where, text in mounts.items())
        ]
        (tmp_path / "proc" / "mountinfo").write_text("".join(lines))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return make


def test_the_tightest_group_of_version_2_up_to_the_top_counts(tree: Tree) -> None:
    tree(
        "0::/a/b\n",
        {"v2": "/ cgroup2 cgroup2 rw"},
        {
            "v2/a/b/memory.max": "max\n", "v2/a/b/memory.current": "5\n",
            "v2/a/memory.max": f"{100 * MIB}\n", "v2/a/memory.current": f"{90 * MIB}\n",
            "v2/a/memory.stat": f"anon 1\ninactive_file {30 * MIB}\n",
            "v2/memory.max": f"{200 * MIB}\n", "v2/memory.current": f"{150 * MIB}\n",
            "v2/a/hugetlb.2MB.max": f"{64 * MIB}\n", "v2/a/hugetlb.2MB.current": f"{4 * MIB}\n",
            "v2/a/hugetlb.2MB.rsvd.max": f"{32 * MIB}\n", "v2/a/hugetlb.2MB.rsvd.current": "0\n",
        },
    )  # fmt: skip
    assert cgroups.memory_left() == 40 * MIB, "what the kernel would drop first counts as free"
    assert cgroups.huge_left() == 32 * MIB


def test_version_1_is_seen_beside_version_2_and_in_a_container(tree: Tree) -> None:
    tree(
        "9:name=systemd:/\n4:memory:/docker/x/inner\n3:cpu,hugetlb:/docker/x\n0::/\n",
        {
            "mem": "/docker/x cgroup cgroup rw,memory",
            "huge": "/ cgroup cgroup rw,cpu,hugetlb",
            "v2": "/ cgroup2 cgroup2 rw",
        },
        {
            "mem/inner/memory.limit_in_bytes": "9223372036854771712\n", "mem/inner/memory.usage_in_bytes": "7\n",
            "mem/memory.limit_in_bytes": f"{64 * MIB}\n", "mem/memory.usage_in_bytes": f"{63 * MIB}\n",
            "mem/memory.stat": f"inactive_file 1\ntotal_inactive_file {3 * MIB}\n",
            "huge/docker/x/hugetlb.2MB.limit_in_bytes": f"{8 * MIB}\n",
            "huge/docker/x/hugetlb.2MB.usage_in_bytes": f"{8 * MIB}\n",
        },
    )  # fmt: skip
    assert cgroups.memory_left() == 4 * MIB
    assert cgroups.huge_left() == 0


def test_without_limits_and_without_proc_nothing_is_limited(tree: Tree) -> None:
    assert (cgroups.memory_left(), cgroups.huge_left()) == (None, None)
    tree("0::/gone\n", {"v2": "/ cgroup2 cgroup2 rw"}, {})
    assert (cgroups.memory_left(), cgroups.huge_left()) == (None, None)


def test_a_limit_of_huge_pages_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "huge_left", lambda: 10 * bk.HUGE)
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(100, 100))
    kind = bk.nameless(bk.kinds("hugetlb")[0])
    bk.check_room(kind, 10 * bk.HUGE)
    with pytest.raises(MemoryShortError, match="control group of this process leaves it 10: 1 are missing") as caught:
        bk.check_room(kind, 11 * bk.HUGE)
    assert "sysctl" not in str(caught.value)


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of version 1 below ours with a limit of 96 MiB; skips where that can't be made."""
    found = [folder for name, folder in cgroups._groups("memory") if name == "memory"]
    if not found or not os.access(found[0], os.W_OK):
        pytest.skip("no memory controller of version 1 in which this user may make a group")
    group = found[0] / f"colocache-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(96 * MIB))
    except OSError as error:
        pytest.skip(f"no group with a limit: {error}")
    yield group
    group.rmdir()


def test_a_guest_above_a_limit_of_version_1_is_one_sentence_and_nobody_is_killed(limited: Path) -> None:
    ran = subprocess.run(
        ["sh", "-c", f'echo $$ > {limited}/tasks && exec "$0" "$@"',
         *python_command("colocache.cli", "main", "demo", "--ram", "64M", "--backing", "shm", "--checkpoints", "1")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, (ran.returncode, ran.stdout, ran.stderr)
    (sentence,) = ran.stderr.splitlines()
    assert "192 MiB of memory are needed" in sentence
    assert "control group" in sentence
