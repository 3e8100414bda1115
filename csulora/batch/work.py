"""What is done with one adapter of a run: known without reading it, read, corrected, written.

Every engine calls these functions, so the outputs do not depend on the engine. Each step returns the
next step's input, or a Done where the adapter's way ends; none of them raises for a single adapter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from csulora.adapter import REPORT, WEIGHTS, LoraAdapter, identify
from csulora.backend import pick_device
from csulora.batch.outcome import Done, Kind, Outcome, Run, Status
from csulora.batch.sources import Item
from csulora.correction import correct_batch
from csulora.errors import CsuloraError, DiskFullError, UsageError
from csulora.files import read_json, recover_folders
from csulora.peft_config import FILE as CONFIG
from csulora.report import Report, Totals
from csulora.subspace import SafetySubspace

# A file changed this shortly before it is read may change again without its times showing it.
SETTLED_NS = 2_000_000_000

Entry = Callable[[str], dict[str, Any] | None]
State = list[list[int]] | None
Sift = Callable[["Task"], Done | None]


class Task(NamedTuple):
    """An adapter still to be done."""

    number: int
    item: Item
    again: bool = False  # a worker died over it, perhaps after the output was in place


class Loaded(NamedTuple):
    task: Task
    adapter: LoraAdapter
    state: State
    size: int
    seconds: float


class Corrected(NamedTuple):
    loaded: Loaded
    adapter: LoraAdapter
    report: Report
    seconds: float


def sift(run: Run, entry: Entry, task: Task) -> Done | None:
    """The end of an adapter about which nothing has to be read, if the folders and journal say so."""
    target = run.call.out_dir / task.item.target
    if run.call.existing == "overwrite" or not os.path.lexists(target):
        return None
    if run.call.existing == "refuse":
        return failed(
            run, task, "exists", f"{target}: already exists; pass --overwrite or --resume"
        )
    known = entry(task.item.target)
    if known is None or known.get("settings") != run.digest or known.get("files") is None:
        return None
    if known["files"] != _state(task.item.source, target):
        return None
    try:
        total = Totals(**known["totals"])
    except (KeyError, TypeError):
        return None
    return Done(task.number, Outcome(task.item.source, target, "skipped", totals=total), line=None)


def read(run: Run, task: Task) -> Loaded | Done:
    """The adapter in memory; when resuming, the end of one whose output is there already."""
    start = time.perf_counter()
    target = run.call.out_dir / task.item.target
    try:
        if task.item.local and not os.path.lexists(task.item.source):
            raise CsuloraError(f"{task.item.source}: no such folder any more")
        if (run.call.existing == "resume" or task.again) and os.path.lexists(target):
            done = _recognise(run, task, target)
            if not (task.again and run.call.existing == "overwrite" and done.outcome.error):
                return done
        state = _settled(_state(task.item.source))
        adapter = LoraAdapter.load(
            task.item.source,
            pass_through=run.call.pass_through,
            pin_memory=pick_device(run.call.device).type == "cuda",
        )
        return Loaded(task, adapter, state, _size(adapter), time.perf_counter() - start)
    except Exception as error:
        return _failure(run, task, "source", error)


def correct_group(
    run: Run, subspace: SafetySubspace, group: list[Loaded]
) -> list[Corrected | Done]:
    """The corrected adapters of a group, in its order."""
    start = time.perf_counter()
    adapters = [loaded.adapter for loaded in group]
    try:
        results = correct_batch(
            adapters,
            subspace,
            run.call.correction,
            dtype=run.call.dtype,
            portable=run.call.portable,
            backend=run.call.backend,
            device=run.call.device,
        )
    except Exception as error:
        if len(group) == 1:
            return [_failure(run, group[0].task, "correction", error)]
        # One of them is at fault; alone it fails alone.
        return [done for one in group for done in correct_group(run, subspace, [one])]
    seconds = (time.perf_counter() - start) / len(group)
    return [
        _failure(run, loaded.task, "correction", result)
        if isinstance(result, CsuloraError)
        else Corrected(loaded, *result, seconds)
        for loaded, result in zip(group, results, strict=True)
    ]


def write(run: Run, corrected: Corrected) -> Done:
    """The output in place, and what the journal will say of it."""
    start = time.perf_counter()
    loaded, report = corrected.loaded, corrected.report
    task = loaded.task
    target = run.call.out_dir / task.item.target
    try:
        left_out = corrected.adapter.save(
            target, overwrite=run.call.existing == "overwrite", report=report.to_dict()
        )
        written = _looks(target, WEIGHTS, REPORT)
    except Exception as error:
        kind: Kind = "disk full" if isinstance(error, DiskFullError) else "writing"
        return _failure(run, task, kind, error)
    outcome = Outcome(
        task.item.source,
        target,
        "corrected",
        report=replace(report, modules={}),
        left_out=tuple(left_out),
        totals=report.totals,
        seconds=loaded.seconds + corrected.seconds + time.perf_counter() - start,
        bytes_in=loaded.size,
        bytes_out=written[0][0],
    )
    state = None if loaded.state is None else loaded.state + written
    return Done(task.number, outcome, _line(task, run.digest, report.source, report.totals, state))


def failed(run: Run, task: Task, kind: Kind, error: str) -> Done:
    """The end of an adapter that could not be corrected."""
    place = run.call.out_dir / task.item.target
    return Done(task.number, Outcome(task.item.source, place, "failed", error=error, kind=kind))


def weights_size(task: Task) -> int:
    """Bytes of an adapter's weights as far as one look tells, 0 for a hub id."""
    try:
        return os.stat(os.path.join(task.item.source, WEIGHTS)).st_size
    except OSError:
        return 0


