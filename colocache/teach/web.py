# SPDX-License-Identifier: Apache-2.0
"""The lesson as one web page that carries everything it needs: its look, its program and the recording."""

from __future__ import annotations

from importlib import resources

from colocache.teach.recording import Lesson


def page(lesson: Lesson) -> str:
    """The whole page as HTML text."""
    text = _file("lesson.html")
    # Inside a script element only "</" and "<!--" end anything early; JSON may write the first character as an escape.
    data = lesson.to_json().replace("<", "\\u003c")
    text = text.replace("/*{{lesson.css}}*/", _file("lesson.css")).replace("/*{{lesson.js}}*/", _file("lesson.js"))
    return text.replace("{{lesson.json}}", data)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
