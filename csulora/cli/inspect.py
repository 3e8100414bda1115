"""`csulora inspect`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from csulora.adapter import LoraAdapter
from csulora.cli.method_options import correction_from
from csulora.cli.output import stdout
from csulora.correction import sweep
from csulora.errors import CsuloraError
from csulora.files.names import natural
from csulora.report import BLOCKS, ModuleReport, Report, Totals
from csulora.settings import Method
from csulora.subspace import SafetySubspace
from csulora.text import one_line

SWEEP = (1.0, 10.0, 100.0, 1000.0, 10000.0, math.inf)
HEADINGS = ("aligned", "part. left", "part. right", "off")


def run(arguments: argparse.Namespace) -> int:
    correction = correction_from(arguments)
    subspace = SafetySubspace.load(arguments.subspace, rank=arguments.subspace_rank)
    try:
        adapter = LoraAdapter.load(arguments.adapter, pass_through=arguments.pass_through)
        strengths = [correction.with_strength(value) for value in SWEEP]
        report, *others = sweep(
            adapter, subspace, [correction, *strengths], device=arguments.device
        )
    except CsuloraError as error:
        text = str(error)
        if arguments.adapter not in text:
            text = f"{arguments.adapter}: {text}"
        print(f"csulora: failed: {one_line(text)}", file=sys.stderr)
        return 1
    if arguments.plot:
        from csulora.plots import plot_shares

        plot_shares(report, Path(arguments.plot))
    if arguments.json:
        effects = [
            {"strength": _number(value), "totals": other.to_dict()["totals"]}
            for value, other in zip(SWEEP, others, strict=True)
        ]
        print(json.dumps({**report.to_dict(), "sweep": effects}))
    else:
        print_report(stdout(), report, correction, list(zip(SWEEP, others, strict=True)))
        if arguments.plot:
            print(f"plot: {one_line(arguments.plot)}")
    for warning in report.warnings:
        print(f"csulora: warning: {one_line(warning)}", file=sys.stderr)
    return 0


def print_report(
    console: Console, report: Report, correction: Method, effects: list[tuple[float, Report]]
) -> None:
    """Two tables: where each module's update lies, and what one strength would leave of it."""
    table = Table(title="Share of the update's energy in each block, in percent")
    table.add_column("module", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("k", justify="right")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column("change", justify="right")
    for name in sorted(report.modules, key=natural):
        module = report.modules[name]
        table.add_row(
            one_line(name), str(module.rank_in), str(module.subspace_rank), *_shares(module)
        )
    table.add_section()
    table.add_row("all modules", "", "", *_shares(report.totals))
    console.print(table)
    console.print(
        f"change: ||dW* - dW|| / ||dW||, {correction}\n",
        soft_wrap=True,
    )
    which = "of realignment" * (correction.method == "realign") or "for the partial and off blocks"
    table = Table(title=f"What is left at one strength {which}, in percent")
    table.add_column("strength", justify="right")
    for heading in (*HEADINGS, "all energy", "change"):
        table.add_column(heading, justify="right")
    for strength, other in effects:
        after = [other.totals.relative_energy_after[block] for block in BLOCKS]
        table.add_row(
            f"{strength:g}",
            *(f"{100 * share:.2f}" for share in (*after, sum(after))),
            f"{other.totals.relative_change:.3f}",
        )
    console.print(table)


def _shares(entry: ModuleReport | Totals) -> list[str]:
    shares = [f"{100 * entry.relative_energy_before[block]:.2f}" for block in BLOCKS]
    return [*shares, f"{entry.relative_change:.3f}"]


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value
