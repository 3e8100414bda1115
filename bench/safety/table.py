"""One world's whole table: every method's frontier, the fixed rules, and the predictors."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.safety.evaluate import AT_ONCE, Evaluator, Metrics
from bench.safety.families import Family, families
from bench.safety.frontier import LIMIT, ROUNDS, Search, search
from bench.safety.predictors import norm_ratio, predictors, rounded
from bench.safety.problem import Problem
from bench.safety.stages import Trained
from bench.safety.worlds import World
from csulora import LoraAdapter, baselines

RULES = Path(__file__).with_name("rules.json")
FORMAT = "csulora_world/1"
BISECTIONS = 10


@dataclass(frozen=True)
class Size:
    """How much is measured: prompts of each kind at most, rounds of bisection, and frontiers at all."""

    prompts: int | None = None
    rounds: int = ROUNDS
    frontier: bool = True


class Bench:
    """A trained world, ready to measure adapters in."""

    def __init__(
        self, trained: Trained, task: str, device: torch.device, prompts: int | None = None
    ) -> None:
        self.problem = Problem.of(trained)
        self.evaluator = Evaluator(task, device, prompts)
        self.device = device
        self._shared = {n: X.to(device) for n, X in self.problem.shared().items()}

    def measure(self, adapters: Sequence[LoraAdapter], part: str) -> list[Metrics]:
        """Metrics of each adapter on "validation" or "test"."""
        found: list[Metrics] = []
        for start in range(0, len(adapters), AT_ONCE[self.device.type]):
            own = self.problem.merged(adapters[start : start + AT_ONCE[self.device.type]])
            own = {n: X.to(self.device) for n, X in own.items()}
            found += self.evaluator.measure(self._shared, own, part)
        return found

    def change(self, adapter: LoraAdapter) -> float:
        return baselines.relative_change(self.problem.adapter, adapter)


def world_table(
    world: World,
    seed: int,
    trained: Trained,
    device: torch.device,
    size: Size = Size(),
) -> dict[str, Any]:
    """What the world's JSON holds."""
    start = time.perf_counter()
    bench = Bench(trained, world.task, device, size.prompts)
    of_run = described(bench, trained, world, seed)
    paths = families(bench.problem, seed)
    wanted = paths if size.frontier else []
    searches = search(wanted, lambda adapters: bench.measure(adapters, "validation"), size.rounds)
    result = {
        "format": FORMAT,
        **of_run,
        "frontier": at_limit(bench, searches),
        "rules": _rules(bench, paths, size),
        "predictors": predictors(bench.problem, bench.evaluator),
        "limit": LIMIT,
        "seconds": {**trained.seconds, "table": time.perf_counter() - start},
    }
    return rounded(result)


def described(bench: Bench, trained: Trained, world: World, seed: int) -> dict[str, Any]:
    """What every run's JSON begins with: which run, how it is measured, and the models themselves."""
    return {
        "world": world.name,
        "seed": seed,
        "settings": asdict(world),
        "metrics": list(Metrics.__dataclass_fields__),
        "counts": bench.evaluator.counts,
        "ends": _ends(bench, trained),
    }


def _ends(bench: Bench, trained: Trained) -> dict[str, Any]:
    """The models themselves on test prompts: base, aligned, raw, and the raw adapter on part of them."""
    own = {f"{n}.weight" for n in bench.problem.adapter.modules}
    raw = bench.problem.adapter
    parts = {
        kind: baselines.pruned(raw, [n for n in raw.modules if kind not in n])
        for kind in ("mlp", "self_attn")
    }
    found = {}
    for name, weights in (("base", trained.base), ("aligned", trained.aligned)):
        moved = {n: X.to(bench.device) for n, X in weights.items()}
        changed = {n: X for n, X in moved.items() if n in own}
        shared = {n: X for n, X in moved.items() if n not in own}
        found[name] = bench.evaluator.measure(shared, changed, "test")[0].as_list()
    some = [raw, *parts.values()]
    names = ["raw", *(f"raw, {kind} modules alone" for kind in parts)]
    for name, metrics in zip(names, bench.measure(some, "test"), strict=True):
        found[name] = metrics.as_list()
    return found


def at_limit(bench: Bench, searches: list[Search]) -> dict[str, Any]:
    """By family: all points on validation prompts, and the best within the limit on test prompts."""
    picked = [(s, s.best()) for s in searches]
    adapters = [s.family.build(x) for s, x in picked if x is not None]
    measured = iter(zip(adapters, bench.measure(adapters, "test"), strict=True))
    found = {}
    for s, x in picked:
        points = [[plain(y), *m.as_list()] for y, m in sorted(s.points.items())]
        row: dict[str, Any] = {"validation": points, "best": None}
        if x is not None:
            adapter, metrics = next(measured)
            row["best"] = {
                "strength": plain(x),
                "change": bench.change(adapter),
                "test": metrics.as_list(),
            }
        found[s.family.name] = row
    return found


def _rules(bench: Bench, paths: list[Family], size: Size) -> list[dict[str, Any]]:
    """Each fixed rule, and on test prompts the raw adapter scaled to its change and to its norm.

    Without frontiers only the rules that are to be reported.
    """
    by_name = {family.name: family for family in paths}
    rules = json.loads(RULES.read_text())["rules"]
    rules = [rule for rule in rules if size.frontier or rule.get("reported")]
    strengths = [_strength(bench, by_name[rule["family"]], rule) for rule in rules]
    adapters = [by_name[r["family"]].build(x) for r, x in zip(rules, strengths, strict=True)]
    changes = [bench.change(adapter) for adapter in adapters]
    raw = bench.problem.adapter
    norms = [math.sqrt(baselines.energy(a) / baselines.energy(raw)) for a in adapters]
    factors = [baselines.equal_change_factor(change) for change in changes]
    rows = {
        "validation": bench.measure(adapters, "validation"),
        "test": bench.measure(adapters, "test"),
        "scaled to its change": bench.measure([baselines.scaled(raw, c) for c in factors], "test"),
        "scaled to its norm": bench.measure([baselines.scaled(raw, c) for c in norms], "test"),
    }
    return [
        {
            **rule,
            "used": plain(strengths[i]),
            "changed": changes[i],
            **{name: metrics[i].as_list() for name, metrics in rows.items()},
        }
        for i, rule in enumerate(rules)
    ]


def _strength(bench: Bench, family: Family, rule: dict[str, Any]) -> float:
    """The strength that a rule says: a number, a number times ||dW|| / ||D||, or that of a change."""
    if "change" in rule:
        return for_change(bench, family, rule["change"])
    return rule["strength"] if "strength" in rule else rule["per_ratio"] * norm_ratio(bench.problem)


def for_change(bench: Bench, family: Family, change: float) -> float:
    """The strength at which the family changes the adapter by `change`; its end where none does."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if bench.change(family.build(family.at(middle))) < change:
            low = middle
        else:
            high = middle
    return family.at(high)


def plain(strength: float) -> float | str:
    return "inf" if math.isinf(strength) else float(f"{strength:.5g}")
