# SPDX-License-Identifier: Apache-2.0
"""Orders about disks to a QEMU that runs: mirror them, say how that is, stop it, fold an overlay into its image."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import Any

from colocache.vmm.qemu.disk import image_of, node_of
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.process import QemuProcess

END_SECONDS = 10.0  # of a job that was cancelled
LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class MirrorState:
    """How a mirror is: `trouble` if it has failed, `ready` once all has been copied; bytes done and in all so far."""

    ready: bool
    trouble: str = ""
    done: int = 0
    total: int = 0


def _job(disk: int) -> str:
    return f"colocache.mirror{disk}"


def _target(disk: int) -> str:
    return f"colocache.export{disk}"


def begin(process: QemuProcess, disk: int, export: socket.socket, speed: int = 0) -> None:
    """Copy all of the disk to `export`, the end of a connection with an NBD server, `speed` bytes in a second (0 = as
    fast as it goes), and every write from now on before the guest hears that it is done."""
    name = _target(disk)
    process.qmp.give(export.fileno(), name)
    try:
        process.qmp.execute("blockdev-add", driver="nbd", node_name=name, server={"type": "fd", "str": name})
    except QemuError:
        with contextlib.suppress(QemuError):  # most failures have taken it
            process.qmp.execute("closefd", fdname=name)
        raise
    try:
        process.qmp.execute(
            "blockdev-mirror",
            job_id=_job(disk),
            device=node_of(disk),
            target=_target(disk),
            sync="full",
            copy_mode="write-blocking",
            on_target_error="report",
            auto_dismiss=False,
            speed=speed,
        )
    except QemuError:
        process.qmp.execute("blockdev-del", node_name=_target(disk))
        raise


def _jobs(process: QemuProcess) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in process.qmp.execute("query-jobs")}


def states(process: QemuProcess, n_disks: int) -> list[MirrorState]:
    """How the mirror of each disk is."""
    jobs = _jobs(process)
    return [_state(jobs.get(_job(disk))) for disk in range(n_disks)]


def _state(job: dict[str, Any] | None) -> MirrorState:
    if job is None:
        return MirrorState(False, "there is no mirror job")
    if "error" in job or job["status"] in ("concluded", "aborting", "null"):
        return MirrorState(False, str(job.get("error", f"its mirror job is {job['status']}")))
    return MirrorState(job["status"] == "ready", "", job["current-progress"], job["total-progress"])


def end(process: QemuProcess, n_disks: int) -> None:
    """Mirror no more: what is under way is given up. Nothing to do if none is mirrored."""
    mine = {_job(disk): disk for disk in range(n_disks)}
    until = time.monotonic() + END_SECONDS
    cancelled: set[str] = set()
    while here := [job for job in _jobs(process).values() if job["id"] in mine]:
        if time.monotonic() > until:
            raise QemuError(f"QEMU (process {process.pid}) did not end its mirror jobs within {END_SECONDS:g} s")
        for job in here:
            if job["status"] == "concluded":
                process.qmp.execute("job-dismiss", id=job["id"])
                process.qmp.execute("blockdev-del", node_name=_target(mine[job["id"]]))
            elif job["id"] not in cancelled:
                cancelled.add(job["id"])
                process.qmp.execute("job-cancel", id=job["id"])
        time.sleep(LOOK_SECONDS)


def serve(process: QemuProcess, n_disks: int, path: str) -> None:
    """Serve the disks for reading at `path`, each under the name of its node; with "" no longer."""
    if not path:
        process.qmp.execute("nbd-server-stop")
        return
    address = {"type": "unix", "data": {"path": path}}
    process.qmp.execute("nbd-server-start", addr=address, max_connections=n_disks)
    for disk in range(n_disks):
        node = node_of(disk)
        process.qmp.execute("block-export-add", type="nbd", id=f"colocache.read{disk}", node_name=node, name=node)


# ---- after a takeover ----


def _fold_job(disk: int) -> str:
    return f"colocache.fold{disk}"


def begin_fold(process: QemuProcess, disk: int) -> None:
    """What the overlay holds goes into the image below, while the guest runs."""
    process.qmp.execute(
        "block-commit", job_id=_fold_job(disk), device=node_of(disk), base_node=image_of(disk), auto_dismiss=False
    )


def fold_step(process: QemuProcess, disk: int) -> bool:
    """Look after it: True when the guest runs on the image alone. QemuError: it failed, and the overlay stays."""
    job = _jobs(process).get(_fold_job(disk))
    if job is None:
        return True
    if job["status"] == "ready":
        process.qmp.execute("job-complete", id=_fold_job(disk))
    elif job["status"] == "concluded":
        process.qmp.execute("job-dismiss", id=_fold_job(disk))
        if "error" in job:
            raise QemuError(f"the overlay of disk {disk} could not be folded into its image: {job['error']}")
        return True
    return False
