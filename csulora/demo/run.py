"""The demo itself: correct a poisoned adapter in several ways and measure what is left of it."""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import csulora
from csulora import baselines, plots
from csulora.demo import extras, reading, tradeoff
from csulora.demo.evaluate import Evaluator, Metrics
from csulora.demo.settings import (
    ADDED_BACK,
    ALIGNED,
    FAMILIES,
    RAW,
    SCALED_CHANGE,
    SCALED_NORM,
    SUBSPACE_RANK,
    Family,
    Row,
)

if TYPE_CHECKING:
    from rich.console import Console

ASSETS = Path(__file__).parent / "assets"


def run_demo(
    out_dir: Path,
    console: Console,
    *,
    assets: Path = ASSETS,
    strengths: Sequence[float] | None = None,
) -> dict:
    """Run the whole demo, print its tables and reading, and write figures and numbers to `out_dir`.

    `assets` holds base, aligned, adapter and card.json as bench/train_demo.py writes them; every
    family of corrections runs at its own strengths, or at all `strengths`. Writes results.json,
    tradeoff.png and shares.png; returns what results.json holds. Raises CsuloraError if a package of
    `csulora[demo]` is missing.
    """
    extras.require()
    out_dir.mkdir(parents=True, exist_ok=True)
    card = json.loads((assets / "card.json").read_text())
    reading.print_introduction(console, card)
    with one_thread(), console.status("correcting and measuring"):
        adapter = csulora.LoraAdapter.load(assets / "adapter")
        subspace = csulora.estimate(
            assets / "base", assets / "aligned", rank=SUBSPACE_RANK, like=assets / "adapter"
        )
        shares = csulora.decompose(adapter, subspace, csulora.Correction())
        rows = list(measure_all(adapter, subspace, Evaluator(assets / "aligned"), strengths))
    result = {
        "card": card,
        "environment": environment(),
        "subspace_rank": SUBSPACE_RANK,
        "relative_energy": shares.totals.relative_energy_before,
        "rows": [as_json(row) for row in rows],
    }
    (out_dir / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    plots.plot_shares(shares, out_dir / "shares.png")
    tradeoff.save(rows, out_dir / "tradeoff.png")
    reading.print_results(console, rows, result)
    console.print(f"Written to {out_dir}: results.json, tradeoff.png, shares.png", soft_wrap=True)
    return result


def measure_all(
    adapter: csulora.LoraAdapter,
    subspace: csulora.SafetySubspace,
    evaluator: Evaluator,
    strengths: Sequence[float] | None,
) -> Iterator[Row]:
    """The aligned model, the raw adapter, and every corrected adapter followed by its controls."""
    yield Row(ALIGNED, None, 0.0, 1.0, evaluator.measure())
    yield Row(RAW, None, 1.0, 0.0, measure(adapter, evaluator))
    for family in FAMILIES:
        used = subspace.leading(family.k)
        if family.random_subspace:
            used = baselines.random_subspace(used)
        for strength in strengths or family.strengths:
            corrected, report = csulora.correct(
                adapter, used, family.settings.with_strength(strength)
            )
            found = Row(
                family.key,
                strength,
                baselines.equal_norm_factor(report.totals),
                report.totals.relative_change,
                measure(corrected, evaluator),
            )
            yield found
            yield from controls(adapter, used, evaluator, family, found)


def controls(
    adapter: csulora.LoraAdapter,
    subspace: csulora.SafetySubspace,
    evaluator: Evaluator,
    family: Family,
    of: Row,
) -> Iterator[Row]:
    """What any correction of that norm, or of that change, has to beat."""
    if family.random_subspace:
        return
    factors = {SCALED_NORM: of.norm_kept, SCALED_CHANGE: baselines.equal_change_factor(of.change)}
    for name, factor in factors.items():
        metrics = measure(baselines.scaled(adapter, factor), evaluator)
        yield Row(family.key, of.strength, factor, 1 - factor, metrics, name)
    gamma = baselines.gamma_for_change(adapter, subspace, of.change)
    added = baselines.add_back(adapter, subspace, gamma)
    norm = math.sqrt(baselines.energy(added) / baselines.energy(adapter))
    change = baselines.relative_change(adapter, added)
    yield Row(family.key, of.strength, norm, change, measure(added, evaluator), ADDED_BACK)


def measure(adapter: csulora.LoraAdapter, evaluator: Evaluator) -> Metrics:
    """Write `adapter` as a PEFT folder and measure it as PEFT loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        adapter.save(folder)
        return evaluator.measure(folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread while the demo computes: on matrices this small, more of them only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_json(row: Row) -> dict:
    """A row for results.json; JSON has no infinity, so the hard limit is the string "inf"."""
    return {
        "family": row.family,
        "control": row.control,
        "strength": "inf" if row.strength == math.inf else row.strength,
        "norm_kept": round(row.norm_kept, 6),
        "change": round(row.change, 6),
        **row.metrics.as_dict(),
    }


def environment() -> dict[str, str]:
    """Versions and processor of this run."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "csulora": csulora.__version__,
    }
