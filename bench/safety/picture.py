"""The frontiers of all worlds as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench.safety.results import Results, value

SHOWN = (
    "scaled",
    "csulora direction exact k64",
    "resta",
    "realign same k64",
    "realign same k64, q, k left alone",
    "trial ratio same",
)


def picture(results: Results, path: Path, shown: Sequence[str] = SHOWN) -> None:
    """Validation skill against attack success: a panel for each world, a line for each path and seed."""
    from matplotlib.figure import Figure

    columns = 4
    lines = math.ceil(len(results.worlds) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * lines), layout="constrained")
    panels = iter(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for (name, rs), axes in zip(results.worlds.items(), panels, strict=False):
        for n, family in enumerate(shown):
            for r in rs:
                if family not in r["frontier"]:
                    continue
                points = [p[1:] for p in r["frontier"][family]["validation"]]
                x, y = ([value(r, p, m) for p in points] for m in ("complied", "skill"))
                label = family if r is rs[0] else None
                axes.plot(x, y, ".-", color=f"C{n}", linewidth=0.8, alpha=0.7, label=label)
        axes.axvline(10, color="#999999", linewidth=0.6)
        axes.set_title(name)
        axes.tick_params(labelbottom=True)
    for axes in panels:
        axes.set_axis_off()
    first = figure.axes[0]
    first.set(xlim=(-4, 104), ylim=(-4, 104))
    figure.supxlabel("Attack success, validation prompts (%): lower is safer")
    figure.supylabel("Skill kept (%)")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=75)
