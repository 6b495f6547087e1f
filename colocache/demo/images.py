# SPDX-License-Identifier: Apache-2.0
"""The secondary's images of the demo's disks: they are there as long as the demo runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from colocache import scratch


@contextlib.contextmanager
def images_for(disks: Sequence[str]) -> Iterator[list[str]]:
    """A raw image for each disk, as --disk takes it, in a folder beside the first one: there is room for that one."""
    if not disks:
        yield []
        return
    from colocache.vmm.qemu.disk import disks_of
    from colocache.vmm.qemu.option_strings import escape

    specs = disks_of(disks)
    with scratch.folder("images", Path(specs[0].path).parent) as folder:
        made = []
        for number, spec in enumerate(specs):
            path = folder / f"disk{number}"
            path.touch(0o600)
            os.truncate(path, spec.size)
            made.append(f"{escape(str(path))},format=raw")
        yield made
