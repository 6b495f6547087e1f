# SPDX-License-Identifier: Apache-2.0
"""A user's QEMU command line: what it asks for, what colocache gives itself, and what is refused before a start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from colocache.errors import ArgumentError
from colocache.vmm.errors import MachineError
from colocache.vmm.qemu import refusals
from colocache.vmm.qemu.disk import DiskSpec
from colocache.vmm.qemu.option_strings import is_on, parse, size_bytes
from colocache.vmm.qemu.read_only import ReadOnlyDisk
from colocache.vmm.qemu.refusals import DISK, NETWORK, OURS, TWICE, VIDEO
from colocache.vmm.workload import PAGE

DEFAULT_RAM = 128 << 20  # bytes, of QEMU's PC machines
RAM_UNIT = 8192  # QEMU rounds -m up to it
CONSOLE_ID = "colocache.console"  # the chardev that is colocache's end of the console
STDIO = ("stdio", "mon:stdio", "vc", "mon:vc")  # where a console would be seen: colocache shows it instead

# Options without a value; all others have one.
SWITCHES = {
    *("h", "help", "version", "audio-help", "mem-prealloc", "snapshot", "usb", "nographic", "portrait", "full-screen"),
    *("win2k-hack", "no-fd-bootchk", "no-acpi", "no-hpet", "singlestep", "preconfig", "S", "s", "enable-kvm"),
    *("xen-attach", "xen-domid-restrict", "no-reboot", "no-shutdown", "daemonize", "only-migratable", "nodefaults"),
    "semihosting",
    *("no-user-config", "async-teardown", "enable-sync-profile", "nouserconfig", "enable-fips", "no-quit"),
}


class CommandLineError(MachineError, ArgumentError):
    """The command line asks for what can't work in a pair."""


@dataclass
class CommandLine:
    """A command line that can work. `args` are the user's, without those that colocache gives itself.

    ram_bytes   guest memory
    console     whether colocache shows the guest's console; False: the user wanted none
    serial      whether that is the first serial port; False: the user's own device has our CONSOLE_ID as its chardev
    files       files it names that both hosts need alike: kernel, initrd, firmware (option, path)
    read_only   disks it names that nobody writes, which both hosts need alike
    card        MAC address of the network card that colocache adds; "" for none
    descriptors what the process must inherit besides our own: files that are named by /proc/self/fd/N
    disks       those that colocache adds
    disk_folder where a secondary's overlays lie; "" = beside the first image
    """

    program: str
    args: list[str] = field(default_factory=list)
    ram_bytes: int = DEFAULT_RAM
    console: bool = True
    serial: bool = True
    card: str = ""
    files: list[tuple[str, str]] = field(default_factory=list)
    read_only: list[ReadOnlyDisk] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    disks: tuple[DiskSpec, ...] = ()
    disk_folder: str = ""

    @property
    def n_pages(self) -> int:
        return self.ram_bytes // PAGE


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Take a command line apart; CommandLineError, with the option's name and the reason, if it can't work."""
    if not argv:
        raise CommandLineError(
            "there is no QEMU command line", hint="give one after `--`, as in `-- qemu-system-x86_64 -m 512`"
        )
    if shutil.which(argv[0]) is None:
        raise CommandLineError(
            f"there is no program {argv[0]}", hint="on Debian or Ubuntu: `apt install qemu-system-x86`"
        )
    line = CommandLine(program=argv[0])
    for name, value in options_of(argv[1:]):
        why = refusals.OPTIONS.get(name)
        if why is not None:
            raise CommandLineError(f"-{name} can't be used in a pair: {why}")
        reader = READERS.get(name)
        if reader is None:
            line.args += [f"-{name}"] if value is None else [f"-{name}", value]
        else:
            try:
                reader(line, name, value or "")
            except CommandLineError:
                raise
            except ArgumentError as error:
                raise CommandLineError(f"-{name} {value}: {error}") from error
    if line.ram_bytes <= 0:
        raise CommandLineError("-m 0: a guest without memory has nothing to replicate")
    return line


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name without dashes, value or None) of each option. A bare word is a disk to QEMU, and refused."""
    rest = iter(args)
    for word in rest:
        name = word[2:] if word.startswith("--") else word[1:]
        if not word.startswith("-") or not name:
            raise CommandLineError(f"{word!r} stands for a disk: {DISK}")
        if name in SWITCHES:
            yield name, None
            continue
        value = next(rest, None)
        if value is None:
            raise CommandLineError(f"{word} is the last word and needs a value")
        yield name, value


