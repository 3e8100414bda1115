"""The Ray engine: the same steps on the workers of a cluster, one actor a core (or GPU).

The driver keeps the lock, the journal and the progress; workers read sources and write outputs
themselves, so both have to be on a file system that all nodes see under the same path. The subspace
goes to the object store once and lies there once a node. A worker that dies costs only what it had in
hand: those adapters are tried again one by one, each a few times.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from csulora.batch import steps
from csulora.batch.call import Done, Run
from csulora.batch.local import LocalEngine
from csulora.batch.sources import Item
from csulora.batch.steps import Gate, Job
from csulora.errors import CsuloraError, UsageError
from csulora.files.folders import not_made_anew
from csulora.pipeline.backend import pick_device
from csulora.subspace import ModuleSubspace, Origin, SafetySubspace

# A worker gets a quarter of its share of what is left, so that all end together, within limits.
SHARE = 4
LARGEST_SHARD = 32
IN_HAND = 2  # shards a worker has, so that it never waits for the driver
TRIES = 3
# Seconds: without a result, until a worker is asked whether it lives; for its answer; until a first
# worker has started. A worker that works at a large adapter answers beside its work.
SILENCE, PATIENCE, START = 60.0, 60.0, 900.0
LOOK = 5.0  # seconds between two looks after the workers, at most
SIGNS = "signs"  # the group of calls that a worker answers beside its work

Shard = list[Job]


def check_ray() -> None:
    """Raise UsageError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("the engine ray needs Ray: pip install 'csulora[ray]'")


