"""`csulora prewarm`."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch

from csulora.cli.correct import cores
from csulora.cli.output import progress, say, stdout
from csulora.cli.served_adapters import served_adapters
from csulora.cli.signals import Ended, Interruption, gentle
from csulora.errors import UsageError
from csulora.serving.audit import silent
from csulora.serving.config import named
from csulora.serving.guard import Admitted, Guard, RefusedError
from csulora.text import one_line

FORMAT = "csulora_prewarm/1"


def run(arguments: argparse.Namespace) -> int:
    config = named(arguments.config)
    jobs = cores() if arguments.jobs is None else arguments.jobs
    for option, value in (("--jobs", jobs), ("--max-lora-rank", arguments.max_lora_rank)):
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, not {value}")
    folders = served_adapters(arguments.adapters, config)
    torch.set_num_threads(1)  # a product's own threads would wait for each other
    # A server in mode "require" takes what is made here.
    guard = Guard(replace(config, mode="correct"), at_once=jobs)
    with silent():
        guard.open()
        found = _admitted(guard, folders, jobs, arguments.max_lora_rank)
    entries = [_entry(guard, *one) for one in found.items()]
    counts = Counter(entry["how"] for entry in entries)
    if arguments.json:
        print(json.dumps({"format": FORMAT, "adapters": entries, "counts": counts}))
    else:
        text = ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))
        stdout().print(f"{text}: {guard.cache.root}", soft_wrap=True)
    return 1 if counts["failed"] else 0


def _admitted(
    guard: Guard, folders: list[str], jobs: int, limit: int | None
) -> dict[str, Admitted | RefusedError]:
    """What became of each, in order; complaints and progress on stderr."""
    found: dict[str, Admitted | RefusedError] = {}
    interrupted = Interruption()
    with (
        progress("prewarming") as report,
        gentle(interrupted, report.say),
        ThreadPoolExecutor(jobs) as pool,
    ):
        waiting = {pool.submit(_admit, guard, folder, limit): folder for folder in folders}
        for done in _finished(waiting, interrupted):
            folder, result = waiting[done], done.result()
            found[folder] = result
            if isinstance(result, RefusedError):
                report.say(_complaint(folder, str(result)))
            else:
                for warning in result.warnings:
                    report.say(f"csulora: warning: {one_line(f'{folder}: {warning}')}")
            report(len(found), len(waiting), os.path.basename(folder))
    if interrupted.is_set():
        raise Ended(interrupted.number)
    return {folder: _kept(guard, folder, found[folder]) for folder in folders}


def _kept(guard: Guard, folder: str, result: Admitted | RefusedError) -> Admitted | RefusedError:
    """The result, or a failure where its entry had to go again for others."""
    if isinstance(result, RefusedError) or result.key is None or guard.cache.unchanged(result.key):
        return result
    error = RefusedError("evicted", "its entry was removed again: cache_bytes is too small for all")
    say(_complaint(folder, str(error)))
    return error


def _finished(waiting: dict[Future[Any], str], interrupted: Interruption) -> Iterator[Future[Any]]:
    """Futures as they end; after a signal those that have begun."""
    try:
        for done in as_completed(waiting):
            if interrupted.is_set():
                _cancel(waiting)
            if not done.cancelled():
                yield done
    finally:  # the pool waits for all that is left
        _cancel(waiting)


def _cancel(waiting: Iterable[Future[Any]]) -> None:
    for one in waiting:
        one.cancel()


def _admit(guard: Guard, folder: str, limit: int | None) -> Admitted | RefusedError:
    try:
        admitted = guard.admit(folder, os.path.basename(os.path.abspath(folder)), max_rank=limit)
    except RefusedError as error:
        return error
    if admitted.key is not None:  # what is made here may go again before what servers hold
        guard.cache.release(admitted.key)
    return admitted


def _complaint(folder: str, text: str) -> str:
    return f"csulora: failed: {one_line(text if folder in text else f'{folder}: {text}')}"


def _entry(guard: Guard, folder: str, result: Admitted | RefusedError) -> dict[str, Any]:
    """What `--json` says of an adapter."""
    if isinstance(result, RefusedError):
        entry = {"adapter": folder, "how": "failed"}
        return entry | {"reason": result.reason, "error": str(result)}
    return {
        "adapter": folder,
        "how": result.how,
        "path": str(result.path),
        "rank": result.rank,
        "form": result.form,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }
