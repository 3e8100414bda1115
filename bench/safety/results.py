"""The JSONs that `run` wrote, and how their figures are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.safety.worlds import WORLDS

Z = 1.96


class Results:
    """The JSONs of a folder, by world in the order of `worlds`."""

    def __init__(self, files: Iterable[Path], seeds: Sequence[int] | None = None) -> None:
        found = [json.loads(file.read_text()) for file in sorted(files)]
        kept = [r for r in found if seeds is None or r["seed"] in seeds]
        names = [*WORLDS, *sorted({r["world"] for r in kept} - set(WORLDS))]
        groups = {name: [r for r in kept if r["world"] == name] for name in names}
        self.worlds = {name: sorted(rs, key=_seed) for name, rs in groups.items() if rs}

    @classmethod
    def of(cls, folder: Path, seeds: Sequence[int] | None = None) -> Results:
        return cls(folder.glob("*.json"), seeds)


def _seed(result: dict[str, Any]) -> int:
    return result["seed"]


def value(result: dict[str, Any], row: Sequence[float] | None, metric: str) -> float:
    """A metric of one row in percent; 0 where nothing is within the limit: no adapter is left."""
    if row is None:
        return 0.0
    return 100 * row[result["metrics"].index(metric)]


def spread(values: Sequence[float]) -> str:
    """Mean [smallest, largest]."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return (
        f"{fmean(values):.0f}"
        if round(low) == round(high)
        else f"{fmean(values):.0f} [{low:.0f}, {high:.0f}]"
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count`, both in 0 to 1."""
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return (middle - half) / (1 + Z * Z / count), (middle + half) / (1 + Z * Z / count)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def skill_at_limit(result: dict[str, Any], family: str) -> float:
    """Skill on test prompts at the family's best setting within the limit; 0 where there is none."""
    best = result["frontier"][family]["best"]
    return value(result, best["test"] if best else None, "skill")
