# SPDX-License-Identifier: Apache-2.0
"""What the control groups of this process leave it: memory and huge pages, in version 1, version 2, or both at once.

A limit holds for a group and all below it, so every group up to the top of its hierarchy is asked and the least is what
is left. Whoever goes past a memory limit is killed; whoever goes past one of huge pages dies of SIGBUS, or is refused
where reservations are counted too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
NO_LIMIT = 1 << 60  # version 1 says "none" by a number about as large as there is


def memory_left() -> int | None:
    """Bytes; None without a limit. What the kernel would drop first, file pages not used lately, counts as free."""
    rooms = []
    for controller, folder in _groups("memory"):
        if controller == "":
            limit, used, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        room = _room(folder, limit, used)
        if room is not None:
            rooms.append(room + _statistic(folder / "memory.stat", cache))
    return min(rooms, default=None)


def huge_left(page: str = "2MB") -> int | None:
    """Bytes of huge pages of this size; None without a limit."""
    rooms = []
    for controller, folder in _groups("hugetlb"):
        limit, used = ("max", "current") if controller == "" else ("limit_in_bytes", "usage_in_bytes")
        for kind in (f"hugetlb.{page}", f"hugetlb.{page}.rsvd"):
            rooms.append(_room(folder, f"{kind}.{limit}", f"{kind}.{used}"))
    return min((room for room in rooms if room is not None), default=None)


def _room(folder: Path, limit: str, used: str) -> int | None:
    most, now = _number(folder / limit), _number(folder / used)
    return None if most is None or now is None or most >= NO_LIMIT else max(0, most - now)


def _number(path: Path) -> int | None:
    """What the file says; None if there is none, or it is "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        match = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def _groups(controller: str) -> Iterator[tuple[str, Path]]:
    """This process's groups that may limit `controller`, leaf first: ("" for version 2, else its name; folder)."""
    for name, path in _memberships():
        if name not in ("", controller):
            continue
        for root, mount in _mounts(name):
            inside = path.removeprefix(root).strip("/") if root != "/" else path.strip("/")
            folder = mount / inside
            while True:
                yield name, folder
                if folder == mount:
                    break
                folder = folder.parent


def _memberships() -> list[tuple[str, str]]:
    """(controller, path of the group in its hierarchy); the controller of version 2's one hierarchy is ""."""
    found = []
    for line in _lines(PROC / "cgroup"):
        _, controllers, path = line.split(":", 2)
        found += [(name, path) for name in controllers.split(",")]
    return found


def _mounts(controller: str) -> list[tuple[str, Path]]:
    """(path of the group that is mounted, where) of a controller's hierarchy."""
    found = []
    for line in _lines(PROC / "mountinfo"):
        mount, _, rest = line.partition(" - ")
        root, where = mount.split()[3:5]
        kind, _, options = rest.split()[:3]
        if (kind == "cgroup2" and controller == "") or (kind == "cgroup" and controller in options.split(",")):
            found.append((root, Path(where)))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []  # no /proc, so nothing is known of limits
