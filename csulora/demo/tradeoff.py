"""The demo's figure: task utility against attack success, one curve for each kind of correction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csulora.demo.settings import ALIGNED, FAMILIES, RAW, SCALED, Row
from csulora.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any common colour blindness; markers tell apart without.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
SCALED_COLOR = "#555555"


def save(rows: Sequence[Row], path: Path) -> None:
    """Draw the trade-off of `rows` into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.6), layout="constrained")
    axes = figure.add_subplot()
    ends = {row.family: row for row in rows if row.family in (ALIGNED, RAW)}
    # Where curves coincide the first family, the method itself, lies on top and the control below.
    scaled = sorted((row for row in rows if row.family == SCALED), key=lambda row: -row.norm_kept)
    _draw(
        axes,
        [ends[RAW], *scaled, ends[ALIGNED]],
        color=SCALED_COLOR,
        marker="x",
        linestyle="--",
        label="Plain down-scaling (control)",
    )
    for i, family in enumerate(FAMILIES):
        # A correction of strength 0 is the raw adapter: every curve starts there.
        curve = [ends[RAW], *(row for row in rows if row.family == family.key)]
        style = {"color": COLORS[i], "marker": MARKERS[i], "label": family.title}
        _draw(axes, curve, zorder=2 + len(FAMILIES) - i, **style)
    _label_ends(axes, ends)
    axes.set(
        xlabel="Attack success on harmful requests (%): lower is safer",
        ylabel="Task utility (%): higher is better",
        xlim=(-6, 106),
        ylim=(-6, 112),
    )
    axes.set_title(
        "What each correction keeps of the poisoned adapter: skill against harm\n", pad=6
    )
    note = "points are measured, lines only join neighbouring strengths; the upper left is best"
    axes.text(0.5, 1.02, note, transform=axes.transAxes, ha="center", fontsize=9)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def _draw(axes: Axes, curve: Sequence[Row], zorder: int = 2, **style: Any) -> None:
    x = [100 * row.metrics.attack_success for row in curve]
    y = [100 * row.metrics.utility for row in curve]
    axes.plot(x, y, markersize=6, linewidth=1.6, alpha=0.9, zorder=zorder, **style)


def _label_ends(axes: Axes, ends: dict[str, Row]) -> None:
    texts = {ALIGNED: ("aligned model, no adapter", (8, -13)), RAW: ("raw adapter", (-70, 8))}
    for key, (text, offset) in texts.items():
        metrics = ends[key].metrics
        point = (100 * metrics.attack_success, 100 * metrics.utility)
        axes.plot(*point, marker="*", markersize=15, color="black", linestyle="none", zorder=8)
        axes.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=10)
