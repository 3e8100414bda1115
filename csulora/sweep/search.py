"""Where on its path from the raw adapter to its extreme a family meets the limit: a few evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence

from csulora.report import Totals
from csulora.sweep.energies import Energies
from csulora.sweep.grid import Family, Setting
from csulora.sweep.metrics import Goal, Metrics

COARSE = (1 / 3, 2 / 3, 1.0)  # shares of the extreme's change
STEPS = 6
HALVES = (0.5, 0.25, 0.75)  # of the way between two points; the others where the half failed
# Relative changes that are nearer to each other than this are not told apart.
NEAR = 0.01
SMALLEST, LARGEST = 1e-4, 1e6  # finite strengths
DIGITS = 3  # of a strength that was found, so that it can be typed

Requests = Generator[list[float], Mapping[float, Metrics | None], None]


class Path:
    """A family by its relative change, which grows with the strength."""

    def __init__(self, energies: Energies, family: Family) -> None:
        self.family = family
        self._energies = energies
        self._known: dict[float, Totals] = {}
        self.extreme = self.change(math.inf)

    def totals(self, strength: float) -> Totals:
        if strength not in self._known:
            (self._known[strength],) = self._energies.totals(self.family, [strength])
        return self._known[strength]

    def change(self, strength: float) -> float:
        return self.totals(strength).relative_change

    def setting(self, strength: float) -> Setting:
        return Setting(self.family, strength)

    def strength_at(self, change: float) -> float:
        """The strength, to a few digits, that changes the adapter about as much."""
        near = 0.1 * NEAR
        if change >= self.extreme - near:
            return math.inf
        low, high = math.log(SMALLEST), math.log(LARGEST)
        while high - low > 0.5 * 10.0**-DIGITS:
            middle = (low + high) / 2
            # Not kept in `_known`: only strengths that are shown are.
            (totals,) = self._energies.totals(self.family, [math.exp(middle)])
            missing = change - totals.relative_change
            if abs(missing) < near:
                break
            low, high = (middle, high) if missing > 0 else (low, middle)
        return float(f"{math.exp((low + high) / 2):.{DIGITS}g}")


def search(
    path: Path,
    goal: Goal,
    raw: Metrics | None,
    *,
    coarse: Sequence[float] | None = None,
    steps: int = STEPS,
) -> Requests:
    """Yields strengths to evaluate, and is sent the metrics of each, None where the evaluation failed.

    First coarse ones, then halves of the change between two points, one within the limit and one beyond
    it. What it asks for depends on what it was sent alone. raw: of the raw adapter, None where they are
    not known; it counts as beyond the limit then.
    """
    first = coarse or sorted({path.strength_at(share * path.extreme) for share in COARSE})
    tried = dict((yield list(first)))
    start = raw is not None and goal.within(raw)
    for _ in range(steps):
        points = [(0.0, start)]
        for strength in sorted(tried):
            metrics = tried[strength]
            if metrics is not None:
                points.append((path.change(strength), goal.within(metrics)))
        bounds = _bounds(points)
        if bounds is None or bounds[1] - bounds[0] < NEAR:
            return
        between = (
            path.strength_at(bounds[0] + share * (bounds[1] - bounds[0])) for share in HALVES
        )
        new = next((x for x in between if x not in tried), None)
        if new is None:
            return
        tried |= yield [new]


def _bounds(points: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    """Between which two changes the limit is met: by the first that gets within it, else by the last
    that leaves it. points: a change each, and whether it is within the limit."""
    pairs = list(itertools.pairwise(points))
    comes = [(a, b) for (a, before), (b, after) in pairs if after and not before]
    leaves = [(a, b) for (a, before), (b, after) in pairs if before and not after]
    return next(iter(comes + leaves[::-1]), None)


def pick(
    path: Path, goal: Goal, tried: Mapping[float, Metrics | None]
) -> tuple[float, Metrics] | None:
    """The best strength of those that were tried; the nearest to the limit where none is within it."""
    known = [(strength, metrics) for strength, metrics in tried.items() if metrics is not None]
    if not known:
        return None
    return max(known, key=lambda one: goal.rank(one[1], path.change(one[0])))
