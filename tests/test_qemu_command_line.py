# SPDX-License-Identifier: Apache-2.0
"""A user's QEMU command line: what is read from it, what is left out, and what is refused by name before a start."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qemu_support import QEMU, needs_qemu

from colocache.errors import ArgumentError
from colocache.vmm.qemu import command_line, refusals
from colocache.vmm.qemu.command_line import CommandLineError, read_command_line
from colocache.vmm.qemu.option_strings import escape, parse, size_bytes
from colocache.vmm.qemu.wiring import Wiring, arguments

pytestmark = needs_qemu  # a command line begins with a program that exists

REFUSED = [
    (["-mem-path", "/x"], "-mem-path"),
    (["-object", "memory-backend-ram,id=m,size=1G"], "-object memory-backend-ram"),
    (["-object", '{"qom-type":"memory-backend-file","id":"m"}'], "-object memory-backend-file"),
    (["-machine", "pc,memory-backend=m"], "-machine memory-backend="),
    (["-M", "q35,confidential-guest-support=s"], "-machine confidential-guest-support="),
    (["-M", "pc,nvdimm=on"], "-machine nvdimm=on"),
    (["-m", "512,slots=2,maxmem=2G"], "-m slots="),
    (["-m", "size=1G,maxmem=2G"], "-m maxmem="),
    (["-numa", "node,memdev=m"], "-numa memdev="),
    (["-overcommit", "mem-lock=on"], "-overcommit mem-lock=on"),
    (["-device", "vfio-pci,host=01:00.0"], "-device vfio-pci"),
    (["-device", "driver=vfio-pci,host=01:00.0"], "-device vfio-pci"),
    (["-device", '{"driver":"vhost-user-fs-pci"}'], "-device vhost-user-fs-pci"),
    (["-device", "virtio-mem-pci,memdev=m"], "-device virtio-mem-pci"),
    (["-device", "pc-dimm,memdev=m"], "-device pc-dimm"),
    (["-device", "virtio-vga"], "-device virtio-vga"),
    (["-device", "VGA"], "-device VGA"),
    (["-device", "virtio-net-pci"], "-device virtio-net-pci"),
    (["-device", "virtio-net-pci,vhost=on"], "-device virtio-net-pci"),
    (["-device", "e1000e,netdev=colocache.card"], "-device e1000e"),
    (["-device", "i82559er"], "-device i82559er"),
    (["-device", '{"driver":"rtl8139"}'], "-device rtl8139"),
    (["-netdev", "tap,id=n,vhost=on"], "the host's kernel would write guest memory unseen"),
    (["-netdev", '{"type":"tap","id":"n","vhost":true}'], "the host's kernel would write guest memory unseen"),
    (["-netdev", "user,id=n"], "`--net tap:NAME`"),
    (["-device", "virtio-input-host-pci,evdev=/dev/input/event0"], "-device virtio-input-host-pci"),
    (["-object", "can-host-socketcan,id=c"], "-object can-host-socketcan"),
    (["-audiodev", "pa,id=a"], "-audiodev pa,id=a"),
    (["-device", "intel-hda"], "-device intel-hda"),
    (["-semihosting"], "-semihosting"),
    (["-daemonize"], "-daemonize"),
    (["--daemonize"], "-daemonize"),
    (["-snapshot"], "-snapshot"),
    (["-S"], "-S"),
    (["-incoming", "defer"], "-incoming"),
    (["-runas", "nobody"], "-runas"),
    (["-async-teardown"], "-async-teardown"),
    (["-readconfig", "f"], "-readconfig"),
    (["-hda", "disk.qcow2"], "-hda"),
    (["-fda", "x"], "a medium that comes and goes"),
    (["-drive", "if=floppy,file=x,readonly=on"], "a medium that comes and goes"),
    (["-device", "usb-storage,drive=d,removable=on"], "a medium that comes and goes"),
    (["-snapshot"], "a snapshot under way"),
    (["-drive", "file=x,readonly=on,snapshot=on"], "a snapshot under way"),
    (["disk.qcow2"], "'disk.qcow2'"),
    (["-drive", "file=d.raw,format=raw"], "-drive file=d.raw,format=raw"),
    (["-blockdev", "driver=file,filename=d,node-name=d"], "-blockdev"),
    (["-netdev", "user,id=n,hostfwd=tcp::22-:22"], "-netdev user"),
    (["-nic", "tap"], "-nic tap"),
    (["-serial", "tcp::4444,server"], "-serial tcp::4444,server"),
    (["-chardev", "socket,id=c,path=/x"], "-chardev socket"),
    (["-monitor", "unix:/x,server"], "-monitor unix:/x,server"),
    (["-qmp", "unix:/x,server"], "-qmp unix:/x,server"),
    (["-display", "gtk"], "-display gtk"),
    (["-vnc", ":0"], "-vnc :0"),
    (["-vga", "std"], "-vga std"),
    (["-global", "migration.send-configuration=on"], "-global migration"),
    (["-action", "shutdown=poweroff"], "-action shutdown="),
    (["-accel", "xen"], "-accel xen"),
    (["-kernel"], "-kernel is the last word"),
]


@pytest.mark.parametrize(("words", "name"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_work_is_refused_by_name_before_anything_starts(words: list[str], name: str) -> None:
    with pytest.raises(CommandLineError) as refused:
        read_command_line([QEMU, "-m", "64", *words])
    assert name in str(refused.value)


def test_every_option_that_is_refused_is_one_that_the_reader_can_take_apart() -> None:
    """A refusal nobody can reach, because the option's value would be taken for the next option, refuses nothing."""
    for name in refusals.OPTIONS:
        words = [f"-{name}"] if name in command_line.SWITCHES else [f"-{name}", "value"]
        with pytest.raises(CommandLineError, match=f"^-{name} can't be used in a pair: "):
            read_command_line([QEMU, *words])


