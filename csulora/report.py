"""What a correction did: energies per module and in total, as plain values and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from csulora.errors import CsuloraError
from csulora.reference import Cores
from csulora.settings import Correction

FORMAT = "csulora_report/1"
BLOCKS = ("aligned", "partial_left", "partial_right", "off")
RANK_ERROR_WARNING = 0.10


@dataclass(frozen=True)
class ModuleReport:
    """Energies of one module's update. Relative energies are shares of the energy before.

    energy_before, energy_after: ||dW||_F^2 and ||dW*||_F^2, scaling included (weight units squared).
    relative_change: ||dW* - dW||_F / ||dW||_F.
    rank_error: ||dW*_same - dW*_exact||_F / ||dW*_exact||_F, 0 for rank `exact`.
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


def module_reports(
    names: Iterable[str], cores: Cores, scalings: Iterable[float], ranks: tuple[int, int, int]
) -> dict[str, ModuleReport]:
    """Reports of a stack of n modules from their cores; `ranks` is (in, out, subspace)."""
    energy, before, after = cores.energy.tolist(), cores.before.tolist(), cores.after.tolist()
    change, error = cores.relative_change.tolist(), cores.rank_error.tolist()
    reports = {}
    for i, (name, s) in enumerate(zip(names, scalings, strict=True)):
        total = s * s * energy[i]
        if not math.isfinite(total):
            raise CsuloraError(f"{name}: the energy of its update, {total}, is out of range")
        reports[name] = ModuleReport(
            *ranks,
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
        f"rank same is {total.rank_error:.1%} off the exact result in total, "
        f"{modules[worst].rank_error:.1%} in {worst}; use rank exact where the server allows 2r"
    ]


def settings_dict(correction: Correction) -> dict[str, Any]:
    """The settings as JSON values; an infinite strength is the string "inf"."""
    return {
        name: "inf" if value == math.inf else value for name, value in asdict(correction).items()
    }
