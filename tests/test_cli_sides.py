# SPDX-License-Identifier: Apache-2.0
"""Primary, secondary and its keeper as real processes: lost and found, signals, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_sides import RAM, Sides, wrong_pages
from click.testing import CliRunner

import colocache
from colocache.children import python_command
from colocache.cli import cli
from colocache.demo.tally import Tally


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


# ---- the two sides ----


def test_a_pair_ends_in_order_with_status_0(sides: Sides) -> None:
    secondary = sides.secondary()
    primary = sides.primary("--checkpoints", "5")
    assert primary.end()[0] == 0
    assert secondary.end()[0] == 0
    assert len([event for event in secondary.events if event["event"] == "checkpoint"]) == 5
    assert wrong_pages(primary, secondary) == 0


def test_json_is_the_last_line_of_stdout_and_words_go_to_stderr(tmp_path: Path) -> None:
    meeting = f"unix:{tmp_path}/s"
    listening = python_command("colocache.cli", "main", "secondary", *RAM, "--listen", meeting, "--json")
    sending = python_command(
        "colocache.cli", "main", "primary", *RAM, "--connect", meeting, "--checkpoints", "2", "--json"
    )
    with subprocess.Popen(listening, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as secondary:
        primary = subprocess.run(sending, capture_output=True, text=True, timeout=60, check=False)
        out, errors = secondary.communicate(timeout=60)
    for said, words in ((primary.stdout, primary.stderr), (out, errors)):
        assert len(said.splitlines()) == 1
        report = json.loads(said)
        assert (report["checkpoints"], report["wrong_pages"]) == (2, 0)
        assert "epoch 2" in words


def test_a_stopped_primary_is_noticed_and_replaced_and_stands_still_when_it_wakes(sides: Sides) -> None:
    """SIGSTOP: the connection stays, nothing comes."""
    secondary = sides.secondary("--peer-timeout", "0.5", "--reconnect-limit", "0.1", "--run-on", "3")
    primary = sides.primary("--peer-timeout", "0.5")
    secondary.until("checkpoint", 3)
    primary.process.send_signal(signal.SIGSTOP)
    assert "0.5 s" in secondary.until("lost")["cause"]
    secondary.until("takeover")
    primary.process.send_signal(signal.SIGCONT)
    status, errors = primary.end()
    assert status == 1
    assert "this primary stands still" in errors
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0


def test_a_stopped_secondary_is_noticed_and_the_primary_goes_on_alone(sides: Sides) -> None:
    secondary = sides.secondary()
    primary = sides.primary("--peer-timeout", "0.5", "--reconnect-limit", "0.3", "--run-on", "0.2")
    primary.until("checkpoint", 3)
    child = secondary.child()
    os.kill(child, signal.SIGSTOP)
    try:
        primary.until("lost")
        primary.until("alone")
        status, _ = primary.end()
        assert status == 1, "a primary that lost its secondary does not claim that all went well"
        assert primary.events[-1]["wrong_pages"] == 0
    finally:
        os.kill(child, signal.SIGCONT)


def test_sigusr1_takes_a_checkpoint_at_once_on_either_side(sides: Sides) -> None:
    secondary = sides.secondary()
    primary = sides.primary("--interval", "3600")
    secondary.until("checkpoint", 1)
    primary.process.send_signal(signal.SIGUSR1)
    secondary.until("checkpoint", 2)
    secondary.process.send_signal(signal.SIGUSR1)
    secondary.until("checkpoint", 3)
    assert wrong_pages(secondary) == 0


def test_sigusr2_is_the_operators_word_to_take_over(sides: Sides) -> None:
    secondary = sides.secondary("--run-on", "2")
    primary = sides.primary()
    secondary.until("checkpoint", 2)
    secondary.process.send_signal(signal.SIGUSR2)
    assert secondary.until("takeover")["cause"] == "the operator asked for it"
    status, errors = primary.end()
    assert status == 1
    assert "took over" in errors
    assert secondary.end()[0] == 0


def test_a_killed_machine_is_restarted_by_its_keeper_and_the_pair_goes_on(sides: Sides) -> None:
    secondary = sides.secondary("--reconnect-limit", "20")
    primary = sides.primary()
    for kill in range(1, 4):
        done = len([event for event in secondary.events if event["event"] == "checkpoint"])
        secondary.until("checkpoint", done + 3)
        os.kill(secondary.child(), signal.SIGKILL)
        found = secondary.until("attached", kill)
        assert found["action"] in ("REPLAYED", "RESTART", "NO_RESTART")
        assert len(found["sentence"].splitlines()) == 1
    done = len([event for event in secondary.events if event["event"] == "checkpoint"])
    secondary.until("checkpoint", done + 3)
    assert all(event["fresh"] is False for event in primary.events if event["event"] == "connected")
    primary.process.send_signal(signal.SIGTERM)
    assert primary.end()[0] == -signal.SIGTERM
    assert secondary.end()[0] == 0
    assert wrong_pages(primary, secondary) == 0


def test_a_restarted_machine_takes_over_when_the_primary_is_gone_too(sides: Sides) -> None:
    """Killed in step, so that no byte of the next epoch is in the cache; then, later, the primary dies."""
    secondary = sides.secondary("--reconnect-limit", "3")
    primary = sides.primary("--checkpoints", "4", "--hold", "--no-background")
    primary.until("holding")
    os.kill(secondary.child(), signal.SIGKILL)
    assert secondary.until("attached")["action"] in ("RESTART", "REPLAYED")
    secondary.until("hello", 2)
    primary.process.kill()
    assert secondary.until("takeover")["epoch"] == 4
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0
    # What the demo adds up has the pages that were verified at the restart.
    tally = Tally()
    for event in secondary.events:
        tally.add(event)
    at_restart = secondary.until("resumed")["verified_pages"]
    checked = [event["verified_pages"] for event in secondary.events if event["event"] in ("takeover", "ran_on")]
    assert at_restart == 4096
    done = sum(event["verified_pages"] for event in secondary.events if event["event"] == "checkpoint")
    assert tally.verified_pages == done + at_restart + sum(checked)


def test_a_keeper_gives_up_a_machine_that_is_killed_again_and_again(sides: Sides) -> None:
    secondary = sides.secondary()
    for kill in range(6):
        if kill:
            secondary.until("restarted", kill)
        os.kill(secondary.child(), signal.SIGKILL)
    status, _ = secondary.end()
    assert status == 1
    assert "giving up" in secondary.events[-1]["sentence"]


def test_the_machine_dies_with_its_keeper(sides: Sides) -> None:
    secondary = sides.secondary()
    child = secondary.child()
    secondary.process.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()
    colocache.clean(sides.name)


def test_a_side_on_cores_of_its_own_keeps_to_them_with_every_thread(sides: Sides) -> None:
    core = max(os.sched_getaffinity(0))
    secondary = sides.secondary("--own-cores", str(core))
    primary = sides.primary("--checkpoints", "3", "--hold")
    primary.until("holding")
    seen = [
        os.sched_getaffinity(int(thread.name))
        for pid in (secondary.process.pid, secondary.child())
        for thread in Path(f"/proc/{pid}/task").iterdir()
    ]
    assert len(seen) > 2, "its keeper's, and its machine's"
    assert all(cores == {core} for cores in seen)


def test_what_a_killed_keeper_left_is_inspected_recovered_and_attached(sides: Sides) -> None:
    secondary = sides.secondary()
    primary = sides.primary("--checkpoints", "3", "--hold", "--no-background", "--reconnect-limit", "30")
    primary.until("holding")
    secondary.process.kill()
    assert primary.until("lost")
    time.sleep(0.2)
    runner = CliRunner()
    shown = runner.invoke(cli, ["inspect", sides.name, "--json"])
    assert json.loads(shown.output.splitlines()[-1])["sealed_epoch"] == 3
    recovered = runner.invoke(cli, ["recover", sides.name, "--json"])
    assert recovered.exit_code == 0, recovered.output
    report = json.loads(recovered.output.splitlines()[-1])
    assert (report["action"], report["epoch"], report["restartable"]) == ("restart", 3, True)
    assert recovered.output.splitlines()[0] == report["sentence"]
    assert f"\nNext: colocache secondary --attach --name {sides.name} --listen ADDRESS\n" in recovered.output
    # A wrong word to the one that attaches must not cost the checkpoint.
    for wrong in (("--memory-spill", "/nowhere"), ("--memory-limit", "1")):
        command = ("secondary", "--attach", "--name", sides.name, "--listen", f"unix:{sides._folder}/wrong", *wrong)
        refused = runner.invoke(cli, command)
        assert refused.exit_code, refused.output
    again = sides.secondary("--attach")
    assert again.until("attached")["epoch"] == 3
    assert again.until("hello")["sealed_epoch"] == 3
    primary.process.send_signal(signal.SIGTERM)
    primary.end()
    assert again.end()[0] == 0
    assert wrong_pages(again) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_side_in_order_with_the_usual_status(sides: Sides, signum: signal.Signals) -> None:
    secondary = sides.secondary()
    primary = sides.primary()
    secondary.until("checkpoint", 2)
    secondary.process.send_signal(signum)
    status, errors = secondary.end()
    assert status == -signum
    assert "Traceback" not in errors
    assert colocache.list_regions() == [] or sides.name not in [one.name for one in colocache.list_regions()]
    primary.process.send_signal(signum)
    status, errors = primary.end()
    assert status == -signum
    assert "Traceback" not in errors


# ---- bad input ----


@pytest.mark.parametrize(
    ("side", "args", "what"),
    [
        ("secondary", ["--listen", "nowhere"], "is no address"),
        ("secondary", ["--listen", "unix:/no/such/folder/s"], "can't listen on unix:/no/such/folder/s"),
        ("secondary", ["--listen", "unix:{tmp}/s", "--attach"], "--attach needs --name"),
        (
            "secondary",
            ["--listen", "unix:{tmp}/s", "--attach", "--name", "nix"],
            "there is no POSIX shared memory /colocache.nix",
        ),
        ("secondary", ["--listen", "unix:{tmp}/s", "--name", "a/b"], "is not a valid name of a region"),
        ("secondary", ["--listen", "unix:{tmp}/s", "--connect-limit", "0.2"], "no primary came within 0.2 s"),
        ("secondary", ["--listen", "unix:{tmp}/s", "--peer-timeout", "0"], "'0' is not in the range 0.01 to 86400"),
        ("primary", ["--connect", "unix:{tmp}/nobody", "--connect-limit", "0.2"], "no secondary answers at"),
        ("primary", ["--connect", "unix:{tmp}/nobody", "--interval", "-1"], "'-1' is not in the range 0 to 86400"),
    ],
)
def test_bad_input_is_one_sentence_and_status_not_0(tmp_path: Path, side: str, args: list[str], what: str) -> None:
    command = python_command("colocache.cli", "main", side, *RAM, *[arg.format(tmp=tmp_path) for arg in args])
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode != 0
    assert what in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_wrong_peer_ends_with_one_sentence_and_the_secondary_waits_on_for_the_right_one(sides: Sides) -> None:
    secondary = sides.secondary("--pair", "mine")
    primary = sides.primary("--pair", "yours")
    status, errors = primary.end()
    assert status == 1
    assert "the secondary refuses this primary: the peer belongs to pair 'yours'" in errors
    assert "belongs to pair 'yours'" in secondary.until("refused")["sentence"]
    right = sides.primary("--pair", "mine")
    secondary.until("checkpoint", 2)
    right.process.send_signal(signal.SIGTERM)
    right.end()
    assert secondary.end()[0] == 0


def test_two_sizes_of_ram_are_told_apart(sides: Sides) -> None:
    secondary = sides.secondary("--ram", "32M")
    primary = sides.primary()
    assert "RAM block" in primary.end()[1]
    assert "RAM block" in secondary.until("refused")["sentence"]