@pytest.mark.parametrize(
    ("words", "ram_bytes"),
    [
        ([], 128 << 20),
        (["-m", "512"], 512 << 20),
        (["-m", "1.5G"], 3 << 29),
        (["-m", "size=70000K"], 70000 << 10),
        (["-m", "4097B"], 8192),  # QEMU rounds up too
        (["-m", "64", "-m", "96"], 96 << 20),
    ],
)
def test_guest_memory_is_what_qemu_would_take(words: list[str], ram_bytes: int) -> None:
    assert read_command_line([QEMU, *words]).ram_bytes == ram_bytes


def test_what_is_not_known_is_passed_on_as_it_is() -> None:
    words = ["-smp", "2", "-cpu", "qemu64,+aes", "-uuid", "a,,b", "-rtc", "base=utc", "-device", "virtio-rng-pci"]
    assert read_command_line([QEMU, *words]).args == words


def test_the_console_is_ours_and_the_options_for_it_are_left_out() -> None:
    line = read_command_line([QEMU, "-nographic", "-serial", "mon:stdio", "-monitor", "stdio", "-display", "none"])
    assert line.console
    assert line.args == []
    assert not read_command_line([QEMU, "-serial", "none"]).console


def test_the_console_may_be_a_device_of_the_users_that_names_our_end() -> None:
    words = ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=colocache.console"]
    for more in ([], ["-serial", "none"]):
        line = read_command_line([QEMU, *words, *more])
        wired = arguments(line, Wiring(image=7, shared=True, qmp=8, quick=12, console=11, card=10, incoming=False))
        assert "socket,id=colocache.console,fd=11" in wired
        assert wired[wired.index("-serial") + 1] == "none", "one console, and one device that has it"
    with pytest.raises(CommandLineError, match="is the console already"):
        read_command_line([QEMU, *words, "-device", "isa-serial,chardev=colocache.console"])


def test_files_that_both_hosts_need_are_listed() -> None:
    line = read_command_line([QEMU, "-kernel", "k", "-initrd", "i", "-bios", "b"])
    assert line.files == [("kernel", "k"), ("initrd", "i"), ("bios", "b")]


def test_a_read_only_disk_is_allowed() -> None:
    words = ["-drive", "file=d,format=raw,readonly=on", "-cdrom", "c.iso"]
    assert read_command_line([QEMU, *words]).args == words


def test_a_card_is_added_only_if_it_was_asked_for() -> None:
    line = read_command_line([QEMU, "-m", "64"])
    wiring = Wiring(image=7, shared=False, qmp=8, quick=11, console=9, card=10, incoming=False)
    assert "netdev" not in " ".join(arguments(line, wiring))
    line.card = "52:54:00:01:02:03"
    words = " ".join(arguments(line, wiring))
    assert "-netdev dgram,id=colocache.card,local.type=fd,local.str=10" in words
    assert "mac=52:54:00:01:02:03" in words


def test_our_options_come_after_the_users_so_that_they_win() -> None:
    line = read_command_line([QEMU, "-m", "64", "-machine", "pc"])
    words = arguments(line, Wiring(image=7, shared=False, qmp=8, quick=11, console=9, card=10, incoming=True))
    assert words[: 1 + len(line.args)] == [QEMU, *line.args]
    ours = " ".join(words[1 + len(line.args) :])
    for needed in (
        f"size={64 << 20}B,mem-path=/proc/self/fd/7,share=off",
        "suppress-vmdesc=on",
        "migration.send-configuration=off",
        "-only-migratable",
        "-no-shutdown",
        "-S",
        "-incoming defer",
    ):
        assert needed in ours


def test_a_program_that_is_not_there_is_said_with_the_command_that_helps() -> None:
    with pytest.raises(CommandLineError, match="apt install qemu-system-x86"):
        read_command_line(["qemu-system-vax"])
    with pytest.raises(CommandLineError, match="no QEMU command line"):
        read_command_line([])


@given(st.dictionaries(st.from_regex(r"[a-z][a-z.-]{0,8}", fullmatch=True), st.text("ab=,.:/ ", max_size=8)))
def test_option_strings_come_back_as_they_were_written(pairs: dict[str, str]) -> None:
    text = ",".join(f"{key}={escape(value)}" for key, value in pairs.items())
    assert parse(text) == ({} if not text else pairs)


@given(st.text(max_size=20))
def test_no_text_breaks_the_reading_of_a_size(text: str) -> None:
    with suppress(ArgumentError):
        assert 0 <= size_bytes(text) < 1 << 63


@given(
    st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["-m", "-device", "-object", "{", "-drive", "-serial"])))
)
def test_no_words_break_the_reading_of_a_command_line(words: list[str]) -> None:
    with suppress(CommandLineError):
        assert read_command_line([QEMU, *words]).ram_bytes > 0
