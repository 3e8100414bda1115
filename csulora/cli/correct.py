"""`csulora correct`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from csulora.batch import Existing, Outcome, correct_many
from csulora.cli import one_line
from csulora.cli.options import correction_from
from csulora.cli.output import progress, stdout
from csulora.errors import UsageError
from csulora.subspace import SafetySubspace


def run(arguments: argparse.Namespace) -> int:
    correction = correction_from(arguments)
    adapters = [*arguments.adapters, *_listed(arguments.adapters_from)]
    subspace = SafetySubspace.load(arguments.subspace, rank=arguments.subspace_rank)
    existing: Existing = "refuse"
    if arguments.overwrite or arguments.resume:
        existing = "overwrite" if arguments.overwrite else "resume"
    with progress("correcting") as report:

        def on_done(outcome: Outcome, done: int, total: int) -> None:
            report(done, total, Path(outcome.adapter).name)

        outcomes = correct_many(
            adapters,
            subspace,
            arguments.out_dir,
            correction,
            dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
            portable=arguments.portable,
            pass_through=arguments.pass_through,
            backend=arguments.backend,
            device=arguments.device,
            jobs=arguments.jobs,
            existing=existing,
            on_done=on_done,
        )
    if arguments.json:
        print(json.dumps({"adapters": [_as_json(outcome) for outcome in outcomes]}))
    else:
        _print(outcomes)
    for outcome in outcomes:
        _complain(outcome)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _listed(source: str | None) -> list[str]:
    """Adapters named in a file or on standard input, one a line; blank lines do not count."""
    if source is None:
        return []
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: cannot be read ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _print(outcomes: list[Outcome]) -> None:
    console = stdout()
    for outcome in outcomes:
        if outcome.status == "failed":
            continue
        place = one_line(outcome.output)
        if outcome.report is None:
            console.print(f"{place}: finished before, skipped", soft_wrap=True)
            continue
        total = outcome.report.totals
        kept = total.energy_after / total.energy_before if total.energy_before else 1.0
        console.print(
            f"{place}: {total.modules} modules, {kept:.1%} of the energy kept, "
            f"relative change {total.relative_change:.3f}",
            soft_wrap=True,
        )
    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("corrected", "skipped", "failed")
    }
    console.print(", ".join(f"{n} {status}" for status, n in counts.items() if n))


def _complain(outcome: Outcome) -> None:
    if outcome.error is not None:
        name = outcome.adapter
        text = outcome.error if name in outcome.error else f"{name}: {outcome.error}"
        print(f"csulora: failed: {one_line(text)}", file=sys.stderr)
    if outcome.report is None:
        return
    warnings = list(outcome.report.warnings)
    passed = outcome.report.passed_through
    if passed:
        warnings.append(f"{len(passed)} tensor(s) copied uncorrected: {', '.join(passed[:3])}")
    if outcome.left_out:
        names = ", ".join(outcome.left_out[:3])
        warnings.append(f"not copied, being other weights or links to folders: {names}")
    for warning in warnings:
        print(f"csulora: warning: {one_line(f'{outcome.adapter}: {warning}')}", file=sys.stderr)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "adapter": outcome.adapter,
        "output": str(outcome.output),
        "status": outcome.status,
    }
    if outcome.error is not None:
        entry["error"] = outcome.error
    if outcome.report is not None:
        report = outcome.report.to_dict()
        entry |= {key: report[key] for key in ("totals", "passed_through", "warnings")}
        entry["left_out"] = list(outcome.left_out)
    return entry
