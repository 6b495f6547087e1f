# SPDX-License-Identifier: Apache-2.0
"""What a hint tells to type works where the reader stands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from colocache.extras import install_command


def test_the_hint_is_for_the_reader_s_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python3"))
    monkeypatch.chdir(tmp_path)
    assert install_command("qemu") == "`.venv/bin/pip install 'colocache[qemu]'`"
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "csrc" / "include").mkdir(parents=True)
    (tmp_path / "csrc" / "include" / "colocache.h").touch()
    assert install_command("qemu") == "`.venv/bin/pip install '.[qemu]'`"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert install_command("bench") == f"`{tmp_path}/.venv/bin/pip install 'colocache[bench]'`"
