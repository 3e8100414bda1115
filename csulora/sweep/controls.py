"""What the settings of a sweep are compared with, and how every variant is made of the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from csulora import baselines
from csulora.adapter import LoraAdapter
from csulora.correction import correct
from csulora.errors import CsuloraError, UsageError
from csulora.report import Report, Totals
from csulora.subspace import SafetySubspace
from csulora.sweep.grid import Setting

# By the names that switch them off. The first two are once in a sweep, the others once for every
# setting they are compared with.
RAW, NONE = "raw", "no-adapter"
DOWN_SCALING, RANDOM, ADD_BACK, PRUNING = "down-scaling", "random-subspace", "add-back", "pruning"
CONTROLS = (RAW, NONE, DOWN_SCALING, RANDOM, ADD_BACK, PRUNING)
RANDOM_SEED = 0


class Material:
    """What variants are made of: an adapter, a subspace, and where it is computed."""

    def __init__(
        self, adapter: LoraAdapter, subspace: SafetySubspace, device: str = "auto"
    ) -> None:
        self.adapter, self.subspace, self.device = adapter, subspace, device

    @cached_property
    def energy(self) -> float:
        """||dW||_F^2 over all modules."""
        return baselines.energy(self.adapter)

    @cached_property
    def pruning(self) -> list[tuple[str, float]]:
        """Modules by Safe LoRA's cosine, the lowest first, and the relative change once each is gone,
        and those before it."""
        cosines = baselines.cosines(self.adapter, self.subspace)
        gone, found = 0.0, []
        for name in sorted(cosines, key=lambda name: (cosines[name], name)):
            gone += baselines.energy(LoraAdapter({name: self.adapter.modules[name]}, {}))
            found.append((name, math.sqrt(gone / self.energy) if self.energy else 0.0))
        return found

    def corrected(self, setting: Setting, *, random: bool = False) -> tuple[LoraAdapter, Report]:
        """As `csulora correct` makes it; or with random directions in place of D's."""
        leading = self.subspace.leading(setting.family.k)
        if random:
            leading = baselines.random_subspace(leading, RANDOM_SEED)
        return correct(self.adapter, leading, setting.correction, device=self.device)


@dataclass(frozen=True, eq=False)
class Variant:
    """An adapter to evaluate. `values` tells it apart from all others of one adapter and subspace."""

    name: str  # a control's, or "setting"
    title: str
    values: dict[str, Any]
    make: Callable[[Material], tuple[LoraAdapter, Report | None]]
    setting: Setting | None = None  # itself, or what a control is compared with
    totals: Totals | None = None


def of_setting(setting: Setting, totals: Totals) -> Variant:
    """A setting of the grid."""
    values = {"settings": setting.to_dict()}
    return Variant("setting", str(setting), values, lambda m: m.corrected(setting), setting, totals)


def ends(without: Collection[str]) -> list[Variant]:
    """The raw adapter, and no adapter: its update is zero."""
    found = [
        Variant(RAW, "raw adapter", {"control": RAW}, lambda m: (m.adapter, None)),
        Variant(NONE, "no adapter", {"control": NONE}, lambda m: (_scaled(m, 0.0), None)),
    ]
    return [variant for variant in found if variant.name not in without]


def beside(
    setting: Setting, totals: Totals, material: Material, without: Collection[str]
) -> list[Variant]:
    """The controls of one setting: of the same norm, the same change, the same blocks.

    Those that cannot be had are left out: no change is to be had by scaling down beyond 1, or by adding
    D where there is none.
    """
    change = totals.relative_change
    found = []
    if DOWN_SCALING not in without:
        found.append(_down(setting, "norm", baselines.equal_norm_factor(totals)))
        if change < 1:
            found.append(_down(setting, "change", baselines.equal_change_factor(change)))
    if RANDOM not in without:
        found.append(_random(setting))
    if ADD_BACK not in without:
        found += _add_back(setting, change, material)
    if PRUNING not in without:
        found += _pruned(setting, change, material)
    return found


def _down(setting: Setting, what: str, factor: float) -> Variant:
    factor = _rounded(factor)
    title = f"scaled by {factor:g}, equal {what}"
    values = {"control": DOWN_SCALING, "factor": factor}
    return Variant(DOWN_SCALING, title, values, lambda m: (_scaled(m, factor), None), setting)


def _random(setting: Setting) -> Variant:
    values = {"control": RANDOM, "seed": RANDOM_SEED, "settings": setting.to_dict()}

    def make(material: Material) -> tuple[LoraAdapter, None]:
        return material.corrected(setting, random=True)[0], None

    return Variant(RANDOM, "random subspace, same settings", values, make, setting)


def _add_back(setting: Setting, change: float, material: Material) -> list[Variant]:
    try:
        gamma = baselines.gamma_for_change(material.adapter, material.subspace, change)
    except UsageError:
        return []
    gamma = _rounded(gamma)
    values = {"control": ADD_BACK, "gamma": gamma}
    title = f"D added back, gamma {gamma:g}, equal change"

    def make(material: Material) -> tuple[LoraAdapter, None]:
        return baselines.add_back(material.adapter, material.subspace, gamma), None

    return [Variant(ADD_BACK, title, values, make, setting)]


def _pruned(setting: Setting, change: float, material: Material) -> list[Variant]:
    changes = [found for _, found in material.pruning]
    if not changes:
        return []
    count = 1 + min(range(len(changes)), key=lambda i: abs(changes[i] - change))
    names = [name for name, _ in material.pruning[:count]]
    values = {"control": PRUNING, "modules": count}
    title = f"{count} of {len(changes)} modules pruned, nearest change"
    return [
        Variant(
            PRUNING, title, values, lambda m: (baselines.pruned(m.adapter, names), None), setting
        )
    ]


def _scaled(material: Material, factor: float) -> LoraAdapter:
    return baselines.scaled(material.adapter, factor)


def _rounded(value: float) -> float:
    """To six digits, so that what is shown, and known again, is what was made."""
    return float(f"{value:.6g}")


def measured(material: Material, variant: Variant) -> tuple[float, float]:
    """Relative change, and norm over the raw adapter's, of a control as it was made."""
    made, _ = variant.make(material)
    before, after = material.energy, baselines.energy(made)
    kept = math.sqrt(after / before) if before else 1.0
    return baselines.relative_change(material.adapter, made), kept


def check_without(names: Collection[str]) -> None:
    """Raise UsageError for what is no control."""
    for name in names:
        if name not in CONTROLS:
            raise UsageError(f"controls are {', '.join(CONTROLS)}, not {name!r}")


def check_source(adapter: LoraAdapter) -> None:
    """Raise CsuloraError for an adapter that `csulora correct` would refuse."""
    if adapter.source is not None and adapter.source.corrected:
        raise CsuloraError(
            f"{adapter.source.folder}: was corrected by csulora already; sweep its source"
        )
