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
from csulora.correction import decompose_each
from csulora.errors import CsuloraError, UsageError
from csulora.files.names import natural
from csulora.geometry import NO_VERDICT, Geometry, Place, geometry
from csulora.report import BLOCKS, ModuleReport, Report, Totals, plain_strength
from csulora.settings import Method
from csulora.subspace import SafetySubspace
from csulora.text import one_line

SWEEP = (1.0, 10.0, 100.0, 1000.0, 10000.0, math.inf)
HEADINGS = ("aligned", "part. left", "part. right", "off")
LYING = ("read gain", "overlap")


def run(arguments: argparse.Namespace) -> int:
    correction = correction_from(arguments)
    if arguments.plot and not arguments.plot.lower().endswith(".png"):
        raise UsageError(f"{one_line(arguments.plot)}: a plot is a PNG, name a .png file")
    subspace = SafetySubspace.load(arguments.subspace, rank=arguments.subspace_rank)
    try:
        adapter = LoraAdapter.load(arguments.adapter, pass_through=arguments.pass_through)
        strengths = [correction.with_strength(value) for value in SWEEP]
        report, *others = decompose_each(
            adapter, subspace, [correction, *strengths], device=arguments.device
        )
        places = geometry(adapter, subspace, device=arguments.device)
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
            {"strength": plain_strength(value), "totals": other.to_dict()["totals"]}
            for value, other in zip(SWEEP, others, strict=True)
        ]
        found = {**report.to_dict(), "sweep": effects, "geometry": places.to_dict()}
        print(json.dumps(found))
    else:
        print_report(stdout(), report, places, correction, list(zip(SWEEP, others, strict=True)))
        if arguments.plot:
            print(f"plot: {one_line(arguments.plot)}")
    for warning in report.warnings:
        print(f"csulora: warning: {one_line(warning)}", file=sys.stderr)
    return 0


def print_report(
    console: Console,
    report: Report,
    places: Geometry,
    correction: Method,
    effects: list[tuple[float, Report]],
) -> None:
    """Where each module's update lies; all by number of directions; what one strength would leave."""
    table = Table(title="Share of the update's energy in each block, in percent")
    table.add_column("module", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("k", justify="right")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for heading in (*LYING, "change"):
        table.add_column(heading, justify="right")
    for name in sorted(report.modules, key=natural):
        module = report.modules[name]
        table.add_row(
            one_line(name),
            str(module.rank_in),
            str(module.subspace_rank),
            *_shares(module, places.modules[name]),
        )
    table.add_section()
    table.add_row("all modules", "", "", *_shares(report.totals, places.totals))
    console.print(table)
    found = "" if report.strength is None else f": strength {report.strength:g}"
    console.print(
        "read gain: how much more the update reads from D's input directions than from random ones; "
        "overlap: cos(dW, D_k), percent\n"
        f"change: ||dW* - dW|| / ||dW||, {correction}{found}\n",
        soft_wrap=True,
    )
    console.print(_by_directions(places))
    for line in (NO_VERDICT, *(f"hint: {hint}" for hint in places.hints)):
        console.print(one_line(line), soft_wrap=True)
    console.print()
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


def _by_directions(places: Geometry) -> Table:
    """The figures of all modules at the leading k directions, k by k."""
    table = Table(title="All modules by number of directions, shares in percent")
    for heading in ("k", *HEADINGS, *LYING):
        table.add_column(heading, justify="right")
    for place in places.totals:
        shares = (f"{100 * place.relative_energy[block]:.2f}" for block in BLOCKS)
        table.add_row(str(place.k), *shares, *_lying(place))
    return table


def _shares(entry: ModuleReport | Totals, places: list[Place]) -> list[str]:
    shares = [f"{100 * entry.relative_energy_before[block]:.2f}" for block in BLOCKS]
    lying = _lying(places[-1]) if places else ["", ""]
    return [*shares, *lying, f"{entry.relative_change:.3f}"]


def _lying(place: Place) -> list[str]:
    return [f"{place.read_gain:.2f}", f"{100 * place.overlap:+.2f}"]
