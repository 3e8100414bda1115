"""Pictures of a report. Needs matplotlib (`pip install 'csulora[plot]'`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from csulora.errors import CsuloraError
from csulora.files.folders import whole_file
from csulora.files.plain import read_start
from csulora.report import ModuleReport, Report

_PANELS = {
    "aligned": ("aligned",),
    "partial": ("partial_left", "partial_right"),
    "off": ("off",),
}
_ANNOTATED_LAYERS = 48
PNG = b"\x89PNG\r\n\x1a\n"


def plot_shares(report: Report, path: str | Path) -> None:
    """Heat maps of the aligned, partial and off shares, layers by modules, before and after.

    Shares are of the energy before, so a darker cell in the lower row is energy that was removed.
    """
    if not report.modules:
        raise CsuloraError(f"{path}: no plot, as no module could be corrected")
    rows, columns = _axes(list(report.modules))
    height = max(1.6, 0.21 * len(rows)) + 1.0
    width = max(3.2, 0.62 * len(columns) + 1.2)
    figure = new_figure((3 * width, 2 * height + 0.6))
    panels = figure.subplots(2, 3, squeeze=False)
    for column, (title, blocks) in enumerate(_PANELS.items()):
        grids = [
            _grid(report.modules, rows, columns, blocks, which)
            for which in ("relative_energy_before", "relative_energy_after")
        ]
        top = max(1e-6, float(np.nanmax(grids[0])))
        for line, (grid, when) in enumerate(zip(grids, ("before", "after"), strict=True)):
            axis = panels[line][column]
            image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=top, aspect="auto")
            total = _total(report, blocks, when)
            axis.set_title(f"{title}, {when}: {100 * total:.3g} % of the energy", fontsize=10)
            _label(axis, rows, columns, column == 0)
            if len(rows) <= _ANNOTATED_LAYERS:
                _annotate(axis, grid, top)
        bar = figure.colorbar(image, ax=[panels[0][column], panels[1][column]], shrink=0.6)
        bar.set_label("share of the module's energy before", fontsize=8)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    title = f"{report.source.get('name', 'adapter')}: {_settings(report)}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; it replaces no file that is not a PNG."""
    target = Path(path)
    try:
        if target.exists() and read_start(target, len(PNG)) != PNG:
            raise CsuloraError(f"{target}: exists and is not a PNG file; remove it or name another")
        with whole_file(target) as temporary:
            figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise CsuloraError(f"{target}: cannot be written ({error.strerror or error})") from None


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure; CsuloraError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CsuloraError("plots need matplotlib: pip install 'csulora[plot]'") from None
    return Figure(figsize=size, layout="constrained")


def _axes(names: list[str]) -> tuple[list[str], list[str]]:
    """Row labels (layers) and column labels (kinds of module), in order of appearance."""
    cells = [_cell(name) for name in names]
    rows = sorted({layer for layer, _ in cells}, key=lambda s: (not s.isdigit(), int(s or 0), s))
    columns = list(dict.fromkeys(kind for _, kind in cells))
    return rows, columns


def _cell(name: str) -> tuple[str, str]:
    """(layer, kind) of a module name: its first number, and its last two parts."""
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    kind = [part for part in name.split(".") if not part.isdigit()]
    return (number.group(1) if number else ""), ".".join(kind[-2:])


def _grid(
    modules: dict[str, ModuleReport],
    rows: list[str],
    columns: list[str],
    blocks: tuple[str, ...],
    which: str,
) -> np.ndarray:
    """Shares (len(rows), len(columns)); NaN where a layer lacks a module. Experts are averaged."""
    total = np.zeros((len(rows), len(columns)))
    count = np.zeros_like(total)
    for name, module in modules.items():
        layer, kind = _cell(name)
        cell = rows.index(layer), columns.index(kind)
        total[cell] += sum(getattr(module, which)[block] for block in blocks)
        count[cell] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _total(report: Report, blocks: tuple[str, ...], when: str) -> float:
    shares = getattr(report.totals, f"relative_energy_{when}")
    return sum(shares[block] for block in blocks)


def _label(axis: Any, rows: list[str], columns: list[str], first: bool) -> None:
    # Names are shown as they are, whatever matplotlib would make of a $ in them.
    shown = [c.rpartition(".")[2] for c in columns]
    if len(set(shown)) < len(columns):
        shown = columns
    axis.set_xticks(range(len(columns)), shown, parse_math=False)
    axis.tick_params(axis="x", labelrotation=40, labelsize=8)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    step = max(1, len(rows) // 40)
    axis.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7, parse_math=False)
    if first:
        axis.set_ylabel("layer")


def _annotate(axis: Any, grid: np.ndarray, top: float) -> None:
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            shade = "black" if value > 0.6 * top else "white"
            axis.text(
                j,
                i,
                _percent(value),
                fontsize=6,
                color=shade,
                ha="center",
                va="center",
            )


def _percent(share: float) -> str:
    """Three digits at most, and no exponents: below 0.01 % the cell only says so."""
    value = 100 * share
    if 0 < value < 0.01:
        return "<.01"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"[:4].rstrip(".")


def _settings(report: Report) -> str:
    found = "" if report.strength is None else f", strength {report.strength:g}"
    return f"{report.correction}{found}; cells in percent"
