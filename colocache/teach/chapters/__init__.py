# SPDX-License-Identifier: Apache-2.0
"""The chapters of the lesson, in order. A new one is a function in a file here and a name in this list."""

from colocache.teach.chapters.arriving import arriving
from colocache.teach.chapters.bounded import bounded
from colocache.teach.chapters.conversation import conversation
from colocache.teach.chapters.counter_bitmaps import only_pvm, only_svm
from colocache.teach.chapters.counter_order import clear_first, received_early
from colocache.teach.chapters.counter_straight import straight
from colocache.teach.chapters.deaths import death_idle, death_mid_flush, death_receiving, death_sealed
from colocache.teach.chapters.deaths_first import death_first
from colocache.teach.chapters.deaths_pvm import death_pvm
from colocache.teach.chapters.drifting import drifting
from colocache.teach.chapters.flush import flush
from colocache.teach.chapters.in_step import in_step
from colocache.teach.chapters.one_bitmap import one_bitmap
from colocache.teach.chapters.seal import seal
from colocache.teach.chapters.stock_qemu import stock_qemu
from colocache.teach.chapters.union import union
from colocache.teach.play import Script

CHAPTERS: tuple[Script, ...] = (
    in_step,
    drifting,
    arriving,
    union,
    seal,
    flush,
    conversation,
    one_bitmap,
    bounded,
    stock_qemu,
    death_first,
    death_receiving,
    death_idle,
    death_sealed,
    death_mid_flush,
    death_pvm,
    only_pvm,
    only_svm,
    straight,
    clear_first,
    received_early,
)
