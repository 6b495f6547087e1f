# SPDX-License-Identifier: Apache-2.0
"""The picture of a recording at scale: which pages who wrote, epoch by epoch, and what that gives to flush."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colocache.errors import UnsupportedError
from colocache.extras import install_command
from colocache.teach.machines import HeatRecording, mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS_MAX = 256  # a picture has no more rows of pages; each then stands for several
PVM, SVM, BOTH = "#1f6bb0", "#b5500b", "#70449e"
PANELS = (("PVM bitmap", PVM), ("SVM bitmap", SVM), ("flush set: the union", BOTH))


def need_matplotlib() -> None:
    """UnsupportedError, with the command that helps, before any work is done."""
    try:
        import matplotlib  # noqa: F401 only whether it is there
    except ImportError as error:
        raise UnsupportedError(
            "matplotlib is not installed, and the heat map is drawn with it",
            hint=f"{install_command('bench')}; --export needs nothing",
        ) from error


def shares(recording: HeatRecording) -> dict[str, npt.NDArray[np.float64]]:
    """Per panel an array (rows, epochs): the share of a row's pages that are set. Rows are page ranges, in order."""
    n_pages, n_rows = recording.n_pages, min(ROWS_MAX, recording.n_pages)
    edges = np.arange(n_rows) * n_pages // n_rows
    counts = np.diff([*edges, n_pages])
    columns: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name, _ in PANELS}
    for epoch in recording.epochs:
        pvm, svm = mask(epoch.pvm, n_pages), mask(epoch.svm, n_pages)
        for (name, _), pages in zip(PANELS, (pvm, svm, pvm | svm), strict=True):
            columns[name].append(np.add.reduceat(pages.astype(np.int64), edges) / counts)
    return {name: np.stack(found, axis=1) for name, found in columns.items()}


def picture(recording: HeatRecording) -> bytes:
    """A PNG. UnsupportedError without matplotlib."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 1.25))
    found = shares(recording)
    top = max(float(share.max()) for share in found.values()) or 1.0
    first: Axes | None = None
    for column, (name, colour) in enumerate(PANELS):
        axes = figure.add_subplot(grid[0, column], sharey=first)
        _heat(figure, axes, recording, found[name], name, colour, top)
        if first is None:
            first = axes
            axes.set_ylabel("guest RAM, MiB")
        else:
            axes.tick_params(labelleft=False)
    _bars(figure.add_subplot(grid[1, :]), recording)
    guest = recording.guest
    mib = int(guest["ram_bytes"]) >> 20
    figure.suptitle(
        f"{len(recording.epochs)} checkpoints of a {guest['kind']} guest of {mib} MiB: who wrote which pages",
        fontsize=14, fontweight="bold",
    )  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _heat(
    figure: Any,
    axes: Axes,
    recording: HeatRecording,
    share: npt.NDArray[np.float64],
    name: str,
    colour: str,
    top: float,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    map_ = LinearSegmentedColormap.from_list(name, ["#f3f5f8", colour, "#120c1c"])
    first, last = recording.epochs[0].epoch, recording.epochs[-1].epoch
    mib = recording.n_pages * int(recording.guest["page_bytes"]) / (1 << 20)
    image = axes.imshow(
        share, aspect="auto", interpolation="nearest", cmap=map_, vmin=0, vmax=top,
        extent=(first - 0.5, last + 0.5, mib, 0),
    )  # fmt: skip
    axes.set_title(name, color=colour, fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.85, label="share of the pages", format="{x:.0%}")


def _bars(axes: Axes, recording: HeatRecording) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.epoch for epoch in recording.epochs]
    parts = (
        ("the PVM only", PVM, "", [epoch.pvm_pages for epoch in recording.epochs]),
        ("both", BOTH, "oo", [epoch.both_pages for epoch in recording.epochs]),
        ("the SVM only", SVM, "///", [epoch.svm_pages for epoch in recording.epochs]),
    )
    below = np.zeros(len(numbers))
    for name, colour, hatch, counts in parts:
        axes.bar(numbers, counts, bottom=below, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
        below += np.array(counts)
    axes.set_title("pages to flush, by who wrote them", fontweight="bold", loc="left")
    axes.set_xlabel("epoch")
    axes.set_xlim(numbers[0] - 0.75, numbers[-1] + 0.75)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
