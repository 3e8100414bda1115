"""Every method and control as a path from the raw adapter to its extreme, by one strength.

All come from `csulora.correct` and `csulora.baselines`; those marked as trials are in `trials`. A path's
place u runs from 0, the raw adapter, to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import csulora
from bench.safety import trials
from bench.safety.model import ATTENTION, MLP, TARGETS
from bench.safety.problem import RANK, Problem
from csulora import Correction, LoraAdapter, Realignment, SafetySubspace, baselines

Build = Callable[[float], LoraAdapter]
COARSE = (0.25, 0.5, 0.75, 1.0)
NOT_Q_K = tuple(kind for kind in TARGETS if kind not in ("q_proj", "k_proj"))


@dataclass(frozen=True)
class Family:
    """A path of adapters. build: by strength; strength: the strength at a place u in (0, 1].

    values: the strengths there are, where they are few (a number of modules, or of directions); then u
    is a share of the list.
    """

    name: str
    build: Build
    strength: Callable[[float], float] = lambda u: u
    values: tuple[float, ...] | None = None

    def at(self, u: float) -> float:
        """The strength at place u."""
        if self.values is None:
            return self.strength(u)
        return self.values[max(math.ceil(u * len(self.values)) - 1, 0)]


def lambda_at(u: float) -> float:
    """0.03 to 300, and no end at 1."""
    return math.inf if u >= 1 else 10 ** (-1.5 + 4 * u)


def _attenuation(u: float) -> float:
    """0.1 to 10^5, and no end at 1: attenuation by relative energy needs more."""
    return math.inf if u >= 1 else 10 ** (-1 + 6 * u)


def families(problem: Problem, seed: int = 0) -> list[Family]:
    """All of them, for one world."""
    adapter, D = problem.adapter, problem.D
    nested = {k: problem.subspace.leading(k) for k in (2, 8, 16, RANK)}
    random = {k: baselines.random_subspace(nested[k], seed) for k in (16, RANK)}
    counts = tuple(range(1, len(adapter.modules) + 1))
    ks = (64, 32, 16, 8, 4, 2, 1)
    found = [Family("scaled", lambda u: baselines.scaled(adapter, 1 - u))]
    found += _attenuations(adapter, nested, random)
    found += [
        Family(f"projected {side}", _projection(problem, side), values=tuple(map(float, ks)))
        for side in ("left", "right", "both")
    ]
    prune = {
        "safe lora": lambda n: baselines.safe_lora_of(adapter, D, int(n)),
        "pruned by cosine": lambda n: baselines.prune_lowest_cosine(adapter, D, int(n)),
        "pruned by e-diem": lambda n: baselines.prune_highest_e_diem(adapter, D, int(n)),
        "pruned at random": lambda n: baselines.prune_random(adapter, int(n), seed),
    }
    found += [Family(name, build, values=counts) for name, build in prune.items()]
    dare = baselines.dropped(adapter, 0.5, seed)
    found += [
        Family("resta", lambda g: baselines.add_back(adapter, D, g), lambda u: 2 * u),
        Family("resta, dare", lambda g: baselines.add_back(dare, D, g), lambda u: 2 * u),
        Family("lox k8", lambda g: baselines.lox(adapter, nested[8], 8, g), lambda u: 4 * u),
        Family(
            "random added", lambda g: baselines.add_back(adapter, random[RANK], g), lambda u: 2 * u
        ),
        Family("mlp scaled", lambda u: problem.only(baselines.scaled(adapter, 1 - u), MLP)),
        Family(
            "attention scaled", lambda u: problem.only(baselines.scaled(adapter, 1 - u), ATTENTION)
        ),
    ]
    return [*found, *_realignments(problem, nested, random), *_trials(problem)]


def _attenuations(
    adapter: LoraAdapter, nested: dict[int, SafetySubspace], random: dict[int, SafetySubspace]
) -> list[Family]:
    """CSULoRA: aligned kept, the rest attenuated."""
    cases = [(k, "direction", "exact", nested[k]) for k in nested]
    cases += [(k, "component", "exact", nested[k]) for k in (16, RANK)]
    cases += [(16, "direction", "same", nested[16]), (RANK, "direction", "same", nested[RANK])]
    cases += [(k, "random", "exact", random[k]) for k in random]

    def build(subspace: SafetySubspace, granularity: str, form: str) -> Build:
        start = Correction(
            granularity="component" if granularity == "component" else "direction", form=form
        )  # type: ignore[arg-type]
        return lambda x: csulora.correct(adapter, subspace, start.with_strength(x), device="cpu")[0]

    return [
        Family(f"csulora {g} {form} k{k}", build(subspace, g, form), _attenuation)
        for k, g, form, subspace in cases
    ]


def _projection(problem: Problem, side: str) -> Build:
    return lambda k: baselines.projected(
        problem.adapter,
        problem.subspace.leading(int(k)),
        side,  # type: ignore[arg-type]
    )


def _realignments(
    problem: Problem, nested: dict[int, SafetySubspace], random: dict[int, SafetySubspace]
) -> list[Family]:
    same, exact = Realignment(), Realignment(form="exact")
    both = {
        "realign same k2": (same, nested[2]),
        "realign same k16": (same, nested[16]),
        "realign same k64": (same, nested[RANK]),
        "realign same k64, no edge": (replace(same, edge=False), nested[RANK]),
        "realign exact k16": (exact, nested[16]),
        "realign exact k64": (exact, nested[RANK]),
        "realign opposed same k64": (replace(same, opposed=True), nested[RANK]),
        "realign opposed exact k64": (replace(exact, opposed=True), nested[RANK]),
        "realign gamma 0 k64": (replace(same, target=0.0), nested[RANK]),
        "realign random k64": (replace(same, edge=False), random[RANK]),
    }
    found = [
        Family(name, realigned(problem, settings, subspace), lambda_at)
        for name, (settings, subspace) in both.items()
    ]
    groups = {"q, k left alone": NOT_Q_K, "mlp only": MLP, "attention only": ATTENTION}
    groups |= {"v and o only": ("v_proj", "o_proj"), "writers only": ("o_proj", "down_proj")}
    for group, kinds in groups.items():
        for form, settings in (("same", same), ("exact", exact)):
            build = realigned(problem, settings, nested[RANK], kinds)
            found.append(Family(f"realign {form} k64, {group}", build, lambda_at))
    return found


def realigned(
    problem: Problem,
    settings: Realignment,
    subspace: SafetySubspace,
    kinds: tuple[str, ...] = TARGETS,
) -> Build:
    def build(strength: float) -> LoraAdapter:
        chosen = settings.with_strength(strength)
        corrected, _ = csulora.correct(problem.adapter, subspace, chosen, device="cpu")
        return problem.only(corrected, kinds)

    return build


def _trials(problem: Problem) -> list[Family]:
    return [
        Family(f"trial {name}", build, lambda_at)
        for name, build in trials.builders(problem).items()
    ]
