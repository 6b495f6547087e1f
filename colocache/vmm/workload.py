# SPDX-License-Identifier: Apache-2.0
"""What a guest is asked to do: the options a user gives, and the numbers its program and the oracle go by."""

from __future__ import annotations

from dataclasses import dataclass

from colocache.errors import ArgumentError

PAGE = 4096  # bytes; the tracking page, whatever the backing is
RUN_PAGES_MAX = 4096
SHARES = 1 << 16  # shares of steps are counted in these


@dataclass(frozen=True, kw_only=True)
class GuestOptions:
    """How busy a guest is. All of it holds on the primary; a secondary takes all but the rate from the device state.

    working_set_bytes   memory it writes, at random; 0 = an eighth of pc.ram; more than there is = all of pc.ram
    steps_per_second    0 = flat out
    run_pages           longest run of pages one step writes, 1 to 4096; 1 = no runs
    run_share           share of steps that write a run of 2 to run_pages pages, 0 to 1
    rewrite_share       share of steps that write a page with what it holds already, 0 to 1
    seed                for tests: salts that can be foretold. Two machines of a pair never get the same: they would
                        write the same pages, and a flush that forgets the secondary's writes would pass unseen.
    command             of a QEMU guest: the whole command line; none = a small guest that does the above
    accel               of that small guest: auto, kvm or tcg
    card                of a QEMU guest: the MAC address of its network card; none = it has no card
    net                 what that card is connected to: tap:NAME
    disks               of a QEMU guest: FILE[,format=qcow2] each; on a secondary's host the raw images
    disk_log            a secondary's folder for logs of disk writes and overlays; none = beside the first image
    console             where it is: a file, unix:PATH, or - for standard output and input; none = nowhere
    """

    working_set_bytes: int = 0
    steps_per_second: float = 20_000.0
    run_pages: int = 16
    run_share: float = 1 / 16
    rewrite_share: float = 1 / 16
    seed: int | None = None
    command: tuple[str, ...] = ()
    accel: str = "auto"
    console: str = ""
    card: str = ""
    net: str = ""
    disks: tuple[str, ...] = ()
    disk_log: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "disks", tuple(self.disks))
        object.__setattr__(self, "command", tuple(self.command))  # JSON has lists
        if self.working_set_bytes < 0:
            raise ArgumentError(f"a working set of {self.working_set_bytes} bytes: give 0 (an eighth of RAM) or more")
        if not 0 <= self.steps_per_second < 1e12:
            raise ArgumentError(f"{self.steps_per_second} steps per second: give 0 (flat out) to 1e12")
        if not 1 <= self.run_pages <= RUN_PAGES_MAX:
            raise ArgumentError(f"runs of {self.run_pages} pages: give 1 to {RUN_PAGES_MAX}")
        if not (0 <= self.run_share <= 1 and 0 <= self.rewrite_share <= 1 and self.run_share + self.rewrite_share <= 1):
            raise ArgumentError(
                f"shares of {self.run_share} runs and {self.rewrite_share} rewrites: each 0 to 1, together at most 1"
            )


@dataclass(frozen=True)
class Workload:
    """What the program needs to know besides salt and step. Pages are of pc.ram; the two bounds are of 65536."""

    first_page: int
    n_pages: int
    run_pages: int
    rewrite_below: int
    run_below: int

    def fits(self, ram_pages: int) -> bool:
        """Whether a program with these numbers stays inside a block of ram_pages pages."""
        return (
            self.n_pages >= 1
            and self.first_page + self.n_pages <= ram_pages
            and 1 <= self.run_pages <= RUN_PAGES_MAX
            and 0 <= self.rewrite_below <= self.run_below <= SHARES
        )


def workload_for(options: GuestOptions, ram_pages: int, split_page: int) -> Workload:
    """The working set lies across the split of pc.ram, so that both of its memory slots are written."""
    wanted = -(-options.working_set_bytes // PAGE) or max(1, ram_pages // 8)
    n_pages = min(wanted, ram_pages)
    first = min(max(0, split_page - n_pages // 2), ram_pages - n_pages)
    rewrite = round(options.rewrite_share * SHARES)
    runs = 0 if options.run_pages == 1 else round(options.run_share * SHARES)
    return Workload(first, n_pages, options.run_pages, rewrite, min(SHARES, rewrite + runs))
