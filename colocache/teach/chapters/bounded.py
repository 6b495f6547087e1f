# SPDX-License-Identifier: Apache-2.0
"""One image instead of two: where the second copy went, and what goes with it."""

from colocache.teach.chapters.deaths import kill
from colocache.teach.pair import Pair
from colocache.teach.play import Play, chapter


def kib(n_bytes: int) -> str:
    return f"{n_bytes >> 10} KiB"


def arrive(pair: Pair, epoch: int) -> int:
    """All of an epoch but its seal; the pages that came."""
    pair.pvm_pauses(epoch)
    n_pages = pair.deliver(epoch)
    pair.on_svm("sync")
    pair.on_svm("device_state", epoch)
    return n_pages


@chapter(
    "bounded",
    "Bounded memory",
    question="Must protection cost the guest's memory twice?",
    answer="No. Here it is the SVM's own writes that are kept apart, in private copies that die with its process: so "
    "guest RAM stays the newest epoch, and the cache need hold only what has come since. What is lost is knowing who "
    "wrote which page, what a broken epoch had brought, and a fixed price.",
)
def bounded(play: Play) -> None:
    shape = play.shape
    whole = kib(shape.n_pages << 12)
    with play.pair_in_step(bounded=True, killable=True) as pair:
        used = pair.on_svm("used")
        play.step(
            pair,
            "The cache is empty",
            f"With two images the SVM's host holds {whole} of guest RAM and another {whole} of cache. "
            f"Here the cache takes {kib(used['staged'])}. "
            "In place of the SVM bitmap, which stays empty from now on, you see guest RAM: the file in shared memory, "
            "which is epoch 1.",
            target=1,
        )
        pair.svm_writes(shape.svm)
        private = pair.on_svm("used")["private"]
        play.step(
            pair,
            "Its writes are its own",
            "The SVM maps guest RAM privately: what it only reads is the file's page, and its first write to a page "
            f"makes a copy for its process alone. The kernel counts {kib(private)} of them, {len(shape.svm)} pages. "
            "The file does not change: guest RAM is epoch 1, whatever the SVM does.",
            actor="svm",
            focus=shape.svm,
        )
        pair.pvm_writes(shape.pvm)
        pair.pvm.sync()
        came = pair.deliver(2, len(shape.pvm) // 2)
        staged = pair.on_svm("used")["staged"]
        play.step(
            pair,
            "The cache holds what came, and no more",
            f"{came} pages of epoch 2 are here, and the cache takes {kib(staged)}: it is a file full of holes, whose "
            "memory comes with the pages. Half an epoch is still no state that anybody could run from, so it must "
            "wait beside guest RAM, as ever.",
            actor="wire",
            call="cache.receive_stream(socket)",
            message="PAGES(2)",
        )
        kill(pair)
        play.step(
            pair,
            "SIGKILL, at the same bad moment",
            "With two images this death left nothing to restart from: guest RAM was the dead machine's, and the cache "
            "no epoch any more. Now the private copies have gone with the process, and what is left in shared memory "
            "is exactly epoch 1.",
            actor="svm",
            target=1,
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: restart, always",
            f'The next process attaches to the shared memory, and the engine reports: "{recovery.sentence}". '
            "Nothing had to be copied. What had come of epoch 2 is thrown away; the PVM has it in unacked still.",
            actor="svm",
            call="Cache.attach(memory)",
            target=1,
        )
        pair.reconnect()
        pair.svm_writes(shape.svm)
        pair.pvm.sender.resend()
        arrive(pair, 3)
        counts = pair.seal(3)
        pair.received()
        play.step(
            pair,
            "The flush set is what came",
            "The SVM ran on and wrote; the PVM sent its pages again, as epoch 3, which is now sealed (complete). "
            f"The engine counts {counts['pvm']} pages to copy, and {counts['svm']} for the SVM: where it alone wrote, "
            "guest RAM still has the right bytes, under the private copy.",
            actor="svm",
            call="cache.seal(3)",
            message="PAGES(3), VMSTATE_RECEIVED(3)",
            focus=[pfn for pfn in shape.svm if pfn not in shape.both],
        )
        flushed = pair.on_svm("flush")
        pair.on_svm("loaded")
        private = pair.on_svm("used")["private"]
        play.step(
            pair,
            "Copied, and forgotten",
            f"The flush copied {flushed} pages into guest RAM and forgot the private copies; the kernel counts "
            f"{kib(private)}. The SVM's mapping shows the file again, on every page: exactly epoch 3.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            message="VMSTATE_LOADED(3)",
            target=3,
        )
        pair.on_svm("free_staged")
        staged = pair.on_svm("used")["staged"]
        play.step(
            pair,
            "The memory goes back",
            f"When the SVM runs again, the pages of the cache are freed: it takes {kib(staged)}. "
            "Till then they were the list and the bytes from which a next process could have repeated the flush.",
            actor="svm",
            call="cache.free_staged()",
            target=3,
        )
        pair.pvm_writes(shape.pvm_later)
        pair.svm_writes(shape.svm_later)
        pair.pvm.sync()
        came = pair.deliver(4)
        pair.on_svm("abort", 4, "the connection was lost")
        play.step(
            pair,
            "Gone: what a broken epoch had brought",
            f"{came} pages of epoch 4 had come when the connection was lost and the epoch was given up. With two "
            "images cache and PVM bitmap keep them; here they are thrown away, and all of them must be sent again. "
            "The SVM runs on, unharmed.",
            actor="wire",
            call="cache.abort(4, reason)",
            message="PAGES(4), ABORT(4)",
        )
        used = pair.on_svm("used")
        play.step(
            pair,
            "Gone: who wrote what, and a fixed price",
            f"Nobody knows which pages the SVM writes, only how many: {kib(used['private'])} now. That and the cache "
            "grow until a checkpoint takes both back to nothing, so near a limit one asks for a checkpoint; a host "
            "that is full ends the epoch. Huge pages can't be used: a private copy of one would be 2 MiB.",
        )
        pair.pvm.alive = False
        pair.on_svm("failover")
        play.step(
            pair,
            "Still there: the takeover, live",
            "The PVM is dead, and the SVM takes over at once from its own memory: guest RAM and, over it, its private "
            "copies. The promise is the same as with two images. To have it so: colocache demo --memory bounded.",
            actor="svm",
            call="cache.failover()",
        )
