"""The demo's figure: task utility against attack success, one curve for each method and control."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csulora.demo.reading import corrected
from csulora.demo.settings import ADDED_BACK, ALIGNED, CONTROLS, FAMILIES, METHODS, RAW, Row
from csulora.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any common colour blindness; markers tell apart without.
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")
MARKERS = ("o", "s", "^", "D")
CONTROL_COLORS = ("#555555", "#999999", "#009E73", "#CC79A7", "#B8A000")
CONTROL_MARKERS = ("x", "+", "1", "2", "3")


def save(rows: Sequence[Row], path: Path) -> None:
    """Draw the trade-offs of `rows` into a PNG."""
    figure = new_figure((13.0, 7.2))
    skill, benign = figure.subplots(1, 2)
    _panel(skill, rows, "utility", "New skill, right answers (%): higher is better")
    _panel(benign, rows, "benign", "Benign requests answered (%): higher is better")
    figure.suptitle(
        "What each method keeps of the poisoned adapter, and of benign answers, against harm\n"
        "points are measured, lines only join neighbouring strengths; the upper left is best",
        fontsize=11,
    )
    handles, labels = skill.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def _panel(axes: Axes, rows: Sequence[Row], metric: str, label: str) -> None:
    """One metric over attack success."""
    ends = {row.family: row for row in rows if row.family in (ALIGNED, RAW)}
    styles = zip(COLORS, MARKERS, METHODS, strict=True)
    for i, (color, marker, family) in enumerate(styles):
        # Strength 0 is the raw adapter: every curve starts there. The methods lie on the controls.
        curve = [ends[RAW], *corrected(rows, family)]
        style = {"color": color, "marker": marker, "label": family.title, "linewidth": 2.2}
        _draw(axes, curve, metric, 7 - i, style)
    controls = zip(CONTROL_COLORS, CONTROL_MARKERS, _controls(rows).items(), strict=True)
    for color, marker, (title, points) in controls:
        # D of two subspaces is added back: no one line leads through the points.
        line = "" if title == CONTROLS[ADDED_BACK] else "--"
        style = {"color": color, "marker": marker, "label": title, "linewidth": 1.2}
        _draw(axes, [ends[RAW], *points], metric, 2, style | {"linestyle": line})
    _label_ends(axes, ends, metric)
    axes.set(
        xlabel="Attack success on harmful requests (%): lower is safer",
        ylabel=label,
        xlim=(-6, 106),
        ylim=(-6, 112),
    )
    axes.grid(alpha=0.25)


def _controls(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The points of each control by its title, from least changed to most."""
    found = {
        title: [row for row in rows if row.control == name] for name, title in CONTROLS.items()
    }
    found |= {f.title: corrected(rows, f) for f in FAMILIES if f.random_subspace}
    return {title: sorted(group, key=lambda row: row.change) for title, group in found.items()}


def _draw(
    axes: Axes, curve: Sequence[Row], metric: str, zorder: int, style: dict[str, Any]
) -> None:
    points = [_point(row, metric) for row in curve]
    axes.plot(*zip(*points, strict=True), markersize=6, alpha=0.9, zorder=zorder, **style)


def _label_ends(axes: Axes, ends: dict[str, Row], metric: str) -> None:
    texts = {ALIGNED: ("aligned model, no adapter", (9, -14)), RAW: ("raw adapter", (-75, 9))}
    for key, (text, offset) in texts.items():
        point = _point(ends[key], metric)
        axes.plot(*point, marker="*", markersize=15, color="black", linestyle="none", zorder=8)
        axes.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=10)


def _point(row: Row, metric: str) -> tuple[float, float]:
    return 100 * row.metrics.attack_success, 100 * getattr(row.metrics, metric)
