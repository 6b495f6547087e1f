# SPDX-License-Identifier: Apache-2.0
"""The lesson as one web page that carries all it needs: its look, its program, the recording and its words."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib import resources

from colocache.teach.quiz import WHYS
from colocache.teach.recording import Lesson
from colocache.teach.wire import MESSAGES

FILE = re.compile(r"/\*\{\{([\w.]+)\}\}\*/")  # /*{{lesson.css}}*/ stands for the file's text


def page(lesson: Lesson) -> str:
    """The whole page as HTML text."""
    text = FILE.sub(lambda found: _file(found[1]), _file("lesson.html"))
    words = {"questions": [asdict(why) for why in WHYS], "messages": MESSAGES}
    text = text.replace("{{words.json}}", _data(json.dumps(words, ensure_ascii=False, separators=(",", ":"))))
    return text.replace("{{lesson.json}}", _data(lesson.to_json()))


def _data(text: str) -> str:
    """Inside a script element only "</" and "<!--" end anything early; JSON may escape the first character."""
    return text.replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
