"""A page about a run: how off-subspace share and relative change are spread, and who stands out.

As PNG, or as one HTML file that needs nothing else. Needs matplotlib (`pip install 'csulora[plot]'`).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csulora.batch.summary import Summary
from csulora.errors import CsuloraError, UsageError
from csulora.files.folders import check_new_file, whole_file
from csulora.files.plain import write_bytes
from csulora.plots import new_figure
from csulora.text import one_line

FIGURES = {
    "off": ("off-subspace share of the update's energy", 100.0, "%"),
    "change": ("relative change  ||dW* - dW|| / ||dW||", 1.0, ""),
}
SUFFIXES = (".html", ".png")
DENSE = 2000  # more adapters than this are shown as a density
LABELS = 12
LONGEST_NAME = 42
BLUE, RED = "#3b6ea8", "#b3402a"

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
       color: #1b1f24; background: #fff; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
td, th { padding: 0.2em 0.9em 0.2em 0; text-align: left; vertical-align: top; }
img { max-width: 100%; }
"""


def check_page(path: Path) -> None:
    """Raise UsageError now, not after the run, if no page can be written there."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a page is a .html or a .png file")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name the file to write")
    check_new_file(path)
    new_figure((1, 1))


def write_page(summary: Summary, path: Path) -> None:
    """Write the page, whole or not at all. Raises CsuloraError if it cannot be written."""
    picture = _picture(summary)
    data = picture if path.suffix == ".png" else _html(summary, picture).encode()
    try:
        with whole_file(path) as temporary:
            write_bytes(temporary, data)
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be written ({error.strerror or error})") from None


def _picture(summary: Summary) -> bytes:
    figure = new_figure((13, 4.6))
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    for axis, (name, (label, unit, sign)) in zip(panels, FIGURES.items(), strict=False):
        _histogram(axis, unit * np.asarray(getattr(summary, name)), label, sign)
    _scatter(panels[2], summary)
    done = len(summary.off)
    figure.suptitle(
        f"{done:,} corrected adapters, {summary.counts['failed']:,} failed", fontsize=12
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _histogram(axis: Any, values: np.ndarray, label: str, sign: str) -> None:
    axis.set_xlabel(label + (f", {sign}" if sign else ""), fontsize=9)
    axis.set_ylabel("adapters", fontsize=9)
    if not len(values):
        axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes)
        return
    axis.hist(values, bins=min(60, max(10, int(len(values) ** 0.5))), color=BLUE)
    # A few outliers are a bar too low to see beside thousands.
    if len(values) > 100:
        axis.set_yscale("symlog", linthresh=10)
        axis.yaxis.set_major_formatter("{x:g}")
    middle = float(np.median(values))
    axis.axvline(middle, color=RED, linewidth=1.2)
    axis.set_title(f"median {middle:.3g} {sign}", fontsize=10, color=RED)


def _scatter(axis: Any, summary: Summary) -> None:
    off, change = 100 * np.asarray(summary.off), np.asarray(summary.change)
    axis.set_xlabel("off-subspace share, %", fontsize=9)
    axis.set_ylabel("relative change", fontsize=9)
    axis.set_title("each adapter; outliers numbered", fontsize=10)
    if len(off) > DENSE:
        axis.hexbin(off, change, gridsize=50, bins="log", cmap="Blues", mincnt=1)
    elif len(off):
        axis.scatter(off, change, s=9, color=BLUE, alpha=0.6, linewidths=0)
    outliers = _by_adapter(summary)
    for number, (off_share, relative_change) in enumerate(outliers.values(), start=1):
        point = 100 * off_share, relative_change
        axis.plot(*point, "o", markersize=7, markerfacecolor="none", color=RED)
        axis.annotate(
            str(number), point, xytext=(5, 4), textcoords="offset points", fontsize=8, color=RED
        )
    if outliers:
        names = [f"{i}  {_shortened(name)}" for i, name in enumerate(outliers, start=1)]
        lines = ["      ".join(names[i : i + 3]) for i in range(0, len(names), 3)]
        axis.figure.supxlabel("\n".join(lines), fontsize=8, color=RED, parse_math=False)


def _by_adapter(summary: Summary) -> dict[str, tuple[float, float]]:
    """(off share, relative change) of the farthest outliers, each adapter once."""
    points: dict[str, tuple[float, float]] = {}
    for outlier in summary.outliers():
        points.setdefault(outlier.adapter, (outlier.off, outlier.change))
    return dict(list(points.items())[:LABELS])


def _shortened(name: str) -> str:
    """The end of a long path, which tells adapters apart."""
    short = name if len(name) <= LONGEST_NAME else "..." + name[-LONGEST_NAME:]
    return "".join(c if c.isprintable() else "?" for c in short)


def _html(summary: Summary, picture: bytes) -> str:
    image = base64.b64encode(picture).decode()
    spread = summary.spread()
    parts = [
        "<!doctype html><meta charset='utf-8'><title>csulora batch</title>",
        f"<style>{STYLE}</style><h1>{summary.counts['corrected']:,} adapters corrected, "
        f"{summary.counts['skipped']:,} finished before, {summary.counts['failed']:,} failed</h1>",
        f"<img alt='distributions' src='data:image/png;base64,{image}'>",
        _table(
            "Spread over the adapters",
            ("figure", "5 % below", "median", "5 % above"),
            [(FIGURES[name][0], *(f"{v:.4f}" for v in figure)) for name, figure in spread.items()],
        ),
        _table(
            "Adapters far from the others",
            ("adapter", "off-subspace share", "relative change"),
            [(o, f"{x:.4f}", f"{y:.4f}") for o, (x, y) in _by_adapter(summary).items()],
        ),
        _table(
            "Failures",
            ("kind", "number", "the first"),
            [(k, str(n), summary.examples[k]) for k, n in summary.failures.most_common()],
        ),
        _table(
            "Slowest",
            ("adapter", "seconds"),
            [(name, f"{seconds:.3f}") for seconds, name in summary.slowest()],
        ),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(one_line(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>" if body else ""
