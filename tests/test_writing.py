# SPDX-License-Identifier: Apache-2.0
"""Files that a user names are written whole or not at all, and what is no regular file stays what it is."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from colocache.children import python_command
from colocache.errors import SystemCallError, reason_of
from colocache.writing import write_file


def test_a_new_file_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "new", b"text")
    finally:
        os.umask(before)
    assert (tmp_path / "new").read_bytes() == b"text"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_regular_file_is_replaced_and_a_reader_of_the_old_one_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o604)
    with path.open("rb") as old:
        write_file(path, b"new")
        assert old.read() == b"old"
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "file"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("there/file")
    write_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_link_to_nothing_and_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (("link", "which does not exist"), ("loop", "symbolic links")):
        with pytest.raises(SystemCallError, match=reason):
            write_file(tmp_path / name, b"text")
        assert (tmp_path / name).is_symlink()


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    content = bytes(range(256)) * 1024  # more than a pipe holds
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    write_file(tmp_path / "fifo", content)
    reader.join(20)
    assert got == [content]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_device_is_written_to_and_stays_one() -> None:
    write_file(Path("/dev/null"), b"text")
    with pytest.raises(SystemCallError, match="/dev/full can't be written: No space left on device"):
        write_file(Path("/dev/full"), b"text")
    for name in ("/dev/null", "/dev/full"):
        assert stat.S_ISCHR(Path(name).stat().st_mode)


def test_a_folder_and_a_socket_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "socket"):
            with pytest.raises(SystemCallError, match="no regular file"):
                write_file(path, b"text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(SystemCallError, match="Permission denied"):
        write_file(tmp_path / "file", b"new")


def test_dev_stdout_is_the_stdout_that_others_have_too(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from colocache.writing import write_file; write_file(Path('/dev/stdout'), b'text')"
    )
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"text"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert piped.stdout == b"text"


@pytest.mark.parametrize(
    "command",
    [
        ("teach", "--chapter", "union", "--html", "{}"),
        ("teach", "--chapter", "union", "--export", "{}"),
        ("record", "--ram", "16M", "--checkpoints", "1", "--guest", "process", "--backing", "shm", "--export", "{}"),
    ],
    ids=lambda args: "-".join((args[0], args[-2].strip("-"))),
)
def test_no_command_replaces_a_device(command: tuple[str, ...]) -> None:
    args = [arg.format("/dev/full") for arg in command]
    ran = subprocess.run(
        python_command("colocache.cli", "main", *args), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "Error: /dev/full can't be written: No space left on device"
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_an_error_without_a_reason_of_the_system_never_becomes_the_word_none() -> None:
    assert reason_of(OSError(28, "No space left on device")) == "No space left on device"
    assert reason_of(OSError("the library's own words")) == "the library's own words"
    assert reason_of(OSError()) == "OSError"
