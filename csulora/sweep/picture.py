"""Pictures of a sweep: what strengths do, and what each family gives at which price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.plots import new_figure, save_figure
from csulora.sweep.controls import CONTROLS, Variant
from csulora.sweep.metrics import Goal

ENERGIES, FRONTIER = "energies.png", "frontier.png"
# Okabe and Ito's palette: told apart with any common colour blindness; markers tell apart without.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = dict(zip(CONTROLS, ("*", "P", "x", "d", "^", "s"), strict=True))
GREYS: dict[str | None, str] = {
    "csulora": "#999999",
    "realign": "black",
}  # of the controls beside a method
NAMES = {
    "raw": "raw adapter",
    "no-adapter": "no adapter",
    "down-scaling": "down-scaling",
    "random-subspace": "random subspace",
    "add-back": "D added back",
    "pruning": "pruned modules",
}


def draw_energies(variants: Sequence[Variant], path: Path) -> None:
    """Relative change, and energy left, against strength; a column for each method and form."""
    groups: dict[str, dict[int, list[Variant]]] = {}
    for variant in variants:
        assert variant.setting is not None
        family = variant.setting.family
        title = str(family).rpartition(" k ")[0]
        groups.setdefault(title, {}).setdefault(family.k, []).append(variant)
    figure = new_figure((3.6 * len(groups) + 1.2, 6.4))
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    strengths = sorted({v.setting.strength for v in variants if v.setting is not None})
    labels = [f"{x:g}" for x in strengths]
    for column, (title, by_k) in enumerate(groups.items()):
        change, left = panels[0][column], panels[1][column]
        for i, (k, own) in enumerate(sorted(by_k.items())):
            style = {
                "color": COLORS[i % len(COLORS)],
                "marker": "osD^vX"[i % 6],
                "markersize": 4,
                "label": f"k {k}",
            }
            places = [strengths.index(v.setting.strength) for v in own if v.setting is not None]
            totals = [v.totals for v in own if v.totals is not None]
            change.plot(places, [t.relative_change for t in totals], **style)
            whole = max((t.energy_before for t in totals), default=0.0) or 1.0
            left.plot(places, [100 * t.energy_after / whole for t in totals], **style)
        change.set_title(title, fontsize=10)
        left.set_xticks(range(len(labels)), labels, fontsize=8)
        left.set_xlabel("strength")
        for axis in (change, left):
            axis.grid(alpha=0.25)
    panels[0][0].set_ylabel("relative change")
    panels[1][0].set_ylabel("energy left (%)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    save_figure(figure, path)


def draw_frontier(result: Mapping[str, Any], goal: Goal, path: Path) -> None:
    """The metric to be large against the one that is limited: families as curves, controls as marks."""
    figure = new_figure((8.0, 7.0))
    axes = figure.add_subplot()
    x, y = goal.needed
    for i, (name, points) in enumerate(_curves(result, x, y).items()):
        style = {"color": COLORS[i % len(COLORS)], "marker": "osD^v"[i % 5], "label": name}
        axes.plot(*zip(*points, strict=True), markersize=5, linewidth=1.4, alpha=0.85, **style)
    for i, ((kind, method), marks) in enumerate(_marks(result, x, y).items()):
        beside = f", beside {method}" * (method is not None)
        axes.plot(
            *zip(*marks, strict=True),
            marker=MARKERS[kind],
            markersize=9,
            linestyle="none",
            color=GREYS.get(method, "black"),
            label=f"{NAMES[kind]}{beside}",
            zorder=3 + i / 100,
        )
    if not axes.lines:
        raise CsuloraError(f"{path}: no picture, as no row has both {x} and {y}")
    axes.axvline(goal.limit.value, color="#888888", linestyle=":", linewidth=1.2)
    axes.set_xlabel(f"{x} (limit: {goal.limit})", parse_math=False)
    axes.set_ylabel(f"{y} (more is better)", parse_math=False)
    axes.set_title(result["prompts"], fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def _marks(
    result: Mapping[str, Any], x: str, y: str
) -> dict[tuple[str, str | None], list[tuple[float, float]]]:
    """Points of each control, by the method that it stands beside."""
    marks: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
    for row in result["rows"]:
        metrics = row["metrics"] or {}
        if row["kind"] in CONTROLS and x in metrics and y in metrics:
            method = row.get("compared_with", {}).get("method")
            marks.setdefault((row["kind"], method), []).append((metrics[x], metrics[y]))
    return marks


def _curves(result: Mapping[str, Any], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Points of each family by its change; where other prompts are told of, its chosen point alone."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for name, entries in result["tried"].items():
        for entry in entries:
            metrics = entry.get("metrics") or {}
            if x in metrics and y in metrics:
                point = (entry["relative_change"], metrics[x], metrics[y])
                curves.setdefault(name, []).append(point)
    for row in result["rows"]:
        metrics = row["metrics"] or {}
        reported = row["kind"] == "setting" and "report" in result["commands"]
        if reported and x in metrics and y in metrics:
            curves[row["title"]] = [(row["relative_change"], metrics[x], metrics[y])]
    return {
        name: [(a, b) for _, a, b in sorted(points)] for name, points in curves.items() if points
    }
