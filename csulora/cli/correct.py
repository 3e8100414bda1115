"""`csulora correct`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from csulora.batch import Call, find, pick_engine, stream
from csulora.batch.sources import PassedOver, check_targets
from csulora.batch.summary import Summary, probe
from csulora.cli.batch_summary import print_summary
from csulora.cli.method_options import correction_from
from csulora.cli.output import progress, say, stdout
from csulora.cli.signals import Ended, Interruption, gentle
from csulora.errors import CsuloraError, UsageError
from csulora.folder import Existing, Recipe
from csulora.outcome import Outcome
from csulora.output import check_replaceable
from csulora.pipeline.backend import pick_device
from csulora.report import plain_strength
from csulora.subspace import SafetySubspace
from csulora.text import listed, one_line

FORMAT = "csulora_outcomes/1"
# More adapters than this are summed up in a table; fewer get a line each.
LINES = 20
LONGEST_LIST = 1 << 28  # bytes of names


def run(arguments: argparse.Namespace) -> int:
    call, passed_over = _call(arguments), PassedOver([], [])
    named = [*arguments.adapters, *_listed(arguments.adapters_from)]
    items = find(named, call.out_dir, passed_over)
    for line in passed_over.told():
        say(f"csulora: warning: {one_line(line)}")
    start = pick_engine(arguments.engine, arguments.ray_address, arguments.jobs)
    page = None if arguments.page is None else Path(arguments.page)
    if page is not None:
        from csulora.batch.page import check_page

        check_page(page)
    subspace = SafetySubspace.load(arguments.subspace, rank=arguments.subspace_rank)
    copy_speed = None
    if arguments.probe:
        check_targets(items, call.out_dir)
        copy_speed = probe(items, call.out_dir)
    summary = Summary(len(items), copy_speed)
    results = _JsonResults() if arguments.json else _TextResults(len(items))
    interrupted = Interruption()
    try:
        outcomes = partial(stream, items, subspace, call, start, interrupted)
        _through(outcomes, len(items), call.existing, summary, results, interrupted)
    except KeyboardInterrupt as stop:  # Ray makes its own of any that comes while it waits
        results.end(summary)
        raise stop if isinstance(stop, Ended) else Ended(interrupted.number) from None
    left = summary.failures["not started"]
    if left:
        first = one_line(summary.examples["not started"])
        say(f"csulora: failed: {left} adapters were not started, the first: {first}")
    results.end(summary)
    if page is not None:
        from csulora.batch.page import write_page

        write_page(summary, page)
    if interrupted.is_set():
        raise Ended(interrupted.number)
    return 1 if summary.counts["failed"] else 0


def _through(
    outcomes: Callable[[Callable[[str], object]], Generator[Outcome, None, None]],
    total: int,
    existing: Existing,
    summary: Summary,
    results: _JsonResults | _TextResults,
    interrupted: Interruption,
) -> None:
    """Each outcome, as it comes, to summary, results and progress."""
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray prints, of lost workers for one
        progress("correcting") as report,
        gentle(interrupted, report.say),
        contextlib.closing(outcomes(partial(_warn, report.say))) as found,
    ):
        for outcome in found:
            outcome = _with_remedy(outcome, existing)
            summary.add(outcome)
            results.add(outcome)
            for line in _complaints(outcome):
                report.say(f"csulora: {one_line(line)}")
            report(sum(summary.counts.values()), total, Path(outcome.adapter).name)


def _with_remedy(outcome: Outcome, existing: Existing) -> Outcome:
    """The outcome with what to do about it in the words of this command."""
    if outcome.kind == "exists" and existing == "refuse":
        return replace(outcome, error=f"{outcome.error}; pass --overwrite or --resume")
    if outcome.kind == "changed":
        with contextlib.suppress(CsuloraError, OSError):
            check_replaceable(outcome.output)
            return replace(outcome, error=f"{outcome.error}; pass --overwrite to replace it")
    return outcome


def _out_dir(given: str) -> Path:
    if not given:  # Path would take it for the current folder
        raise UsageError("--out-dir is empty; '.' is the current folder")
    return Path(given)


def _call(arguments: argparse.Namespace) -> Call:
    existing: Existing = "refuse"
    if arguments.overwrite or arguments.resume:
        existing = "overwrite" if arguments.overwrite else "resume"
    on_cpu = pick_device(arguments.device).type == "cpu"
    if on_cpu:
        # Parallel over adapters, not within one: no waiting between threads of one product where
        # cores are shared, and the bytes of a result do not depend on the number of cores.
        torch.set_num_threads(1)
    recipe = Recipe(
        correction=correction_from(arguments),
        dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
        portable=arguments.portable,
        pass_through=arguments.pass_through,
        again=arguments.again,
        strict_base=arguments.strict_base,
        backend=arguments.backend,
        device=arguments.device,
    )
    return Call(
        out_dir=_out_dir(arguments.out_dir),
        recipe=recipe,
        existing=existing,
        jobs=(cores() if on_cpu else 1) if arguments.jobs is None else arguments.jobs,
        batch_bytes=arguments.batch_bytes,
    )


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _listed(source: str | None) -> list[str]:
    """Adapters named in a file or on standard input, one a line or ended by NUL as `find -print0` does.

    Blank lines do not count.
    """
    if source is None:
        return []
    try:
        text = os.fsdecode(_standard_input() if source == "-" else _start(source))
        if len(text) > LONGEST_LIST:
            raise ValueError(f"more than {LONGEST_LIST} bytes")
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: cannot be read ({error})") from None
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        return [name for name in text.split("\0") if name.strip()]
    return [line.strip() for line in text.split("\n") if line.strip()]


def _start(source: str) -> bytes:
    """Of a file, or of a pipe as a shell makes them: what a list may have, and a byte more."""
    with open(source, "rb") as file:
        return file.read(LONGEST_LIST + 1)


def _standard_input() -> str | bytes:
    """The same; names of files need not be UTF-8."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return getattr(sys.stdin, "buffer", sys.stdin).read(LONGEST_LIST + 1)