def _failure(run: Run, task: Task, kind: Kind, error: Exception) -> Done:
    if isinstance(error, UsageError):
        raise error
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or task.item.source}: {error.strerror or error}"
    elif not isinstance(error, CsuloraError):
        # Unforeseen, but still this adapter's failure only: name the kind, keep to one line.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        kind, text = "unforeseen", f"{task.item.source}: {reason}"
    return failed(run, task, kind, text)


def _recognise(run: Run, task: Task, target: Path) -> Done:
    """The end of an adapter by the report in its output: made of the same, or of something else."""
    if not (target / WEIGHTS).exists() or not (target / REPORT).exists():
        return failed(
            run,
            task,
            "exists",
            f"{target}: not an output of csulora; pass --overwrite to replace it",
        )
    source = task.item.source
    state = _settled(_state(source, target))
    report = read_json(target / REPORT)
    found = identify(source)
    wanted = {"name": found.name, "sha256": found.sha256, "config_sha256": found.config_sha256}
    made = {"settings": run.settings, "subspace": run.subspace, "source": wanted}
    changed = [key for key in made if report.get(key) != made[key]]
    if changed:
        return failed(
            run,
            task,
            "changed",
            f"{target}: was made with other {' and '.join(changed)}; "
            "pass --overwrite to replace it",
        )
    total = Totals(**report["totals"])
    status: Status = "corrected" if task.again else "skipped"
    outcome = Outcome(source, target, status, totals=total)
    return Done(task.number, outcome, _line(task, run.digest, wanted, total, state))


def _line(
    task: Task, digest: str, source: dict[str, Any], total: Totals, state: State
) -> dict[str, Any]:
    return {
        "output": task.item.target,
        "source": source,
        "settings": digest,
        "result": "corrected",
        "totals": asdict(total),
        "files": state,
    }


def _state(source: str, target: Path | None = None) -> State:
    """What the file system says of the files that decide: the source's two, and the output's two.

    [size, mtime, ctime, inode] of each; all of them unchanged means that nothing has to be read.
    None if one is not there, as with a hub id.
    """
    try:
        return _looks(source, WEIGHTS, CONFIG) + (_looks(target, WEIGHTS, REPORT) if target else [])
    except OSError:
        return None


def _looks(folder: str | Path, *names: str) -> list[list[int]]:
    found = [os.stat(os.path.join(folder, name)) for name in names]
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in found]


def _settled(state: State) -> State:
    """None if a source file changed a moment ago, so that a later look could miss a further change."""
    if state is None:
        return None
    newest = max(max(mtime, ctime) for _, mtime, ctime, _ in state[:2])
    return state if time.time_ns() - newest > SETTLED_NS else None


def _size(adapter: LoraAdapter) -> int:
    tensors = [*adapter.extra.values()]
    for module in adapter.modules.values():
        tensors += [module.A, module.B]
    return sum(tensor.nbytes for tensor in tensors)


def recover(items: Iterable[Item], out_dir: Path) -> None:
    """Clear away what a killed run or worker left of these; nobody else may be at work on them."""
    names: dict[str, set[str]] = {}
    for item in items:
        parent, name = os.path.split(item.target)
        names.setdefault(parent, set()).add(name)
    for parent, wanted in names.items():
        recover_folders(out_dir / parent, wanted)
