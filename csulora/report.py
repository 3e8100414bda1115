"""What a correction did: energies per module and in total, as plain values and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from csulora.errors import CsuloraError
from csulora.method.stages import Figures

FORMAT = "csulora_report/1"
BLOCKS = ("aligned", "partial_left", "partial_right", "off")
RANK_ERROR_WARNING = 0.10


@dataclass(frozen=True)
class ModuleReport:
    """Energies of one module's update. Relative energies are shares of the energy before.

    energy_before, energy_after: ||dW||_F^2 and ||dW*||_F^2, scaling included (weight units squared).
    relative_change: ||dW* - dW||_F / ||dW||_F.
    rank_error: ||dW*_same - dW*_exact||_F / ||dW*_exact||_F, 0 for form `exact`.
    """

    rank_in: int
    rank_out: int
    subspace_rank: int
    energy_before: float
    energy_after: float
    relative_energy_before: dict[str, float]
    relative_energy_after: dict[str, float]
    relative_change: float
    rank_error: float


@dataclass(frozen=True)
class Totals:
    """The same over all modules, each module weighted by its energy (rank_error: by that after)."""

    modules: int
    energy_before: float
    energy_after: float
    relative_energy_before: dict[str, float]
    relative_energy_after: dict[str, float]
    relative_change: float
    rank_error: float


@dataclass(frozen=True)
class Report:
    """Settings, origins and energies of one corrected (or inspected) adapter."""

    modules: dict[str, ModuleReport]
    totals: Totals
    settings: dict[str, Any] = field(default_factory=dict)
    subspace: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    passed_through: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # files of the source that were not copied

    def to_dict(self) -> dict[str, Any]:
        """The content of `csulora_report.json`; strictly valid JSON values."""
        # dataclasses.asdict copies every value of every module, which is slow for a batch.
        modules = {name: dict(vars(module)) for name, module in self.modules.items()}
        return {
            "format": FORMAT,
            **vars(self),
            "modules": modules,
            "totals": dict(vars(self.totals)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote, or the content of a `csulora_report.json`.

        Raises CsuloraError for anything else.
        """
        given = dict(values)
        found = given.pop("format", None)
        if found != FORMAT:
            raise CsuloraError(f"not a report: format is {found!r}, expected {FORMAT!r}")
        try:
            modules = {name: ModuleReport(**entry) for name, entry in given["modules"].items()}
            return cls(**{**given, "modules": modules, "totals": Totals(**given["totals"])})
        except (AttributeError, KeyError, TypeError) as error:
            raise CsuloraError(f"not a report of this version: {error}") from None


def module_reports(
    names: Iterable[str],
    figures: Figures,
    scalings: Iterable[float],
    ranks: Iterable[tuple[int, int, int]],
) -> dict[str, ModuleReport]:
    """Reports of n modules from their figures; `ranks` are (in, out, subspace) of each."""
    energy, before, after, change, error = (X.tolist() for X in figures)
    reports = {}
    for i, (name, s, own) in enumerate(zip(names, scalings, ranks, strict=True)):
        total = s * s * energy[i]
        if not math.isfinite(total):
            raise CsuloraError(f"{name}: the energy of its update, {total}, is out of range")
        reports[name] = ModuleReport(
            *own,
            energy_before=total,
            energy_after=total * sum(after[i]),
            relative_energy_before=dict(zip(BLOCKS, before[i], strict=True)),
            relative_energy_after=dict(zip(BLOCKS, after[i], strict=True)),
            relative_change=change[i],
            rank_error=error[i],
        )
    return reports


def totals(modules: Mapping[str, ModuleReport]) -> Totals:
    """Energies add up over modules; relative figures follow from the sums."""
    before = math.fsum(m.energy_before for m in modules.values())
    after = math.fsum(m.energy_after for m in modules.values())

    def share(which: str, block: str) -> float:
        parts = (m.energy_before * getattr(m, which)[block] for m in modules.values())
        return math.fsum(parts) / before if before else 0.0

    change = math.fsum(m.energy_before * m.relative_change**2 for m in modules.values())
    misfit = math.fsum(m.energy_after * m.rank_error**2 for m in modules.values())
    return Totals(
        modules=len(modules),
        energy_before=before,
        energy_after=after,
        relative_energy_before={b: share("relative_energy_before", b) for b in BLOCKS},
        relative_energy_after={b: share("relative_energy_after", b) for b in BLOCKS},
        relative_change=math.sqrt(change / before) if before else 0.0,
        rank_error=math.sqrt(misfit / after) if after else 0.0,
    )


def rank_warnings(total: Totals, modules: Mapping[str, ModuleReport]) -> list[str]:
    """A warning where the rank-r fit is far from the exact result."""
    worst = max(modules, key=lambda name: modules[name].rank_error, default=None)
    if worst is None or modules[worst].rank_error <= RANK_ERROR_WARNING:
        return []
    return [
        f"form same is {total.rank_error:.1%} off the exact result in total, "
        f"{modules[worst].rank_error:.1%} in {worst}; use form exact where the server allows 2r"
    ]
