"""Correcting many adapters from folder to folder; one bad adapter never stops the others."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from csulora.batch import steps
from csulora.batch.call import BATCH_BYTES, Call, Done, Run
from csulora.batch.journal import Journal
from csulora.batch.local import start_local
from csulora.batch.sources import Item, check_targets, find
from csulora.batch.steps import Gate, Job
from csulora.errors import UsageError
from csulora.files.folders import not_made_anew
from csulora.folder import Existing, Recipe
from csulora.outcome import Outcome
from csulora.output import WEIGHTS, made_of, mark_of, unlike
from csulora.settings import ENGINES, Correction, EngineName, Method
from csulora.subspace import SafetySubspace

COMMIT_SECONDS = 1.0


class Engine(Protocol):
    """A started run: `take` gives what has been finished, then None; `stop` ends it early."""

    def take(self) -> list[Done] | None: ...

    def stop(self) -> list[Done]: ...


Start = Callable[[Run, SafetySubspace, Sequence[Item], Gate], Engine]


def correct_many(
    adapters: Iterable[str | os.PathLike[str]],
    subspace: SafetySubspace,
    out_dir: str | os.PathLike[str],
    correction: Method | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    pass_through: bool = False,
    again: bool = False,
    strict_base: bool = False,
    backend: str = "auto",
    device: str = "auto",
    jobs: int = 1,
    batch_bytes: int = BATCH_BYTES,
    existing: Existing = "refuse",
    engine: EngineName = "local",
    ray_address: str | None = None,
    on_done: Callable[[Outcome, int, int], None] | None = None,
) -> list[Outcome]:
    """Correct each adapter into a folder below `out_dir`; outcomes in the order given.

    Args:
        adapters: folders, hub ids, folders of adapters, patterns; `csulora.batch.sources.find` says
            where each goes.
        jobs: adapters being corrected at once, one thread each (Ray: workers). Each thread's PyTorch
            calls use as many threads of their own as `torch.set_num_threads` says, so set that to 1
            before asking for several jobs.
        batch_bytes: about how much memory the adapters take that are read and not yet written. The
            corrections at work, one a job, come on top.
        existing: what to do about an output folder that is there already: fail that adapter ("refuse"),
            replace it ("overwrite"), or skip it if source, subspace and settings are the same and
            otherwise fail ("resume") or replace it ("refresh").
        engine: "local" threads, or a "ray" cluster at `ray_address` (needs `csulora[ray]`).
        on_done: called after each adapter, in order, with (outcome, number done, number in all).
        The rest as in `csulora.correct` and `LoraAdapter.load`.

    Raises UsageError before any work if the call itself is wrong: no adapters, two outputs in one
    place, another run at work on `out_dir`.
    """
    recipe = Recipe(
        correction or Correction(),
        dtype,
        portable,
        pass_through,
        again,
        strict_base,
        backend,
        device,
    )
    call = Call(Path(out_dir), recipe, existing, jobs, batch_bytes)
    items = find(adapters, out_dir)
    outcomes: list[Outcome] = []
    for outcome in stream(items, subspace, call, pick_engine(engine, ray_address, jobs)):
        outcomes.append(outcome)
        if on_done is not None:
            on_done(outcome, len(outcomes), len(items))
    return outcomes


def pick_engine(name: str, ray_address: str | None = None, ray_workers: int | None = None) -> Start:
    """The engine "local" or "ray"; UsageError for another, or where Ray is not installed.

    ray_workers: one for each CPU (or GPU) of the cluster if not given.
    """
    if name == "ray":
        from csulora.batch.ray_engine import RayEngine, check_ray

        check_ray()
        return partial(RayEngine, address=ray_address, workers=ray_workers)
    if name not in ENGINES:
        raise UsageError(f"engine must be {' or '.join(ENGINES)}, not {name!r}")
    if ray_address is not None:
        raise UsageError("a Ray address needs the engine ray")
    return start_local


def stream(
    items: Sequence[Item],
    subspace: SafetySubspace,
    call: Call,
    start: Start = start_local,
    interrupted: threading.Event | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Generator[Outcome, None, None]:
    """The outcomes of a run, in the order of the items, as they come; nothing is kept.

    Once `interrupted` is set, adapters in memory are finished and no others are started. Leaving at
    once, by closing this iterator or by an exception such as KeyboardInterrupt, waits only for
    outputs that are being written, and records them. `warn` is told, once, if the journal cannot be
    written. Raises as `correct_many`.
    """
    check_targets(items, call.out_dir)
    run = Run.of(call, subspace)
    journal = Journal(call.out_dir)
    try:
        run = run.begun()
        steps.recover(items, call.out_dir)
        gate = _RunGate(run, journal, items, interrupted or threading.Event())
        recorder = _Recorder(run, journal, gate, warn)
        with not_made_anew(call.out_dir):
            yield from _in_order(_finished(start(run, subspace, items, gate), recorder))
    finally:
        journal.close()


def _finished(engine: Engine, recorder: _Recorder) -> Generator[Done, None, None]:
    """What the engine finishes, and in the journal within about a second."""
    try:
        while (group := engine.take()) is not None:
            recorder.add(group)
            yield from group
    except BaseException:
        recorder.add(engine.stop())
        raise
    finally:
        recorder.end()


class _Recorder:
    """Journals what was finished, many adapters with one fsync.

    An output without its line is known by its own report, so nothing is lost with a group, and nothing
    if the journal cannot be written at all; but then no more is begun.
    """

    def __init__(
        self, run: Run, journal: Journal, gate: _RunGate, warn: Callable[[str], object]
    ) -> None:
        self._run, self._journal, self._gate, self._warn = run, journal, gate, warn
        self._broken = False
        self._lines: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def add(self, group: list[Done]) -> None:
        self._lines += [done.line for done in group if done.line is not None]
        if any(done.outcome.kind == "disk full" for done in group):
            self._gate.end("the disk is full")
        if time.monotonic() - self._last >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        try:
            self._journal.append(self._lines)
        except OSError as error:
            reason = f"the journal cannot be written ({error.strerror})"
            self._gate.end(reason)
            if not self._broken:
                self._warn(f"{reason}; finished outputs are whole and known by their reports")
            self._broken = True
        self._lines = []
        self._last = time.monotonic()

    def end(self) -> None:
        """The last commit; where nothing was left to refuse, a lost folder is told of here."""
        self.commit()
        lost = self._run.lost()
        if lost is not None and not self._gate.refused:
            self._warn(lost)


def _in_order(finished: Generator[Done, None, None]) -> Iterator[Outcome]:
    waiting: dict[int, Outcome] = {}
    position = 0
    with contextlib.closing(finished):
        for done in finished:
            waiting[done.number] = done.outcome
            while position in waiting:
                yield waiting.pop(position)
                position += 1


class _RunGate:
    """Ends adapters that need no reading; all of them, once the run has to end before its time."""

    def __init__(
        self, run: Run, journal: Journal, items: Sequence[Item], interrupted: threading.Event
    ) -> None:
        self._run, self._journal, self._interrupted = run, journal, interrupted
        self._over: str | None = None
        self.refused = False
        self._other = _made_otherwise(run, journal, items)

    def end(self, reason: str) -> None:
        self._over = self._over or reason

    def __call__(self, job: Job) -> Done | None:
        if self._interrupted.is_set():
            self.end("the run was interrupted")
        if lost := self._run.lost():
            self.end(lost)
        if self._over:
            self.refused = True
            return steps.not_started(self._run, job, self._over)
        done = steps.decide(self._run, self._journal.entry, job)
        if (
            done is None
            and self._other
            and not os.path.lexists(self._run.call.out_dir / job.item.target)
        ):
            other = f"{self._other} was made with other settings or by another version"
            return steps.not_started(self._run, job, f"{other}, which this would mix")
        return done


def _made_otherwise(run: Run, journal: Journal, items: Sequence[Item]) -> Path | None:
    """An output that is known to be of other settings than those of a resuming run.

    By the journal or, where that has no line of it, by the mark in its weights.
    """
    if run.call.existing != "resume":
        return None
    for item in items:
        known = journal.entry(item.target)
        if known is not None and known.get("settings") == run.digest:
            continue
        target = run.call.out_dir / item.target
        if target.exists() and (known is not None or _is_marked_otherwise(target, run)):
            return target
    return None


def _is_marked_otherwise(target: Path, run: Run) -> bool:
    mark = mark_of(target / WEIGHTS)
    return bool(made_of(mark)) and bool(unlike(mark, run.made))