def _warn(say: Callable[[str], None], text: str) -> None:
    say(f"csulora: warning: {one_line(text)}")


class _TextResults:
    """A line for each of a few adapters, then the table."""

    def __init__(self, total: int) -> None:
        self._console = stdout()
        self._lines: list[str] = []
        self._wanted = total <= LINES

    def add(self, outcome: Outcome) -> None:
        if self._wanted and outcome.status != "failed":
            self._lines.append(_as_line(outcome))

    def end(self, summary: Summary) -> None:
        for line in self._lines:
            self._console.print(line, soft_wrap=True)
        print_summary(self._console, summary)


class _JsonResults:
    """{"format": ..., "adapters": [...], "summary": {...}}, an adapter a line, written as they come."""

    def __init__(self) -> None:
        self._out = sys.stdout
        self._before = f'{{"format": "{FORMAT}", "adapters": [\n'

    def add(self, outcome: Outcome) -> None:
        self._out.write(self._before + json.dumps(_as_json(outcome)))
        self._before = ",\n"

    def end(self, summary: Summary) -> None:
        if self._before != ",\n":
            self._out.write(self._before)
        self._out.write(f'\n], "summary": {json.dumps(summary.to_dict())}}}\n')
        self._out.flush()


def _as_line(outcome: Outcome) -> str:
    output = one_line(outcome.output)
    total = outcome.totals
    if outcome.status == "skipped" or total is None:
        return f"{output}: finished before, skipped"
    kept = total.energy_after / total.energy_before if total.energy_before else 1.0
    strength = None if outcome.report is None else outcome.report.strength
    found = "" if strength is None else f", strength {strength:g}"
    return (
        f"{output}: {total.modules} modules, {kept:.1%} of the energy kept, "
        f"relative change {total.relative_change:.3f}{found}"
    )


def _complaints(outcome: Outcome) -> Iterator[str]:
    if outcome.error is not None and outcome.kind != "not started":
        name = outcome.adapter
        text = outcome.error if name in outcome.error else f"{name}: {outcome.error}"
        yield f"failed: {text}"
    if outcome.report is None:
        return
    warnings = list(outcome.report.warnings)
    passed = outcome.report.passed_through
    if passed:
        warnings.append(f"{len(passed)} tensor(s) copied uncorrected: {', '.join(passed[:3])}")
    if outcome.left_out:
        names = listed(outcome.left_out)
        warnings.append(
            f"not copied, being other weights, training states or links to folders: {names}"
        )
    for warning in warnings:
        yield f"warning: {outcome.adapter}: {warning}"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "adapter": outcome.adapter,
        "output": str(outcome.output),
        "status": outcome.status,
    }
    if outcome.error is not None:
        entry |= {"error": outcome.error, "kind": outcome.kind}
    if outcome.totals is not None:
        entry["totals"] = asdict(outcome.totals)
    if outcome.report is not None:
        entry |= {
            "passed_through": outcome.report.passed_through,
            "warnings": outcome.report.warnings,
            "left_out": list(outcome.left_out),
            "seconds": outcome.seconds,
        }
        if outcome.report.strength is not None:
            entry["strength"] = plain_strength(outcome.report.strength)
    return entry
