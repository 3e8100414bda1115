"""What is done with one adapter of a run: decided without reading it, read, corrected, written.

Every engine calls these functions, so the outputs do not depend on the engine. Each step returns the
next step's input, or a Done where the adapter's way ends; none of them raises for a single adapter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from csulora.adapter import LoraAdapter, identify, write_folder
from csulora.batch.call import Done, Run
from csulora.batch.sources import Item
from csulora.errors import ChangedError, CsuloraError, DiskFullError, ExistsError, UsageError
from csulora.files.folders import check_no_links, make_folders, recover_folders, writing
from csulora.files.locks import locked
from csulora.files.peft_config import FILE as CONFIG
from csulora.folder import identity, standing
from csulora.outcome import Kind, Outcome, Status
from csulora.output import REPORT, WEIGHTS
from csulora.report import Report, Totals
from csulora.subspace import SafetySubspace

# A file changed this shortly before it is read may change again without its times showing it.
SETTLED_NS = 2_000_000_000

# The kind of a failure, where its error tells; otherwise the step does.
_KINDS: dict[type[Exception], Kind] = {
    ExistsError: "exists",
    ChangedError: "changed",
    DiskFullError: "disk full",
}

Entry = Callable[[str], dict[str, Any] | None]
State = list[list[int]] | None
Gate = Callable[["Job"], Done | None]  # what an engine asks before it begins an adapter


class Job(NamedTuple):
    """An adapter still to be done."""

    number: int
    item: Item
    again: bool = False  # a worker died over it, perhaps after the output was in place


class Loaded(NamedTuple):
    job: Job
    adapter: LoraAdapter
    state: State
    before: tuple[int, ...] | None  # identity of the output that is to be replaced
    size: int  # bytes of its tensors
    seconds: float


class Ready(NamedTuple):
    """Corrected, and ready to be written."""

    loaded: Loaded
    adapter: LoraAdapter
    report: Report
    seconds: float


def decide(run: Run, entry: Entry, job: Job) -> Done | None:
    """The end of an adapter about which nothing has to be read, if the folders and journal say so."""
    target = run.call.out_dir / job.item.target
    if run.call.existing == "overwrite" or not os.path.lexists(target):
        return None
    if run.call.existing == "refuse":
        return failed(run, job, "exists", f"{target}: already exists")
    if run.call.recipe.strict_base:  # asks for what the journal does not tell
        return None
    known = entry(job.item.target)
    if known is None or known.get("settings") != run.digest or known.get("files") is None:
        return None
    if known["files"] != _state(job.item.source, target):
        return None
    try:
        total = Totals.from_dict(known["totals"])
    except (AttributeError, KeyError, TypeError):
        return None
    return Done(job.number, Outcome(job.item.source, target, "skipped", totals=total), line=None)


def read(run: Run, job: Job) -> Loaded | Done:
    """The adapter in memory; or its end, if its output is there already and as it should be."""
    start = time.perf_counter()
    source, target = job.item.source, run.call.out_dir / job.item.target
    try:
        if job.item.local and not os.path.lexists(source):
            raise CsuloraError(f"{source}: no such folder any more")
        before = identity(target)
        done = _recognised(run, job, joined=job.again)
        if done is not None:
            return done
        state = _settled(_state(source))
        adapter = run.call.recipe.load(source)
        return Loaded(job, adapter, state, before, adapter.nbytes, time.perf_counter() - start)
    except Exception as error:
        return _failure(run, job, "source", error)


def correct_group(run: Run, subspace: SafetySubspace, group: list[Loaded]) -> list[Ready | Done]:
    """The corrected adapters of a group, in its order."""
    start = time.perf_counter()
    try:
        results = run.call.recipe.correct([loaded.adapter for loaded in group], subspace)
    except Exception as error:
        if len(group) == 1:
            return [_failure(run, group[0].job, "correction", error)]
        # One of them is at fault; alone it fails alone.
        return [done for one in group for done in correct_group(run, subspace, [one])]
    seconds = (time.perf_counter() - start) / len(group)
    return [
        _failure(run, loaded.job, "correction", result)
        if isinstance(result, CsuloraError)
        else Ready(loaded, *result, seconds)
        for loaded, result in zip(group, results, strict=True)
    ]


def write(run: Run, ready: Ready) -> Done:
    """The output in place, and what the journal will say of it."""
    start = time.perf_counter()
    loaded, report = ready.loaded, ready.report
    job = loaded.job
    target = run.call.out_dir / job.item.target
    try:
        with writing(target):
            check_no_links(run.call.out_dir, target.parent)
            make_folders(target.parent)
            with locked(target):
                check_no_links(run.call.out_dir, target.parent)  # waiting may have taken long
                # `csulora.correct_folder`, in another process, may have been at work on it as well.
                if identity(target) != loaded.before:
                    done = _recognised(run, job, joined=True)
                    if done is not None:
                        return done
                replaces = run.call.existing == "overwrite" or os.path.lexists(target)
                saved = write_folder(
                    ready.adapter, target, overwrite=replaces, report=report.to_dict()
                )
                written = _looks(target, WEIGHTS, CONFIG, REPORT)
    except Exception as error:
        return _failure(run, job, "writing", error)
    outcome = Outcome(
        job.item.source,
        target,
        "corrected",
        report=replace(report, modules={}, **saved.in_report()),
        left_out=tuple(saved.left_out),
        totals=report.totals,
        seconds=loaded.seconds + ready.seconds + time.perf_counter() - start,
        bytes_in=loaded.size,
        bytes_out=written[0][0],
    )
    state = None if loaded.state is None else loaded.state + written
    return Done(job.number, outcome, _line(run, job, report, state))


def failed(run: Run, job: Job, kind: Kind, error: str) -> Done:
    """The end of an adapter that could not be corrected."""
    target = run.call.out_dir / job.item.target
    return Done(job.number, Outcome(job.item.source, target, "failed", error=error, kind=kind))


def not_started(run: Run, job: Job, reason: str) -> Done:
    """The end of an adapter whose turn never came."""
    return failed(run, job, "not started", f"{job.item.source}: not started, as {reason}")


def weights_size(job: Job) -> int:
    """Bytes of an adapter's weights as far as one look tells, 0 for a hub id."""
    try:
        return os.stat(os.path.join(job.item.source, WEIGHTS)).st_size
    except OSError:
        return 0


