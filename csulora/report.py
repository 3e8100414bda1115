"""What a correction did: energies per module and in total, as plain values and as JSON."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from csulora.errors import CsuloraError
from csulora.method.stages import Figures
from csulora.settings import Method, method_from_dict

FORMAT = "csulora_report/1"
_DICTS = ("made_by", "settings", "subspace", "source", "output")
_LISTS = ("passed_through", "warnings", "left_out")
BLOCKS = ("aligned", "partial_left", "partial_right", "off")
RANK_ERROR_WARNING = 0.10


class _Energies:
    """What the figures of a module and those of all have in common."""

    relative_energy_before: dict[str, float]
    relative_energy_after: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        before, after = dict(self.relative_energy_before), dict(self.relative_energy_after)
        # dataclasses.asdict copies every value one by one, which is slow for a batch.
        return {**vars(self), "relative_energy_before": before, "relative_energy_after": after}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises TypeError for other names, and for values that are no numbers."""
        entry = cls(**_checked(dict, values, cls.__name__))
        for name, value in vars(entry).items():
            numbers = [value]
            if name.startswith("relative_energy"):
                numbers = list(_checked(dict, value, name).values())
                if value.keys() != set(BLOCKS):
                    raise TypeError(f"{name} is {value!r}")
            if not all(_is_figure(x, name) for x in numbers):
                raise TypeError(f"{name} is no finite number")
        return entry


@dataclass(frozen=True)
class ModuleReport(_Energies):
    """Energies of one module's update. Relative energies are shares of the energy before.

    energy_before, energy_after: ||dW||_F^2 and ||dW*||_F^2, scaling included (weight units squared).
    relative_change: ||dW* - dW||_F / ||dW||_F.
    rank_error: ||dW*_same - dW*_exact||_F / ||dW*_exact||_F, 0 for form `exact`. For realignment this is
        the part of its target that no combination of the columns of B reaches.
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
class Totals(_Energies):
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
    """Settings, origins and energies of one corrected (or inspected) adapter.

    made_by: `version` of csulora, and number of the `method`, which tells outputs apart that the same
        input gives in two versions.
    output: `sha256` and `config_sha256` of the two files as they were written; empty before that.
    strength: that was found for the budget of the settings, None where they have none.
    """

    modules: dict[str, ModuleReport]
    totals: Totals
    made_by: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    subspace: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    passed_through: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # files of the source that were not copied
    strength: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `csulora_report.json`; strictly valid JSON values."""
        plain = {name: copy.copy(value) for name, value in vars(self).items()}
        modules = {name: module.to_dict() for name, module in self.modules.items()}
        plain |= {"modules": modules, "totals": self.totals.to_dict()}
        return {"format": FORMAT, **plain, "strength": plain_strength(self.strength)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote, or the content of a `csulora_report.json`.

        Raises CsuloraError for anything else.
        """
        given = dict(values) if isinstance(values, Mapping) else {}
        found = given.pop("format", None)
        if found != FORMAT:
            raise CsuloraError(f"not a report: format is {found!r}, expected {FORMAT!r}")
        try:
            modules = {name: ModuleReport.from_dict(e) for name, e in given["modules"].items()}
            totals = Totals.from_dict(given["totals"])
            for kind, names in ((dict, _DICTS), (list, _LISTS)):
                given |= {n: _checked(kind, given[n], n) for n in names if n in given}
            if not all(isinstance(text, str) for n in _LISTS for text in given.get(n, ())):
                raise TypeError("a list holds other things than text")
            given["strength"] = _strength(given.get("strength"))
            return cls(**{**given, "modules": modules, "totals": totals})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CsuloraError(f"not a report of this version: {error}") from None

    @property
    def correction(self) -> Method:
        """The strengths and choices it was made with; raises UsageError where it states others."""
        stated = {k: v for k, v in self.settings.items() if k not in ("dtype", "portable")}
        return method_from_dict(stated)


def plain_strength(strength: float | None) -> float | str | None:
    """As a JSON value."""
    return "inf" if strength == math.inf else strength


def _strength(value: object) -> float | None:
    """What `plain_strength` made a JSON value of; raises TypeError for anything else."""
    if value is None or value == "inf":
        return None if value is None else math.inf
    if not _is_figure(value, "strength") or value < 0:  # type: ignore[operator]
        raise TypeError(f"strength is {value!r}")
    return float(value)  # type: ignore[arg-type]


def _is_figure(value: object, name: str) -> bool:
    """Whether it is a finite number, for a relative figure one that is not far below 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    lowest = -1 if name.startswith("relative") else -sys.float_info.max
    return lowest <= value <= sys.float_info.max


def _checked(kind: type, value: Any, name: str) -> Any:
    """A copy of a value of that kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}")
    return kind(value)


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
        added_up = total * sum(after[i]), total * (change[i] * change[i]), change[i] * change[i]
        if not all(map(math.isfinite, (*after[i], error[i], *added_up))):
            raise CsuloraError(
                f"{name}: its result is larger than its update, of scaling {s:g}, by more than a report "
                "can hold"
            )
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
