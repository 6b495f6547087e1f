# SPDX-License-Identifier: Apache-2.0
"""A Linux with a database on its disk, that tells the world of each row that it has committed, and what the world may
conclude from what it was told.

`sqlite` in the folder that COLOCACHE_LINUX names has Debian's sqlite3 with its libraries and their loader; .ci/run
downloads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import linux_guest
import pytest

LOADER = "ld-linux-x86-64.so.2"

# Each row and each change of one is a transaction of its own, and told after it: "row", how many were told before and
# this one, the row's number, and a tag that nobody could guess. All journals of sqlite in turn; what is rolled back is
# on the disk too. After each 20 all caches are dropped, and the database is read from the disk: sqlite's own check,
# then every row that it holds.
DATABASE = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs -o size=16m tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
while [ ! -e /dev/vda ]; do usleep 100000; done
mkdir /tmp/vda; mke2fs -q /dev/vda >/tmp/mke2fs 2>&1 || echo NO FILESYSTEM
mount -t ext4 -o noatime /dev/vda /tmp/vda || echo NO MOUNT
sql() { /sqlite/LOADER --library-path /sqlite /sqlite/sqlite3 -batch /tmp/vda/rows.db; }
echo "create table rows(n integer primary key, tag text, filler blob);" | sql && echo READY
change() {
  echo "insert or replace into rows values($1, hex(randomblob(8)), randomblob($2));"
  echo "select 'row $told $1 '||tag from rows where n = $1;"
}
round=0
while true; do
  round=$((round+1))
  case $((round%3)) in 0) mode=delete;; 1) mode=wal;; 2) mode=persist;; esac
  {
    echo ".output /dev/null"; echo "pragma journal_mode = $mode;"; echo ".output stdout"
    echo "pragma synchronous = full;"
    i=0; while [ $i -lt 20 ]; do
      i=$((i+1)); told=$(((round-1)*20+i)); n=$(((round*13+i*7)%150)); change $n $((n%9*500))
      [ $i = 10 ] && echo "begin; update rows set tag = 'never', filler = randomblob(900); rollback;"
    done
  } > /tmp/work
  sql < /tmp/work
  sync; echo 3 > /proc/sys/vm/drop_caches
  sql <<END
select 'integrity '||integrity_check from pragma_integrity_check limit 3;
select 'kept '||n||' '||tag from rows;
select 'checked '||count(*) from rows;
END
done
""".replace("LOADER", LOADER)
LINE = re.compile(rb"(row|kept|checked|integrity) ([^\r\n]*)\r\n")


@dataclass
class Told:
    """What a console has told so far, and what of it can't be."""

    told: int = 0  # changes
    checks: int = 0  # of all rows
    rows: dict[int, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def read(console: bytes) -> Told:
    """From its beginning. Each change is told once and in order; a check finds all that was told before and no more."""
    found = Told()
    kept: dict[int, str] = {}
    integrity = ""
    for kind, rest in LINE.findall(console):
        words = rest.decode(errors="replace").split()
        if kind == b"row":
            found.told += 1
            if int(words[0]) != found.told:
                found.wrong.append(f"change {words[0]} was told where {found.told} must come")
                found.told = int(words[0])
            found.rows[int(words[1])] = words[2]
        elif kind == b"integrity":
            integrity, kept = " ".join(words), {}
        elif kind == b"kept":
            kept[int(words[0])] = words[1]
        else:
            found.checks += 1
            if integrity != "ok":
                found.wrong.append(f"check {found.checks}: integrity_check says {integrity!r}")
            if kept != found.rows:
                differ = {n for n in kept.keys() | found.rows.keys() if kept.get(n) != found.rows.get(n)}
                found.wrong.append(f"check {found.checks}: of {len(found.rows)} rows {sorted(differ)} are not as told")
            integrity, kept = "", {}
    for bad in (b"NO FILESYSTEM", b"NO MOUNT", b"rror"):
        if bad in console:
            found.wrong.append(f"{bad.decode()} on the console")
    return found


def command(where: Path) -> tuple[str, ...]:
    """The command line of such a guest; skips where it can't be had."""
    linux_guest.need_module("virtio_blk")
    source = linux_guest.folder() / "sqlite"
    if not (source / "sqlite3").is_file() or not (source / LOADER).is_file():
        pytest.skip("the folder in COLOCACHE_LINUX has no sqlite/sqlite3 with its libraries: .ci/run downloads them")
    files = {f"sqlite/{path.name}": path.read_bytes() for path in source.iterdir()}
    return linux_guest.command(where, init=DATABASE, files=files)