def _recognised(run: Run, job: Job, *, joined: bool) -> Done | None:
    """The end of an adapter whose output is there and as it should be; raises as `standing`."""
    source, target = job.item.source, run.call.out_dir / job.item.target
    state = _settled(_state(source, target))
    call = run.call
    report = standing(
        target, run.made, call.recipe, call.existing, lambda: identify(source), joined=joined
    )
    if report is None:
        return None
    status: Status = "corrected" if job.again else "skipped"
    outcome = Outcome(source, target, status, totals=report.totals)
    return Done(job.number, outcome, _line(run, job, report, state))


def _failure(run: Run, job: Job, kind: Kind, error: Exception) -> Done:
    if isinstance(error, UsageError):
        raise error
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or job.item.source}: {error.strerror or error}"
    elif not isinstance(error, CsuloraError):
        # Unforeseen, but still this adapter's failure only: name the kind, keep to one line.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        kind, text = "unforeseen", f"{job.item.source}: {reason}"
    return failed(run, job, _KINDS.get(type(error), kind), text)


def _line(run: Run, job: Job, report: Report, state: State) -> dict[str, Any]:
    return {
        "output": job.item.target,
        "source": report.source,
        "made_by": report.made_by,
        "settings": run.digest,
        "result": "corrected",
        "totals": report.totals.to_dict(),
        # Whether uncorrected tensors are wanted is a question for the report.
        "files": None if report.passed_through else state,
    }


def _state(source: str, target: Path | None = None) -> State:
    """What the file system says of the files that decide: the source's two, and the output's two.

    [size, mtime, ctime, inode] of each; all of them unchanged means that nothing has to be read.
    None if one is not there, as with a hub id.
    """
    try:
        return _looks(source, WEIGHTS, CONFIG) + (
            _looks(target, WEIGHTS, CONFIG, REPORT) if target else []
        )
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


def recover(items: Iterable[Item], out_dir: Path) -> None:
    """Clear away what a killed run or worker left of these; who else is at work on them is waited for."""
    names: dict[str, set[str]] = {}
    for item in items:
        parent, name = os.path.split(item.target)
        names.setdefault(parent, set()).add(name)
    for parent, wanted in names.items():
        recover_folders(out_dir / parent, wanted)