class RayEngine:
    """A started run on a cluster; see `csulora.batch.run.Engine`.

    address: of a running cluster, None to start one on this machine.
    workers: None for one a CPU of the cluster, or a GPU when the run is on "cuda".
    """

    def __init__(
        self,
        run: Run,
        subspace: SafetySubspace,
        items: Sequence[Item],
        gate: Gate,
        *,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        import ray

        self._ray: Any = ray
        self._run, self._gate = run, gate
        self._items, self._position = items, 0
        self._again: deque[Shard] = deque()
        self._tries: dict[int, int] = {}
        self._fallen: dict[int, Job] = {}  # what dead workers had in hand
        self._ended: list[Done] = []
        self._bad_starts = 0
        self._own_cluster = not ray.is_initialized()
        if self._own_cluster:
            _connect(address, workers)
        self._unit = pick_device(run.call.recipe.device).type.replace("cuda", "gpu").upper()
        self._workers = workers or max(1, int(ray.cluster_resources().get(self._unit, 1)))
        self._shared = ray.put(_to_arrays(subspace)), os.getcwd()
        self._greetings: dict[Any, Any] = {}  # reference: worker that has not started yet
        self._in_hand: dict[Any, tuple[Any, Shard]] = {}  # reference: worker and its shard
        self._ready: list[Any] = []  # workers that have started
        self._processes: dict[Any, tuple[str, int]] = {}  # worker: its node and process
        # reference: worker that was asked whether it lives, and when
        self._asked: dict[Any, tuple[Any, float]] = {}
        self._heard: dict[Any, float] = {}  # worker: when it last gave a sign of life
        self._begun = time.monotonic()
        for _ in range(self._workers):
            self._hire()

    def take(self) -> list[Done] | None:
        """What is finished since the last call; None when all are done."""
        while not self._ended:
            if not self._in_hand and not self._left():
                self._close()
                self._clear_away(self._fallen.values())
                return None
            waiting = [*self._greetings, *self._in_hand, *self._asked]
            ready, _ = self._ray.wait(waiting, num_returns=1, timeout=LOOK)
            for reference in ready:
                self._receive(reference)
            self._look_after()
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> list[Done]:
        """End the workers at once and clear away what they had begun."""
        jobs = [job for _, shard in self._in_hand.values() for job in shard]
        for worker in {worker for worker, _ in self._in_hand.values()}:
            self._kill(worker)
        self._close()
        self._clear_away([*self._fallen.values(), *jobs])
        ended, self._ended = self._ended, []
        return ended

    def _hire(self) -> None:
        """A new worker; it gets work when it has answered."""
        resources = {"num_cpus": 1, "num_gpus": int(self._unit == "GPU")}
        options = {**resources, "concurrency_groups": {SIGNS: 1}}
        worker = self._ray.remote(**options)(_Worker).remote(self._run, *self._shared)
        self._greetings[worker.greet.remote()] = worker

    def _receive(self, reference: Any) -> None:
        asked = reference in self._asked
        shard: Shard = []
        if asked:
            worker, _ = self._asked.pop(reference)
        elif reference in self._greetings:
            worker = self._greetings.pop(reference)
        else:
            worker, shard = self._in_hand.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            if not asked:
                self._lost(worker, shard, error)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        self._heard[worker] = time.monotonic()
        if shard:
            self._ended += answer
        elif not asked:
            self._processes[worker] = answer
            self._ready.append(worker)
        self._hand_out()

    def _look_after(self) -> None:
        """Ask workers that were silent for long, and give up those that do not answer either.

        A stopped process, or one that waits in the kernel, is not dead to Ray.
        """
        now = time.monotonic()
        if not self._heard and now - self._begun > START:
            raise CsuloraError(f"no Ray worker started in {START:g} s: the cluster may be busy")
        asked = {worker for worker, _ in self._asked.values()}
        for worker in {worker for worker, _ in self._in_hand.values()} - asked:
            if now - self._heard[worker] > SILENCE:
                reference = worker.greet.options(concurrency_group=SIGNS).remote()
                self._asked[reference] = worker, now
        for reference, (worker, since) in list(self._asked.items()):
            if now - since > PATIENCE:
                del self._asked[reference]
                self._kill(worker)  # what it had in hand comes back as of a lost worker
                self._heard[worker] = now

    def _kill(self, worker: Any) -> None:
        """End a worker, also one that no longer hears what Ray tells it."""
        self._ray.kill(worker)
        node, process = self._processes.get(worker, ("", 0))
        if node == self._ray.get_runtime_context().get_node_id():
            _end_process(process)

    def _hand_out(self) -> None:
        """Give workers that could do with more of what is left."""
        for worker in self._ready:
            while shard := self._shard_for(worker):
                self._in_hand[worker.correct.remote(shard)] = worker, shard

    def _shard_for(self, worker: Any) -> Shard:
        """What a worker gets next, nothing if it has enough.

        What went down with a worker before is a worker's only work: if it brings down this one too,
        nothing else is lost with it and takes part of the blame.
        """
        shards = [shard for other, shard in self._in_hand.values() if other is worker]
        if not shards and self._again:
            return self._again.popleft()
        if len(shards) >= IN_HAND or any(shard[0].again for shard in shards):
            return []
        return self._fresh_shard()

    def _in_hands_of(self, worker: Any) -> int:
        return sum(other is worker for other, _ in self._in_hand.values())

    def _lost(self, worker: Any, shard: Shard, error: Exception) -> None:
        """A worker is gone: its adapters will be tried again, each alone, by whoever is free."""
        if not shard:
            self._bad_starts += 1
            if self._bad_starts > TRIES * self._workers:
                raise CsuloraError(f"Ray workers die at their start ({_first_line(error)})")
        self._clear_away(shard)
        for job in shard:
            self._fallen[job.number] = job
            self._tries[job.number] = self._tries.get(job.number, 0) + 1
            if self._tries[job.number] < TRIES:
                self._again.append([job._replace(again=True)])
            else:
                text = f"{job.item.source}: its worker died {TRIES} times ({_first_line(error)})"
                self._ended.append(steps.failed(self._run, job, "lost worker", text))
        self._ready = [other for other in self._ready if other is not worker]
        # The second shard of the same worker comes back by itself, with the same error.
        if not self._in_hands_of(worker):
            self._hire()
        self._hand_out()

    def _clear_away(self, jobs: Iterable[Job]) -> None:
        """What a dead worker had begun; its locks may outlast it by a moment."""
        steps.recover([job.item for job in jobs], self._run.call.out_dir)

    def _left(self) -> bool:
        return bool(self._again) or self._position < len(self._items)

    def _fresh_shard(self) -> Shard:
        left = len(self._items) - self._position
        size = min(LARGEST_SHARD, max(1, left // (SHARE * self._workers)))
        shard: Shard = []
        while len(shard) < size and self._position < len(self._items):
            job = Job(self._position, self._items[self._position])
            self._position += 1
            done = self._gate(job)
            if done is None:
                shard.append(job)
            else:
                self._ended.append(done)
        return shard

    def _close(self) -> None:
        busy = (worker for worker, _ in self._in_hand.values())
        for worker in {*self._greetings.values(), *busy, *self._ready}:
            self._ray.kill(worker)
        self._greetings, self._in_hand, self._ready = {}, {}, []
        if self._own_cluster:
            self._ray.shutdown()


class _Worker:
    """Runs in a process of its own, on any node."""

    def __init__(self, run: Run, arrays: dict[str, Any], folder: str) -> None:
        os.chdir(folder)  # so that relative paths mean what they mean to the driver
        torch.set_num_threads(1)  # one worker a core
        # A device has other numbers on another node.
        self._run = run._replace(call=replace(run.call, jobs=1)).begun()
        self._subspace = _from_arrays(arrays)

    def greet(self) -> tuple[str, int]:
        """Answers, once the worker is ready, with its node and its process."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def correct(self, shard: Shard) -> list[Done]:
        """The outcomes of a shard, in any order."""
        done: list[Done] = []
        with not_made_anew(self._run.call.out_dir):
            engine = LocalEngine(self._run, self._subspace, shard, lambda job: None)
            while (group := engine.take()) is not None:
                done += group
        return done


def _end_process(process: int) -> None:
    """Kill a process of Ray, and wait until it holds no lock any more."""
    place = Path(f"/proc/{process}")
    with contextlib.suppress(OSError):
        if b"ray::" in (place / "cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
        until = time.monotonic() + LOOK
        while (place / "cmdline").read_bytes() and time.monotonic() < until:
            time.sleep(0.01)  # one that has ended has no command line, or no entry


def _connect(address: str | None, workers: int | None) -> None:
    import ray

    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        with _signals_kept():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # Ray raises many kinds here
        raise UsageError(f"Ray at {address or 'this machine'}: {_first_line(error)}") from None


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces what a process does at SIGTERM, in Python and below it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _to_arrays(subspace: SafetySubspace) -> dict[str, Any]:
    """As numpy arrays, which every process of a node reads in the object store's own memory."""
    modules = {
        name: (m.U.numpy(), m.S.numpy(), m.V.numpy(), m.energy_share, m.fan_in_fan_out)
        for name, m in subspace.modules.items()
    }
    return {"modules": modules, "origin": subspace.origin, "sha256": subspace.sha256}


def _from_arrays(arrays: dict[str, Any]) -> SafetySubspace:
    with warnings.catch_warnings():
        # The store's memory is read-only, which PyTorch cannot express; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        modules = {
            name: ModuleSubspace(
                torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(V), share, flipped
            )
            for name, (U, S, V, share, flipped) in arrays["modules"].items()
        }
    origin: Origin = arrays["origin"]
    subspace = SafetySubspace(modules, origin)
    subspace.__dict__["sha256"] = arrays["sha256"]  # that of the file, as the driver knows it
    return subspace


def _cause(error: Any) -> Exception:
    return error.cause if isinstance(error.cause, CsuloraError) else error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
