# SPDX-License-Identifier: Apache-2.0
"""A VMM written in C, linked to the installed library through pkg-config, as secondary of the Python primary.

The C machine runs a real vCPU on its own guest RAM between checkpoints, so it drifts from the primary; it compares
every page with the primary's hashes after each flush, and with the guest's own history at the takeover and after it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from c_tools import build_vmm, run, tool
from vmm_support import needs_kvm

RAM_PAGES = 4096
CHECKPOINTS = 6
LIMIT = 60.0  # seconds; none of it decides a test, all of it ends one that hangs


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process with its stdout in a pipe; killed at the end if it still runs."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_pair(
    vmm: Path, socket: Path, *, kill_at: int, moment: str = "running", memory: str = "mirror"
) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, events and stderr of the C secondary; its primary is killed by SIGKILL.

    moment: "running", from outside after checkpoint number kill_at; "receiving", when half of its pages have been sent;
    "sealed", when the secondary has said RECEIVED.
    """
    primary_command = [
        sys.executable, "-m", "colocache", "primary", "--connect", f"unix:{socket}", "--guest", "kvm",
        "--backing", "shm", "--ram", f"{RAM_PAGES * 4}K", "--interval", "0.1", "--working-set", "8M",
        "--verify", "all", "--events",
        "--reconnect-limit", "0.1", "--run-on", "0.1", "--peer-timeout", "10",
    ]  # fmt: skip
    if moment != "running":
        primary_command += ["--die-at", moment, "--die-at-checkpoint", str(kill_at)]
    with started([str(vmm), str(socket), *(["bounded"] if memory == "bounded" else [])]) as secondary:
        assert secondary.stdout is not None
        first = secondary.stdout.readline()
        assert json.loads(first)["event"] == "listening", first
        with started(primary_command) as primary:
            assert primary.stdout is not None
            n = 0
            for line in primary.stdout:
                n += json.loads(line)["event"] == "checkpoint"
                if n == kill_at:
                    break
            primary.send_signal(signal.SIGKILL)  # if it ended by itself, the secondary's status and events say why
            out, err = secondary.communicate(timeout=LIMIT)
    return secondary.returncode, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="module")
def sources() -> Path:
    root = Path(__file__).resolve().parent.parent
    if not (root / "colocache" / "vmm" / "guest_program.c").is_file():
        pytest.skip("these tests are not in a source tree")
    return root


@pytest.fixture(scope="module")
def vmm(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vmm(sources, "vmm_secondary", tmp_path_factory.mktemp("vmm"))


@pytest.mark.kvm
@needs_kvm
@pytest.mark.parametrize("memory", ["mirror", "bounded"])
@pytest.mark.parametrize("moment", ["running", "receiving", "sealed"])
def test_c_vmm_takes_over_from_a_killed_primary_with_no_page_wrong(
    vmm: Path, tmp_path: Path, moment: str, memory: str
) -> None:
    status, events, err = run_pair(vmm, tmp_path / "s", kill_at=CHECKPOINTS, moment=moment, memory=memory)
    *checkpoints, end = events
    assert (status, end["event"], end["wrong_pages"]) == (0, "takeover", 0), (events, err)
    whole = CHECKPOINTS - (moment == "receiving")  # an epoch that came by half is none; a sealed one is finished
    assert len(checkpoints) == end["checkpoints"] >= whole
    assert moment == "running" or len(checkpoints) == whole
    assert end["epoch"] == checkpoints[-1]["epoch"]
    # Every page at every checkpoint, twice more at the end: nothing was skipped.
    assert {event["verified_pages"] for event in checkpoints} == {RAM_PAGES}
    assert end["verified_pages"] == RAM_PAGES * (len(checkpoints) + 2)
    assert end["ran_on_steps"] > 0
    # It drifted: in each epoch after the first its own guest had written pages.
    own = [event["svm_pages"] + event["both_pages"] for event in checkpoints[1:]]
    assert not any(own) if memory == "bounded" else all(own), "what it writes is private there, and in no bitmap"


# What a VMM may forget -> the line in which it does.  Each must be found out by the pages.
FORGOTTEN = {
    "the dirty log": ("rc = colocache_sync_dirty_log(vmm->cache, vmm->log);", "rc = 0;"),
    "the flush": ("rc = colocache_flush(vmm->cache, &flushed);", "rc = 0;"),
    "mark_dirty": (
        "(void)colocache_mark_dirty(vmm->cache, block, first_pfn, n_pages);",
        "(void)vmm, (void)block, (void)first_pfn, (void)n_pages;",
    ),
}


@pytest.mark.kvm
@needs_kvm
@pytest.mark.parametrize(("what", "memory"), [*((what, "mirror") for what in FORGOTTEN), ("the flush", "bounded")])
def test_a_vmm_that_forgets_its_part_is_found_out(sources: Path, tmp_path: Path, what: str, memory: str) -> None:
    """The check above can fail: without one of the caller's obligations it does not come out clean."""
    text = (sources / "tests" / "c" / "vmm_secondary.c").read_text()
    right, wrong = FORGOTTEN[what]
    assert text.count(right) == 1
    source = tmp_path / "forgetful.c"
    source.write_text(text.replace(right, wrong))
    forgetful = build_vmm(sources, "vmm_secondary", tmp_path, source=source)
    status, events, _ = run_pair(forgetful, tmp_path / "s", kill_at=CHECKPOINTS, memory=memory)
    assert status != 0
    assert not events or events[-1]["event"] != "takeover" or events[-1]["wrong_pages"] > 0, events


@pytest.mark.kvm
@needs_kvm
def test_dirty_rings_lose_no_page(sources: Path, tmp_path: Path) -> None:
    """A vCPU whose ring is smaller than what it writes: every page it wrote is in the SVM bitmap, each once."""
    made = build_vmm(sources, "vmm_ring", tmp_path)
    done = subprocess.run([made], capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode == 77:
        pytest.skip(f"no dirty rings here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizer", ["none", "thread", "address,undefined"])
def test_both_halves_with_every_thread_that_the_header_allows(sources: Path, tmp_path: Path, sanitizer: str) -> None:
    """Two connections, and bystanders that call what may be called at any time: no page differs, nothing races."""
    made = tmp_path / "vmm_pair"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-I", sources / "csrc" / "include", "-pthread"]
    if sanitizer != "none":
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        probe = tmp_path / "probe.c"
        probe.write_text("int main(void) { return 0; }\n")
        built = subprocess.run([tool("cc"), *flags, probe, "-o", tmp_path / "probe"], capture_output=True, check=False)
        if built.returncode:
            pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    run([tool("cc"), *flags, *sorted(sources.glob("csrc/*.c")), sources / "tests" / "c" / "vmm_pair.c", "-o", made])
    done = subprocess.run([made], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
