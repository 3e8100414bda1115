"""`csulora sweep`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from csulora.adapter import LoraAdapter
from csulora.cli.output import progress, say, stdout
from csulora.errors import CsuloraError, UsageError
from csulora.pipeline.backend import pick_device
from csulora.report import BLOCKS
from csulora.subspace import SafetySubspace
from csulora.sweep.command import Command
from csulora.sweep.controls import Material, Variant, check_source, check_without, of_setting
from csulora.sweep.energies import Energies
from csulora.sweep.evaluate import Evaluation, Found, Wish
from csulora.sweep.grid import STRENGTHS, Family, Setting, checked_strengths, families
from csulora.sweep.metrics import KNOWN, Goal, Limit
from csulora.sweep.picture import ENERGIES, FRONTIER, draw_energies, draw_frontier
from csulora.sweep.place import RESULT, Place
from csulora.sweep.result import Call, metric_names, of_energies, of_evaluation
from csulora.sweep.search import STEPS
from csulora.sweep.search import Path as StrengthPath
from csulora.text import one_line

LIMIT, MAXIMIZE = "complied<=0.1", "utility"
HEADINGS = ("aligned", "part. left", "part. right", "off")
# Options that mean nothing without an evaluation.
_EVALUATING = ("limit", "maximize", "steps", "jobs", "timeout", "without", "overwrite")


def run(arguments: argparse.Namespace) -> int:
    wish = _wish(arguments)
    if not arguments.out_dir:  # Path would take it for the current folder
        raise UsageError("--out-dir is empty; '.' is the current folder")
    if pick_device(arguments.device).type == "cpu":
        torch.set_num_threads(1)  # as `correct` does: the same bytes on any number of cores
    subspace = SafetySubspace.load(arguments.subspace)
    grid = families(
        subspace.rank,
        methods=arguments.methods,
        forms=arguments.forms,
        granularities=arguments.granularities,
        ranks=arguments.ranks,
    )
    strengths = checked_strengths(arguments.strengths or STRENGTHS)
    try:
        adapter = LoraAdapter.load(arguments.adapter, pass_through=arguments.pass_through)
        if wish is not None:
            check_source(adapter)
        energies = Energies(adapter, subspace, grid, device=arguments.device)
    except CsuloraError as error:
        text = str(error)
        if arguments.adapter not in text:
            text = f"{arguments.adapter}: {text}"
        say(f"csulora: failed: {one_line(text)}")
        return 1
    source = None if adapter.source is None else adapter.source.folder
    with _place(Path(arguments.out_dir), source, arguments.overwrite) as place:
        if wish is None:
            return _energies(arguments, adapter, subspace, energies, grid, strengths, place)
        return _evaluation(arguments, adapter, subspace, energies, grid, wish, place)


def _energies(
    arguments: argparse.Namespace,
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    energies: Energies,
    grid: Sequence[Family],
    strengths: Sequence[float],
    place: Place,
) -> int:
    variants: list[Variant] = []
    for family in grid:
        totals = energies.totals(family, strengths)
        pairs = zip(strengths, totals, strict=True)
        variants += [of_setting(Setting(family, x), one) for x, one in pairs]
    result = of_energies(adapter, subspace, variants, energies.rank)
    place.write(result)
    note = _drawn(lambda: draw_energies(variants, place.path / ENERGIES))
    if arguments.json:
        print(json.dumps(result))
    else:
        console = stdout()
        _print_energies(console, result)
        _print_files(console, place, ENERGIES, note)
    _say_note(note)
    return 0


def _evaluation(
    arguments: argparse.Namespace,
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    energies: Energies,
    grid: Sequence[Family],
    wish: Wish,
    place: Place,
) -> int:
    material = Material(adapter, subspace, arguments.device)
    paths = [StrengthPath(energies, family) for family in grid]
    with progress("evaluating") as bar:
        found = Evaluation(material, wish, place, bar, lambda line: bar.say(one_line(line))).run(
            paths
        )
    options = ["--pass-through"] * arguments.pass_through
    if arguments.device != "auto":
        options += ["--device", arguments.device]
    call = Call(arguments.adapter, arguments.subspace, arguments.out_dir, options)
    result = of_evaluation(adapter, subspace, wish, found, call, energies.rank)
    place.write(result)
    note = _drawn(lambda: draw_frontier(result, wish.goal, place.path / FRONTIER))
    if arguments.json:
        print(json.dumps(result))
    else:
        console = stdout()
        _print_evaluation(console, result, found, wish)
        _print_files(console, place, FRONTIER, note)
    _say_note(note)
    return 1 if found.failures else 0


def _wish(arguments: argparse.Namespace) -> Wish | None:
    """What is asked of an evaluation, None where none is given."""
    if arguments.eval is not None and (arguments.select or arguments.report):
        raise UsageError("--eval is one command for both; --select and --report are two")
    if (arguments.select is None) != (arguments.report is None):
        raise UsageError("--select and --report belong together: one chooses, the other reports")
    first = arguments.eval if arguments.eval is not None else arguments.select
    if first is None:
        values = {name: getattr(arguments, name) for name in _EVALUATING}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if given:
            raise UsageError(f"--{given[0]} needs --eval, or --select and --report")
        return None
    if arguments.select is not None and arguments.select == arguments.report:
        raise UsageError("--select and --report are the same command: that is --eval")
    without = frozenset(arguments.without or ())
    check_without(without)
    for name, least in (("jobs", 1), ("steps", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}, not {value}")
    if arguments.timeout is not None and not 0 < arguments.timeout < 1e9:
        raise UsageError(
            f"--timeout must be a number of seconds above 0, not {arguments.timeout:g}"
        )
    maximize = MAXIMIZE if arguments.maximize is None else arguments.maximize
    coarse = None if arguments.strengths is None else checked_strengths(arguments.strengths)
    return Wish(
        select=Command(first),
        report=None if arguments.report is None else Command(arguments.report),
        goal=Goal(Limit.parse(arguments.limit or LIMIT), maximize),
        coarse=coarse,
        steps=STEPS if arguments.steps is None else arguments.steps,
        jobs=1 if arguments.jobs is None else arguments.jobs,
        timeout=arguments.timeout,
        without=without,
    )


@contextlib.contextmanager
def _place(out_dir: Path, source: Path | None, fresh: bool) -> Iterator[Place]:
    place = Place(out_dir, source, fresh=fresh)
    try:
        yield place
    finally:
        place.close()


def _print_energies(console: Console, result: Mapping[str, Any]) -> None:
    table = Table(title="What each setting leaves of the update's energy, in percent")
    for heading in ("method", "form"):
        table.add_column(heading)
    for heading in ("k", "strength", "rank", "change", "norm kept", *HEADINGS, "rank error"):
        table.add_column(heading, justify="right")
    before = None
    for row in result["rows"]:
        settings = row["settings"]
        form = " ".join(x for x in (settings.get("granularity"), settings["form"]) if x)
        if before not in (None, (settings["method"], form, settings["k"])):
            table.add_section()
        before = settings["method"], form, settings["k"]
        shares = (f"{100 * row['relative_energy_after'][block]:.2f}" for block in BLOCKS)
        table.add_row(
            settings["method"],
            form,
            str(settings["k"]),
            _strength(settings),
            str(row["rank"]),
            f"{row['relative_change']:.3f}",
            f"{row['norm_kept']:.3f}",
            *shares,
            f"{row['rank_error']:.3f}",
        )
    console.print(table)
    console.print(
        "change: ||dW* - dW|| / ||dW||; norm kept: ||dW*|| / ||dW||. Energies do not tell which setting "
        "is best: --eval does.",
        soft_wrap=True,
    )


def _print_evaluation(
    console: Console, result: Mapping[str, Any], found: Found, wish: Wish
) -> None:
    rows = result["rows"]
    names = metric_names(rows, KNOWN)
    table = Table(
        title=f"The best of each family at {wish.goal.limit}, and what it is compared with"
    )
    table.add_column("")
    for heading in ("rank", "change", "norm kept", *names):
        table.add_column(one_line(heading), justify="right")
    before = None
    for row, one in zip(rows, found.rows, strict=True):
        of = str(one.variant.setting) if "compared_with" in row else None
        if of != before:
            table.add_section()
            table.add_row(f"beside {of}:")
        before = of
        beyond = " (beyond the limit)" * (row.get("within_limit_when_chosen") is False)
        metrics = row["metrics"] or {}
        table.add_row(
            "  " * (of is not None) + row["title"] + beyond,
            str(row.get("rank", "")),
            f"{row['relative_change']:.3f}",
            f"{row['norm_kept']:.3f}",
            *(f"{metrics[name]:.3f}" if name in metrics else "-" for name in names),
        )
    console.print(table)
    lines = [f"{text[0].upper()}{text[1:]}." for text in (result["prompts"], *result["notes"])]
    best = result["best"]
    if best is None:
        lines.append(f"No setting that was tried is within {wish.goal.limit}.")
    else:
        assert found.best is not None
        lines += [
            f"Best setting: {found.best.title}. To apply it:",
            "",
            f"    {best['command']}",
            "",
        ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_files(console: Console, place: Place, picture: str, note: str | None) -> None:
    files = RESULT if note else f"{RESULT}, {picture}"
    console.print(f"Written to {one_line(place.path)}: {files}", soft_wrap=True)


def _drawn(draw: Any) -> str | None:
    """Draw a picture; what stood in its way, as without matplotlib everything else is there."""
    try:
        draw()
    except CsuloraError as error:
        return str(error)
    return None


def _say_note(note: str | None) -> None:
    if note is not None:
        print(f"csulora: warning: no picture: {one_line(note)}", file=sys.stderr)


def _strength(settings: Mapping[str, Any]) -> str:
    value = settings["strength"] if settings["method"] == "realign" else settings["lambda_off"]
    return value if isinstance(value, str) else f"{value:g}"
