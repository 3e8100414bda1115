"""What a sweep found, as JSON (docs/formats.md), and the command that applies the best of it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csulora.adapter import LoraAdapter
from csulora.subspace import SafetySubspace
from csulora.sweep.controls import Variant
from csulora.sweep.evaluate import Found, Row, Wish, shown
from csulora.sweep.metrics import Metrics
from csulora.sweep.place import RESULT_FORMAT
from csulora.version import MADE_BY

SAME_PROMPTS = "the figures are from the prompts that chose the settings"
OTHER_PROMPTS = "the figures are from other prompts than those that chose the settings"


@dataclass(frozen=True)
class Call:
    """How the adapter, the subspace and the folder were named, for the command that applies a setting."""

    adapter: str
    subspace: str
    out_dir: str
    options: Sequence[str] = ()  # that have to be repeated

    def command(self, variant: Variant) -> str:
        """`csulora correct` with the settings of a variant, to be pasted into a shell."""
        assert variant.setting is not None
        words = ["csulora", "correct", self.adapter, "--subspace", self.subspace]
        words += ["--out-dir", f"{self.out_dir.rstrip('/') or '/'}/best"]
        return shlex.join([*words, *variant.setting.options(), *self.options])


def of_energies(
    adapter: LoraAdapter, subspace: SafetySubspace, variants: Sequence[Variant], rank: int
) -> dict[str, Any]:
    """The result of a sweep without an evaluation. rank: the adapter's."""
    rows = [_setting_row(variant, rank) for variant in variants]
    return {**_origin(adapter, subspace), "rows": rows}


def of_evaluation(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    wish: Wish,
    found: Found,
    call: Call,
    rank: int,
) -> dict[str, Any]:
    """The result of a sweep with one. Figures are those of the reporting command alone."""
    commands = {"eval": wish.select.line}
    if wish.report is not None:
        commands = {"select": wish.select.line, "report": wish.report.line}
    best = None
    if found.best is not None:
        best = {**found.best.values, "command": call.command(found.best)}
    return {
        **_origin(adapter, subspace),
        "commands": commands,
        "limit": str(wish.goal.limit),
        "maximize": wish.goal.maximize,
        "without": sorted(wish.without),
        "prompts": SAME_PROMPTS if wish.report is None else OTHER_PROMPTS,
        "rows": [_evaluated_row(row, rank) for row in found.rows],
        "tried": {name: _tried(name, found, wish) for name in found.tried},
        "best": best,
        "failures": found.failures,
        "notes": found.notes,
    }


def _origin(adapter: LoraAdapter, subspace: SafetySubspace) -> dict[str, Any]:
    return {
        "format": RESULT_FORMAT,
        "made_by": dict(MADE_BY),
        "source": {} if adapter.source is None else adapter.source.to_dict(),
        "subspace": {
            "sha256": subspace.sha256,
            "base": subspace.origin.base,
            "aligned": subspace.origin.aligned,
            "rank": subspace.rank,
        },
    }


def _setting_row(variant: Variant, rank: int) -> dict[str, Any]:
    assert variant.setting is not None and variant.totals is not None
    change, kept = shown(variant)
    return {
        "kind": variant.name,
        "title": variant.title,
        **variant.values,
        "rank": variant.setting.family.rank(rank),
        "relative_change": change,
        "norm_kept": kept,
        "relative_energy_before": variant.totals.relative_energy_before,
        "relative_energy_after": variant.totals.relative_energy_after,
        "rank_error": variant.totals.rank_error,
    }


def _evaluated_row(row: Row, rank: int) -> dict[str, Any]:
    variant = row.variant
    if variant.totals is not None:
        entry = {**_setting_row(variant, rank), "within_limit_when_chosen": row.within}
    else:
        entry = {
            "kind": variant.name,
            "title": variant.title,
            **variant.values,
            "relative_change": row.relative_change,
            "norm_kept": row.norm_kept,
        }
        if variant.setting is not None:
            entry["compared_with"] = variant.setting.to_dict()
    if row.error is not None:
        return {**entry, "metrics": None, "error": row.error}
    return {**entry, "metrics": dict(row.metrics or {})}


def _tried(name: str, found: Found, wish: Wish) -> list[dict[str, Any]]:
    """A family's search. Metrics only where the prompts that chose are those that are told of."""
    entries = []
    for strength, metrics in found.tried[name].items():
        entry: dict[str, Any] = {
            "strength": "inf" if math.isinf(strength) else strength,
            "relative_change": found.changes[name][strength],
            "within_limit": None if metrics is None else wish.goal.within(metrics),
        }
        if wish.report is None:
            entry["metrics"] = None if metrics is None else dict(metrics)
        entries.append(entry)
    return entries


def metric_names(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> list[str]:
    """Of all rows: the well-known ones in their order, then the others by name."""
    names: set[str] = set()
    for row in rows:
        metrics: Metrics = row.get("metrics") or {}
        names |= set(metrics)
    return [n for n in first if n in names] + sorted(names - set(first))
