# SPDX-License-Identifier: Apache-2.0
"""A Linux that checks itself, for the tests: a kernel that was downloaded, busybox, and an /init of our own.

COLOCACHE_LINUX names a folder with `vmlinuz` and, for some tests, `modules`; .ci/run makes one from Debian's cloud
kernel, which is unpacked there and never installed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from qemu_support import QEMU

# Two processes each keep a chain: every link is a file in memory whose content follows from the link before, and the
# hash of it. All files are checked over and over against hashes kept elsewhere, so that a page that is lost or of
# another epoch breaks the chain or a hash. Lines: "NAME LINK bad N", where N counts what did not hold,
# and the form that `colocache demo` reads.
INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs -o size=64m tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_balloon; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko && echo $module
done
worker() {
  mkdir /tmp/$1; cd /tmp/$1; n=0; bad=0; h=$1
  while true; do
    n=$((n+1)); f=$((n%20)); before=$h
    h=$(echo "$h $n" | sha256sum); h=${h%% *}
    i=0; while [ $i -lt 200 ]; do echo "$h $i $before"; i=$((i+1)); done > f$f
    sha256sum f$f > s$f
    if [ $((n%5)) = 0 ]; then
      cat s* | sha256sum -c >/tmp/$1.out 2>&1 || bad=$((bad+1))
      i=0; while [ $i -lt 4 ]; do  # each link names the one before
        read new x old < f$(((n-i)%20)); read old2 x < f$(((n-i-1)%20)); [ $old = $old2 ] || bad=$((bad+1)); i=$((i+1))
      done
      echo "$1 $n bad $bad"
      [ $bad = 0 ] && echo "colocache: $1 ok $((n/5))" || echo "colocache: $1 bad $bad of its links and files"
    fi
    usleep 20000
  done
}
worker one & worker two &
echo READY
grep -q switch_off /proc/cmdline && { sleep 3; poweroff -f; } &
while read line; do case $line in
  reboot) reboot -f;; poweroff) poweroff -f;; panic) echo c > /proc/sysrq-trigger;; *) echo "heard $line";;
esac; done < /dev/ttyS0
while true; do sleep 1; done
"""
# It answers each line of a TCP client with the number of lines so far and the line, and counts on its console.
SERVER = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs -o size=64m tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
  failover net_failover virtio_net; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
ip link set lo up; ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && echo NETWORK
cat > /tmp/serve <<'EOF'
#!/bin/sh
n=0
while read line; do n=$((n+1)); echo "$n $line"; done
EOF
chmod +x /tmp/serve
(while true; do nc -l -p 7777 -e /tmp/serve; done) &
n=0
while true; do n=$((n+1)); echo "count $n"; usleep 50000; done
"""
# It tells each line that it was given, with the number of lines so far.
LISTENER = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
stty -echo < /dev/ttyS0
echo READY
n=0
while read line; do n=$((n+1)); echo "heard $n $line"; done < /dev/ttyS0
"""
# The same at a virtio console.
VIRTIO_LISTENER = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
while [ ! -e /dev/hvc0 ]; do usleep 100000; done
exec < /dev/hvc0 > /dev/hvc0
stty -echo
echo READY
n=0
while read line; do n=$((n+1)); echo "heard $n $line"; done
"""
VIRTIO_CONSOLE = ("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=colocache.console")
# It keeps files on a disk: writes one, syncs, drops its caches, and checks all of them against what it remembers in
# memory. A disk of another epoch than memory has a file too few, too many, or of another content. What `fsync` has
# promised is told on the console after it.
DISK = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs -o size=64m tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
while [ ! -e /dev/vda ]; do usleep 100000; done
for disk in vda vdb; do
  [ -e /dev/$disk ] || continue
  mkdir /tmp/$disk; mke2fs -q /dev/$disk >/tmp/mke2fs 2>&1 || echo NO FILESYSTEM
  mount -t ext4 -o noatime /dev/$disk /tmp/$disk || echo NO MOUNT
done
echo READY
writer() {
  cd /tmp/$1; n=0; bad=0; touch /tmp/sums.$1
  while true; do
    n=$((n+1)); f=file$((n%40))
    { echo "$1 $n"; dd if=/dev/urandom bs=1k count=$((n%7*8+1)) 2>/dev/null; } > $f
    sum=$(sha256sum $f)
    grep -v " $f\$" /tmp/sums.$1 > /tmp/new.$1; echo "$sum" >> /tmp/new.$1; mv /tmp/new.$1 /tmp/sums.$1
    sync $f
    if [ $((n%5)) = 0 ]; then
      sync; echo 3 > /proc/sys/vm/drop_caches
      sha256sum -c /tmp/sums.$1 > /tmp/out.$1 2>&1 || bad=$((bad+1))
      [ $(ls | grep -c file) = $(wc -l < /tmp/sums.$1) ] || bad=$((bad+1))
    fi
    echo "$1 $n bad $bad"
    usleep ${PAUSE:-20000}
  done
}
for disk in vda vdb; do [ -e /dev/$disk ] && writer $disk & done
while true; do sleep 1; done
"""
REPORT = re.compile(rb"(one|two|vd[ab]) (\d+) bad (\d+)\r")


def folder() -> Path:
    """Where the kernel is; skips where there is none."""
    found = os.environ.get("COLOCACHE_LINUX")
    if not found or not (Path(found) / "vmlinuz").is_file():
        pytest.skip("COLOCACHE_LINUX names no folder with a vmlinuz: .ci/run downloads one")
    if shutil.which("busybox") is None:
        pytest.skip("no busybox: apt install busybox-static")
    return Path(found)


def need_module(name: str) -> None:
    """Skips where there is none."""
    if not (folder() / "modules" / f"{name}.ko").is_file():
        pytest.skip(f"the kernel in COLOCACHE_LINUX came without {name}.ko")


def command(
    where: Path, *, switch_off: bool = False, init: str = INIT, files: Mapping[str, bytes] | None = None
) -> tuple[str, ...]:
    """The command line of a Linux guest; its initrd is made in `where`, with `files` more. `switch_off`: by itself,
    after some seconds."""
    source = folder()
    initrd = where / "initrd"
    modules = {f"m/{path.name}": path.read_bytes() for path in (source / "modules").glob("*.ko")}
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    initrd.write_bytes(cpio({"init": init.encode(), "bin/busybox": busybox, **modules, **(files or {})}))
    append = "console=ttyS0 quiet panic=-1 sysrq_always_enabled" + (" switch_off" if switch_off else "")
    kernel = str(source / "vmlinuz")
    return (QEMU, "-m", "96", "-accel", "tcg", "-nodefaults", "-kernel", kernel, "-initrd", str(initrd),
            "-append", append)  # fmt: skip


def reports(console: bytes) -> dict[str, tuple[int, int]]:
    """The newest link and the number of failures that each worker told."""
    return {name.decode(): (int(link), int(bad)) for name, link, bad in REPORT.findall(console)}


def cpio(files: Mapping[str, bytes]) -> bytes:
    """An initial file system, as the kernel unpacks it: these files, executable, and the folders of a system."""
    folders = dict.fromkeys(("bin", "m", "proc", "sys", "dev", "tmp", *(str(Path(name).parent) for name in files)))
    entries = {name: (16877, b"") for name in folders if name != "."}
    entries |= {name: (0o100755, data) for name, data in files.items()}
    entries["TRAILER!!!"] = (0, b"")
    archive = b""
    for number, (name, (mode, data)) in enumerate(entries.items(), 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    return archive
