# SPDX-License-Identifier: Apache-2.0
"""The names of messages that a step shows, in words. What they are in full stands in replication/messages.py."""

from __future__ import annotations

import re

MESSAGES = {
    "HELLO": "both say what they have",
    "CHECKPOINT_REQUEST": "the PVM pauses for epoch {}",
    "PAGES": "pages of epoch {}",
    "VMSTATE_SEND": "the PVM stands; the registers of epoch {}",
    "VMSTATE_SIZE": "that was all of epoch {}",
    "VMSTATE_RECEIVED": "epoch {} is sealed",
    "VMSTATE_LOADED": "the SVM runs from epoch {}",
    "ABORT": "epoch {} is given up",
}  # {}: the number in brackets
SHOWN = re.compile(r"([A-Z_]+)(?:\((\d+)\))?")


def explain(messages: str) -> str:
    """ "PAGES(2)" as "PAGES(2): pages of epoch 2"; several with a semicolon between them."""
    found = SHOWN.finditer(messages)
    return "; ".join(f"{one[0]}: {MESSAGES[one[1]].format(one[2])}" for one in found)
