"""The plots, drawn by matplotlib: bars of contestants, lines over a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib is imported where it is used: tests read the tables where it is not installed.

OURS, OTHERS, LIMITS = "tab:blue", "tab:gray", "tab:orange"


@dataclass(frozen=True)
class Bar:
    """A median with its lowest and highest; ``kind`` is "ours", "other" or "limit"."""

    name: str
    median: float
    lowest: float
    highest: float
    kind: str


def bars(path: Path, panels: Mapping[str, Sequence[Bar]], label: str) -> None:
    """One panel a case, one bar a contestant."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * columns, rows * (1 + 0.28 * most)))
    axes = figure.subplots(rows, columns, squeeze=False)
    colors = {"ours": OURS, "other": OTHERS, "limit": LIMITS}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, some) in zip(axes.flat, panels.items(), strict=False):
        reach = [[bar.median - bar.lowest for bar in some], [bar.highest - bar.median for bar in some]]
        axis.barh(
            [bar.name for bar in some],
            [bar.median for bar in some],
            xerr=reach,
            color=[colors[bar.kind] for bar in some],
            ecolor="black",
            capsize=2,
        )
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
    _save(figure, path)


@dataclass(frozen=True)
class Line:
    """Values over places, with their lowest and highest where they are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    lowest: Sequence[float] = ()
    highest: Sequence[float] = ()
    dashed: bool = field(default=False, kw_only=True)


def lines(path: Path, panels: Mapping[str, Sequence[Line]], x: str, y: str, *, log: str = "") -> None:
    """One panel a case; ``log`` names the axes ("x", "xy") that are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, some) in zip(axes.flat, panels.items(), strict=True):
        for line in some:
            style = "--" if line.dashed else "-"
            (drawn,) = axis.plot(line.x, line.y, style, marker="o", markersize=3, label=line.name)
            if line.lowest:
                axis.fill_between(line.x, line.lowest, line.highest, color=drawn.get_color(), alpha=0.15)
        if "x" in log:
            axis.set_xscale("log")
        if "y" in log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(y, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
