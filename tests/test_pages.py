# SPDX-License-Identifier: Apache-2.0
"""The pages of the repository: whoever has only the repository finds every page they name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def tracked(root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [root / name for name in listed.split("\0") if name and (root / name).is_file()]


def test_every_link_of_every_page_leads_to_a_file(source_tree: Path) -> None:
    pages = [path for path in tracked(source_tree) if path.suffix == ".md"]
    assert len(pages) >= 5
    broken = [
        f"{page.relative_to(source_tree)} -> {link}"
        for page in pages
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert broken == []


def test_no_file_cites_a_page_that_the_repository_does_not_have(source_tree: Path) -> None:
    cited = re.compile(r"\b[A-Z][A-Z_]+\.md\b")
    absent = {
        f"{path.relative_to(source_tree)}: {name}"
        for path in tracked(source_tree)
        if path.suffix in (".py", ".c", ".h", ".pml", ".md", ".sh") and path.name != "test_pages.py"
        for name in cited.findall(path.read_text(encoding="utf-8"))
        if not any(other.name == name for other in tracked(source_tree))
    }
    assert absent == set()


def test_the_readme_names_every_page(source_tree: Path) -> None:
    named = set(LINK.findall((source_tree / "README.md").read_text(encoding="utf-8")))
    pages = {str(path.relative_to(source_tree)) for path in tracked(source_tree) if path.suffix == ".md"}
    assert pages - {"README.md"} <= named
