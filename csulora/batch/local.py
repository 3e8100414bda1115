"""The local engine: threads that read, correct and write side by side, joined by bounded queues.

Threads suffice because what takes time, files, digests and matrix products, runs outside Python's
lock. However many adapters there are, only `batch_bytes` of them are in memory at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from queue import Empty, Queue, SimpleQueue
from typing import Any

from csulora.batch import steps
from csulora.batch.call import Done, Run
from csulora.batch.sources import Item
from csulora.batch.steps import Gate, Job, Loaded, Ready
from csulora.pipeline.backend import pick_device
from csulora.pipeline.by_torch import TOGETHER
from csulora.subspace import SafetySubspace

READERS = 2
WRITERS = 8  # they mostly wait for the disk
QUEUE = 16  # adapters that wait before a stage, if the budget allows as many
# A result of twice the rank is held beside what was read.
HELD = 3


class LocalEngine:
    """A started run. `take` gives finished adapters until None; `stop` ends it early."""

    def __init__(self, run: Run, subspace: SafetySubspace, jobs: Iterable[Job], gate: Gate) -> None:
        self._run, self._subspace, self._gate = run, subspace, gate
        self._jobs = iter(jobs)
        self._next = threading.Lock()
        self._stopped = threading.Event()
        self._idle = threading.Condition()
        self._at_work = 0  # threads within a step that is waited for
        self._budget = _Budget(run.call.batch_bytes)
        self._loaded: Queue[tuple[int, Loaded] | None] = Queue(QUEUE)
        self._ready: Queue[tuple[int, Ready] | None] = Queue(QUEUE)
        self._done: SimpleQueue[Done | BaseException | None] = SimpleQueue()
        on_gpu = pick_device(run.call.recipe.device).type == "cuda"
        # A third of the budget on the GPU, a third being read, a third being written; and no more than
        # that where small ones are solved together.
        share = run.call.batch_bytes // HELD
        self._group_bytes = share if on_gpu else min(TOGETHER, share)
        self._threads = [
            *self._stage(READERS, self._read, lambda: _put(self._loaded, None, run.call.jobs)),
            *self._stage(run.call.jobs, self._correct, lambda: _put(self._ready, None, WRITERS)),
            *self._stage(WRITERS, self._write, lambda: self._done.put(None)),
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> list[Done] | None:
        """What is finished since the last call, at least one adapter; None when all are done."""
        first = self._done.get()
        if first is None:
            return None
        group = [_checked(first)]
        while not self._done.empty():
            done = self._done.get()
            if done is None:
                self._done.put(None)  # for the next call
                break
            group.append(_checked(done))
        return group

    def stop(self) -> list[Done]:
        """Begin nothing more, wait for what is being written, and give what was finished.

        Who waits for a hub is not waited for, and keeps others waiting that have nothing to do.
        """
        with self._idle:
            self._stopped.set()
            self._idle.wait_for(lambda: not self._at_work)
        group = []
        while not self._done.empty():
            done = self._done.get()
            if isinstance(done, Done):
                group.append(done)
        return group

    def _stage(
        self, count: int, step: Callable[[], bool], at_end: Callable[[], None]
    ) -> list[threading.Thread]:
        """Threads that repeat `step` while it is true; the last of them to end calls `at_end`."""
        running = count
        lock = threading.Lock()

        def body() -> None:
            nonlocal running
            try:
                while step():
                    pass
            except BaseException as error:
                self._stopped.set()
                self._budget.lift()  # what this thread held is never given back
                self._done.put(error)
                while step():  # now drops what comes, so that the stages before it can end
                    pass
            finally:
                with lock:
                    running -= 1
                    last = not running
                if last:
                    at_end()

        return [threading.Thread(target=body, daemon=True) for _ in range(count)]

    def _read(self) -> bool:
        if self._stopped.is_set():
            return False
        with self._next:
            job = next(self._jobs, None)
        if job is None:
            return False
        done = self._gate(job)
        if done is not None:
            self._done.put(done)
            return True
        held = HELD * steps.weights_size(job)
        self._budget.take(held)
        with self._step() if job.item.local else nullcontext(True) as begins:
            if not begins:
                self._budget.give(held)
                return False
            loaded = steps.read(self._run, job)
        if isinstance(loaded, Done):
            self._end(held, loaded)
            return True
        if not held:  # a hub id, whose size shows only now
            held = HELD * loaded.size
            self._budget.add(held)
        self._loaded.put((held, loaded))
        return True

    def _correct(self) -> bool:
        group = self._group()
        if not group:
            return False
        with self._step() as begins:
            if not begins:
                for held, _ in group:
                    self._budget.give(held)
                return True
            loaded = [loaded for _, loaded in group]
            results = steps.correct_group(self._run, self._subspace, loaded)
        for (held, _), result in zip(group, results, strict=True):
            if isinstance(result, Done):
                self._end(held, result)
            else:
                self._ready.put((held, result))
        return True

    def _group(self) -> list[tuple[int, Loaded]]:
        """What to correct in one go: all that is read by now, up to its share of the budget."""
        entry = self._loaded.get()
        group: list[tuple[int, Loaded]] = []
        size = 0
        while entry is not None:
            group.append(entry)
            size += entry[1].size
            if size + entry[1].size > self._group_bytes:  # another like it would not fit
                return group
            try:
                entry = self._loaded.get_nowait()
            except Empty:
                return group
        if group:
            self._loaded.put(None)  # for the next call
        return group

    def _write(self) -> bool:
        entry = self._ready.get()
        if entry is None:
            return False
        held, ready = entry
        with self._step() as begins:
            if begins:
                self._end(held, self._written(ready))
            else:
                self._budget.give(held)
        return True

    def _written(self, ready: Ready) -> Done:
        """The end of an adapter; nothing is written to where the output folder was."""
        lost = self._run.lost()
        if lost is None:
            done = steps.write(self._run, ready)
            lost = self._run.lost() if done.outcome.status == "failed" else None
            if lost is None:
                return done
        return steps.not_started(self._run, ready.loaded.job, lost)

    @contextmanager
    def _step(self) -> Iterator[bool]:
        """A step that `stop` waits for; false if there is nothing to begin any more."""
        with self._idle:
            begins = not self._stopped.is_set()
            self._at_work += begins
        try:
            yield begins
        finally:
            with self._idle:
                self._at_work -= begins
                self._idle.notify_all()

    def _end(self, held: int, done: Done) -> None:
        self._budget.give(held)
        self._done.put(done)


class _Budget:
    """Bytes that may be held at once; whoever asks for more than all of it gets it alone."""

    def __init__(self, size: int) -> None:
        self._size: float = size
        self._held = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        with self._changed:
            while self._held and self._held + size > self._size:
                self._changed.wait()
            self._held += size

    def add(self, size: int) -> None:
        """Take without waiting, what is there already."""
        with self._changed:
            self._held += size

    def lift(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._size = math.inf
            self._changed.notify_all()

    def give(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


def _checked(done: Done | BaseException) -> Done:
    if isinstance(done, BaseException):
        raise done
    return done


def _put(queue: Queue[Any], value: None, times: int) -> None:
    for _ in range(times):
        queue.put(value)


def start_local(
    run: Run, subspace: SafetySubspace, items: Sequence[Item], gate: Gate
) -> LocalEngine:
    """The local engine at work on all items."""
    jobs = (Job(number, item) for number, item in enumerate(items))
    return LocalEngine(run, subspace, jobs, gate)
