# SPDX-License-Identifier: Apache-2.0
"""The lesson: why COLO needs two bitmaps and a cache, run on the real engine and drawn from what it holds.

shape, tags            the guest: its grid, and pages that say who wrote them
primary, secondary     the two machines, thin users of Sender and Cache
spoken, victim         a child process that takes orders; a secondary that runs in one, and can be killed
outside                a secondary whose guest runs in processes of its own, as under a stock QEMU
pair, play             both together; running a chapter and reading everything at each step
judge, recording       what an image is; the recorded lesson and its file format
chapters/              one small function per chapter
draw, terminal, quiz   the terminal
wire                   names of messages, in words
web, lesson.html       the page: all of the following in one file
  panels, lesson (.js)   the grids; chapters, steps and moving among them
  model, judge (.js)     a small model of the pair, for playing; tests compare it with the real engine
  play, predict, quiz    the chapter that is played, questions before an action, the exercise (.js)
  handout (.js)          printing: all steps of a chapter
machines, heat         a recording at scale, and its picture
"""