# ---- readers: one per option that matters here -----------------------------------------------------------------------


def _refuse(what: str, why: str | None) -> None:
    if why is not None:
        raise CommandLineError(f"{what} can't be used in a pair: {why}")


def _pairs(value: str, implied: str | None) -> dict[str, str]:
    """An option string, or the JSON object that newer QEMUs take in its place."""
    if not value.startswith("{"):
        return parse(value, implied)
    try:
        decoded = json.loads(value)
    except ValueError as error:
        raise ArgumentError(f"is no JSON: {error}") from error
    return {str(key): json.dumps(item) if not isinstance(item, str) else item for key, item in decoded.items()}


def _keep(line: CommandLine, name: str, value: str) -> None:
    line.args += [f"-{name}", value]


def _drop(_line: CommandLine, _name: str, _value: str) -> None:
    """colocache gives it itself, or does its work."""


def _memory(line: CommandLine, name: str, value: str) -> None:
    pairs = parse(value, "size")
    for key in ("slots", "maxmem"):
        if key in pairs:
            raise CommandLineError(f"-m {key}= can't be used in a pair: memory that comes and goes is not replicated")
    if "size" in pairs:
        line.ram_bytes = -(-size_bytes(pairs["size"], "M") // RAM_UNIT) * RAM_UNIT
    _keep(line, name, value)


def _machine(line: CommandLine, name: str, value: str) -> None:
    pairs = parse(value, "type")
    for key in pairs:
        _refuse(f"-machine {key}=", refusals.MACHINE_KEYS.get(key))
    if is_on(pairs.get("nvdimm", "off")):
        _refuse("-machine nvdimm=on", refusals.DEVICES["nvdimm"])
    _keep(line, "machine" if name == "M" else name, value)


def _device(line: CommandLine, name: str, value: str) -> None:
    pairs = _pairs(value, "driver")
    driver = pairs.get("driver", "")
    _refuse(f"-device {driver}", refusals.match(refusals.DEVICES, driver))
    if is_on(pairs.get("removable", "off").strip('"')):
        _refuse(f"-device {driver},removable=on", refusals.REMOVABLE)
    if is_on(pairs.get("vhost", "off").strip('"')):
        _refuse(f"-device {driver},vhost=on", refusals.VHOST)
    if pairs.get("chardev") == CONSOLE_ID:
        if not line.serial:
            _refuse(f"-device {driver},chardev={CONSOLE_ID}", "another device of this line is the console already")
        line.serial = False
    _keep(line, name, value)


def _object(line: CommandLine, name: str, value: str) -> None:
    kind = _pairs(value, "qom-type").get("qom-type", "")
    _refuse(f"-object {kind}", refusals.match(refusals.OBJECTS, kind))
    _keep(line, name, value)


def _drive(line: CommandLine, name: str, value: str) -> None:
    pairs = _pairs(value, None)
    switches = (pairs.get("readonly"), pairs.get("read-only"))
    if pairs.get("media") != "cdrom" and not any(switch and is_on(switch) for switch in switches):
        _refuse(f"-{name} {value}", DISK)
    if pairs.get("if") == "floppy":
        _refuse(f"-{name} {value}", refusals.REMOVABLE)
    if is_on(pairs.get("snapshot", "off")):
        _refuse(f"-{name} snapshot=on", refusals.SNAPSHOT)
    line.read_only.append(ReadOnlyDisk.of(pairs, len(line.read_only)))
    _keep(line, name, value)


def _cdrom(line: CommandLine, name: str, value: str) -> None:
    line.read_only.append(ReadOnlyDisk("cdrom", value))
    _keep(line, name, value)


def _network(_line: CommandLine, name: str, value: str) -> None:
    if any(is_on(_pairs(value, "type").get(key, "off")) for key in ("vhost", "vhostforce")):
        _refuse(f"-{name} {value}", refusals.VHOST)
    if value != "none":
        _refuse(f"-{name} {value}", NETWORK)


def _display(_line: CommandLine, name: str, value: str) -> None:
    if value != "none":
        _refuse(f"-{name} {value}", VIDEO)


def _serial(line: CommandLine, name: str, value: str) -> None:
    if value in STDIO:
        line.console = True
    elif value in ("none", "null"):
        line.console = False
    else:
        _refuse(f"-{name} {value}", f"{TWICE}; colocache shows the console and writes it to a file itself")


def _audio(line: CommandLine, name: str, value: str) -> None:
    if _pairs(value, "driver").get("driver") != "none":
        _refuse(f"-{name} {value}", refusals.SOUND)
    _keep(line, name, value)


def _monitor(_line: CommandLine, name: str, value: str) -> None:
    if value not in (*STDIO, "none", "null"):
        _refuse(f"-{name} {value}", TWICE)


def _chardev(line: CommandLine, name: str, value: str) -> None:
    if _pairs(value, "backend").get("backend") not in ("null", "vc", "ringbuf", "memory"):
        _refuse(f"-{name} {value}", TWICE)
    _keep(line, name, value)


def _only_null(line: CommandLine, name: str, value: str) -> None:
    if value not in ("none", "null"):
        _refuse(f"-{name} {value}", TWICE)
    _keep(line, name, value)


def _overcommit(line: CommandLine, name: str, value: str) -> None:
    if is_on(parse(value).get("mem-lock", "off")):
        _refuse("-overcommit mem-lock=on", refusals.LOCKS)
    _keep(line, name, value)


def _numa(line: CommandLine, name: str, value: str) -> None:
    if "memdev" in parse(value, "type"):
        _refuse("-numa memdev=", refusals.OBJECTS["memory-backend-*"])
    _keep(line, name, value)


def _global(line: CommandLine, name: str, value: str) -> None:
    pairs = parse(value)
    if pairs.get("driver") == "migration" or value.startswith("migration."):
        _refuse(f"-global {value}", OURS)
    _keep(line, name, value)


def _action(line: CommandLine, name: str, value: str) -> None:
    if "shutdown" in parse(value):
        _refuse("-action shutdown=", f"{OURS}: the pair must see a guest that powers off")
    _keep(line, name, value)


def _accel(line: CommandLine, name: str, value: str) -> None:
    kind = parse(value, "accel").get("accel", "")
    if kind not in ("kvm", "tcg"):
        raise CommandLineError(f"-accel {kind} can't be used in a pair: only kvm and tcg are known to work")
    _keep(line, name, value)


def _file(line: CommandLine, name: str, value: str) -> None:
    line.files.append((name, value))
    _keep(line, name, value)


READERS: dict[str, Callable[[CommandLine, str, str], None]] = {
    "m": _memory,
    "machine": _machine,
    "M": _machine,
    "device": _device,
    "object": _object,
    "drive": _drive,
    "blockdev": _drive,
    "cdrom": _cdrom,
    "audiodev": _audio,
    "netdev": _network,
    "nic": _network,
    "net": _network,
    "display": _display,
    "vnc": _display,
    "vga": _display,
    "serial": _serial,
    "monitor": _monitor,
    "qmp": _monitor,
    "chardev": _chardev,
    "parallel": _only_null,
    "debugcon": _only_null,
    "overcommit": _overcommit,
    "numa": _numa,
    "global": _global,
    "action": _action,
    "accel": _accel,
    "kernel": _file,
    "initrd": _file,
    "bios": _file,
    "dtb": _file,
    "option-rom": _file,
    "nographic": _drop,
    "no-shutdown": _drop,
    "only-migratable": _drop,
}
