# SPDX-License-Identifier: Apache-2.0
"""What of a QEMU command line can't work in a pair, and why: tables, and the one function that looks things up in them.

Whatever is not here is passed on as it is; a device that can't be saved is then refused by QEMU itself
(-only-migratable).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

OURS = "colocache gives this option itself"
TWICE = "every process of the pair would open it, and several run on one host"
NETWORK = "what a guest sends must be held until its epoch is sealed; `--net tap:NAME` adds a card and connects it"
CARD = "it would be connected to nothing that is held; `--net tap:NAME` adds the one card that works, virtio-net-pci"
VHOST = "the host's kernel would write guest memory unseen, and send at once what must be held till its epoch is sealed"
SOUND = "what is heard is not held until its epoch is sealed"
OUTSIDE = "what it writes outside is not held until its epoch is sealed"
REMOVABLE = "a medium that comes and goes is not replicated; one that stays is `-drive readonly=on` or `--disk FILE`"
SNAPSHOT = "a snapshot under way is written beside the pair's disks; `--disk FILE` adds one that is of the epoch"
DISK = "a writable disk must be of the same epoch as memory; `--disk FILE` adds one that is"
VIDEO = "the display's memory is not replicated yet"
LOCKS = "it would make a private copy of every page of a secondary"
HIDES = "what stands in it can't be checked"

# Options that are refused whatever their value is: name without dashes -> why.
OPTIONS = {
    "S": OURS,
    "incoming": OURS,
    "loadvm": "a guest starts by booting, or from its pair's epoch",
    "mem-path": "guest memory is colocache's own",
    "mem-prealloc": LOCKS,
    "daemonize": "every QEMU dies with the process that drives it, and a daemon would not",
    "async-teardown": "the death of such a QEMU is seen before its memory is free",
    "runas": "a process that changes its user outlives the one that drives it",
    "chroot": "QEMU finds memory and state of the pair under /proc",
    "preconfig": OURS,
    "readconfig": HIDES,
    "add-fd": HIDES,
    "snapshot": SNAPSHOT,
    "mtdblock": DISK,
    "sd": DISK,
    "pflash": f"{DISK}; give firmware as -bios, or as -drive if=pflash,readonly=on",
    "hda": DISK,
    "hdb": DISK,
    "hdc": DISK,
    "hdd": DISK,
    "fda": REMOVABLE,
    "fdb": REMOVABLE,
    "iscsi": DISK,
    "fsdev": "a folder of the host is no part of an epoch",
    "virtfs": "a folder of the host is no part of an epoch",
    "tpmdev": "its state lies outside QEMU",
    "spice": VIDEO,
    "audio": SOUND,
    "soundhw": SOUND,
    "semihosting": OUTSIDE,
    "semihosting-config": OUTSIDE,
    "gdb": TWICE,
    "s": TWICE,
    "qmp-pretty": TWICE,
    "mon": TWICE,
    "pidfile": TWICE,
    "xen-domid": "a Xen guest is not QEMU's own",
    "xen-attach": "a Xen guest is not QEMU's own",
    "xen-domid-restrict": "a Xen guest is not QEMU's own",
    "h": "it only prints",
    "help": "it only prints",
    "version": "it only prints",
    "audio-help": "it only prints",
}

# Devices, as shell patterns.
DEVICES = {
    "vfio-*": "a device of the host writes guest memory unseen, and its state can't be moved",
    "vhost-user-*": "another process writes guest memory unseen",
    "vhost-*": "its state lies outside QEMU",
    "virtio-mem*": "it takes memory away from the image",
    "virtio-pmem*": "its memory is not replicated",
    "pc-dimm": "memory that comes and goes is no part of the image",
    "nvdimm": "memory that comes and goes is no part of the image",
    "ivshmem*": "other processes write its memory unseen",
    "usb-host": "a device of the host can't be moved",
    "usb-redir": "a device elsewhere can't be moved",
    "u2f-passthru": "a device of the host can't be moved",
    "virtio-input-host*": "a device of the host can't be moved",
    "ccid-card-passthru": "a device elsewhere can't be moved",
    "scsi-generic": "a device of the host can't be moved",
    "scsi-block": "a device of the host can't be moved",
    "usb-mtp": "a folder of the host is no part of an epoch",
    **dict.fromkeys(
        (
            *("virtio-net*", "e1000*", "rtl8139", "ne2k_*", "pcnet", "vmxnet3", "i82[58]*", "igb", "tulip"),
            *("usb-net", "rocker", "sungem", "sunhme", "xen-net-device", "pvrdma", "lan9118", "dp8393x"),
        ),
        CARD,
    ),
    **dict.fromkeys(
        (
            *("AC97", "ES1370", "sb16", "adlib", "cs4231a", "gus", "intel-hda", "ich9-intel-hda", "hda-*"),
            *("usb-audio", "virtio-sound*"),
        ),
        SOUND,
    ),
    "tpm-*": "its state lies outside QEMU",
    "loader": HIDES,
    "VGA": VIDEO,
    "*-vga": VIDEO,
    "*-vga-*": VIDEO,
    "vga-*": VIDEO,
    "isa-vga": VIDEO,
    "qxl*": VIDEO,
    "virtio-gpu*": VIDEO,
    "bochs-display": VIDEO,
    "ramfb": VIDEO,
    "secondary-vga": VIDEO,
}

# Objects, as shell patterns.
OBJECTS = {
    "memory-backend-*": "guest memory is colocache's own, one backend and no other",
    "sev*-guest": "memory that is encrypted for one host can't be read",
    "tdx-guest": "memory that is encrypted for one host can't be read",
    "*-pv-guest": "memory that is encrypted for one host can't be read",
    "can-host-*": NETWORK,
    "input-linux": "a device of the host can't be moved",
    "dbus-vmstate": "its state lies outside QEMU",
    "filter-*": NETWORK,
    "colo-compare": NETWORK,
    "x-remote-object": "another process would be part of the machine",
    "x-vfio-user-server": "another process would be part of the machine",
}

# Keys of -machine.
MACHINE_KEYS = {
    "memory-backend": "guest memory is colocache's own",
    "confidential-guest-support": "memory that is encrypted for one host can't be read",
    "memory-encryption": "memory that is encrypted for one host can't be read",
    "suppress-vmdesc": OURS,
}


def match(table: dict[str, str], name: str) -> str | None:
    """Why `name` is refused, by the first pattern of `table` that it fits; None if by none."""
    return next((why for pattern, why in table.items() if fnmatchcase(name, pattern)), None)
