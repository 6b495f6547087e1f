# SPDX-License-Identifier: Apache-2.0
"""Our options, added to the user's: guest memory, the conversation, the console, and what makes the device state fit.

Everything that a QEMU shares with us is a descriptor it inherits. There are no names that somebody else could open.
"""

from __future__ import annotations

from dataclasses import dataclass

from colocache.vmm.qemu.command_line import CONSOLE_ID, CommandLine
from colocache.vmm.qemu.option_strings import escape

RAM_ID = "colocache.ram"
QMP_ID = "colocache.qmp"
QUICK_ID = "colocache.quick"
CARD_ID = "colocache.card"


@dataclass(frozen=True)
class Wiring:
    """Descriptors, by their numbers in the QEMU that inherits them.

    image     the file of guest memory
    shared    True: QEMU's writes go to the image; False: to private copies of its own
    qmp       a connected stream socket
    quick     likewise, for the commands that a pause waits for
    console   likewise, or -1 for none
    card      a connected datagram socket, a packet in each datagram; used if the guest has a card
    incoming  whether this QEMU waits for a device state
    disks     options for the guest's disks
    """

    image: int
    shared: bool
    qmp: int
    quick: int
    console: int
    card: int
    incoming: bool
    disks: tuple[str, ...] = ()


def arguments(line: CommandLine, wiring: Wiring) -> list[str]:
    """The whole command, for exec."""
    backend = (
        f"memory-backend-file,id={RAM_ID},size={line.ram_bytes}B,mem-path={escape(fd_path(wiring.image))},"
        f"share={'on' if wiring.shared else 'off'}"
    )
    words = [line.program, *line.args]
    words += ["-object", backend]
    # No description of the format after the state, and no section about the configuration before it: a state that is
    # saved without RAM has neither, and the loader would wait for them.
    words += ["-machine", f"memory-backend={RAM_ID},suppress-vmdesc=on"]
    words += ["-global", "migration.send-configuration=off"]
    words += ["-only-migratable"]  # saving a device that can't be saved is a segmentation fault of the primary
    words += ["-no-shutdown", "-S"]
    words += ["-no-user-config", "-display", "none", "-vga", "none", "-nic", "none", "-monitor", "none"]
    for name, fd in (QMP_ID, wiring.qmp), (QUICK_ID, wiring.quick):
        words += ["-chardev", f"socket,id={name},fd={fd}", "-mon", f"chardev={name},mode=control"]
    has_console = wiring.console >= 0 and (line.console or not line.serial)
    if has_console:
        words += ["-chardev", f"socket,id={CONSOLE_ID},fd={wiring.console}"]
    elif not line.serial:
        words += ["-chardev", f"null,id={CONSOLE_ID}"]
    words += ["-serial", f"chardev:{CONSOLE_ID}" if has_console and line.serial else "none"]
    if line.card:
        # The guest is offered no offloads there: a packet is no longer than the MTU, and goes whole or not at all.
        words += ["-netdev", f"dgram,id={CARD_ID},local.type=fd,local.str={wiring.card}"]
        words += ["-device", f"virtio-net-pci,netdev={CARD_ID},mac={line.card},romfile="]
    words += wiring.disks
    if wiring.incoming:
        words += ["-incoming", "defer"]
    return words


def fd_path(fd: int) -> str:
    """The path under which a process opens its own descriptor anew."""
    return f"/proc/self/fd/{fd}"
