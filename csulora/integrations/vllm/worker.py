"""The last line, in the processes that read adapters: what no hook in front has seen."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from csulora.errors import CsuloraError
from csulora.integrations.hooks import Function, Hook
from csulora.integrations.vllm.admission import Admission, refusing
from csulora.integrations.vllm.prefixes import Prefixes
from csulora.serving.recent import Recent

LOAD = Hook("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"))
ADD = Hook(
    "vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request")
)
DUMMY = Hook(
    "vllm.lora.model_manager",
    "LoRAModelManager.create_dummy_lora",
    ("self", "lora_id", "rank", "embedding_modules"),
)
GROUPS = [
    Hook("vllm.distributed.parallel_state", f"get_{which}_group", ()) for which in ("tp", "pp")
]
ZERO_RANK = 8
# Seconds for which zeros stand before the adapter is tried again: a try may hash its source.
ZERO_SECONDS = 1.0
PAUSE = 0.05  # seconds between two tries, in which what was in the way may pass
TRIES = 2
TRIES_TOGETHER = 40  # where zeros would stand for a part of the adapter


def install(admission: Admission) -> None:
    """Put the hooks in place. Raises CsuloraError if vLLM is not one that they know."""
    for called in (DUMMY, *GROUPS):
        called.function()
    LOAD.wrap(lambda function: load_of_sound(function, admission))
    ADD.wrap(add_anew)


@dataclass
class _State:
    """What a manager has read.

    paths: where the sound weights lie, by id and path of the request. zeros: ids that zeros stand in for,
    and when these may be dropped.
    """

    paths: Recent[tuple[int, str], str] = field(default_factory=Recent)
    zeros: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, manager: Any) -> _State:
        return manager.__dict__.setdefault("_csulora", cls())

    def path(self, request: Any) -> str | None:
        """Where the weights of a request lay when they were read last; None where they were not."""
        return self.paths.get((request.lora_int_id, request.lora_path))


def load_of_sound(function: Function, admission: Admission) -> Function:
    """`_load_adapter`, with the path of sound weights.

    On a first load it may raise. What was evicted is loaded again within a step, where any exception ends
    the engine with the requests of everybody: then an adapter of zeros stands in, and the base model
    answers.
    """

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if admission.observing:
            return function(self, lora_request)
        before = _State.of(self).path(lora_request)
        if before is not None:
            return _again(self, function, admission, lora_request, before)
        with refusing(lora_request.lora_name, CsuloraError):
            path = _admitted(self, admission, lora_request)
        return _read(self, function, lora_request, path)

    return _load_adapter


def add_anew(function: Function) -> Function:
    """`add_adapter`, which every step calls for each of its adapters: zeros go, and so are read anew."""

    def add_adapter(self: Any, lora_request: Any) -> Any:
        until = _State.of(self).zeros.get(lora_request.lora_int_id)
        if until is not None and time.monotonic() >= until:
            self.remove_adapter(lora_request.lora_int_id)
        return function(self, lora_request)

    return add_adapter


def _admitted(self: Any, admission: Admission, request: Any) -> str:
    """Where the sound weights of what a request names now lie. Raises CsuloraError if refused."""
    return admission.path(request.lora_path, request.lora_name, self.lora_config.max_lora_rank)


def _read(self: Any, function: Function, request: Any, path: str) -> Any:
    """The adapter at the path of sound weights, which is remembered for the request."""
    lora = function(self, msgspec.structs.replace(request, lora_path=path))
    _State.of(self).paths.set((request.lora_int_id, request.lora_path), path)
    return lora


def _again(self: Any, function: Function, admission: Admission, request: Any, path: str) -> Any:
    """The adapter that was read from a path, or zeros; never raises for want of sound weights.

    Workers that share a model read each for itself, and know nothing of each other: others may have
    the adapter where this one has zeros. So one that is not alone tries longer.
    """
    zeros, number, guard = _State.of(self).zeros, request.lora_int_id, admission.guard
    alone = all(group.function()().world_size == 1 for group in GROUPS)
    patience = TRIES if alone else TRIES_TOGETHER
    tries = 1 if number in zeros else patience
    try:
        lora = _tried(self, function, admission, request, path, tries)
    except Exception as error:
        Prefixes(guard.config.cache).spoil()
        first = number not in zeros
        zeros[number] = time.monotonic() + ZERO_SECONDS
        if first:
            with contextlib.suppress(Exception):  # of a log, whatever it is
                guard.zeroed(path, request.lora_name, error)
        rank = min(ZERO_RANK, self.lora_config.max_lora_rank)
        return self._adapter_manager.create_dummy_lora(number, rank, self.embedding_modules)
    if zeros.pop(number, None) is not None:
        with contextlib.suppress(Exception):
            guard.restored(path, request.lora_name)
    return lora


def _tried(
    self: Any, function: Function, admission: Admission, request: Any, path: str, tries: int
) -> Any:
    """The adapter that was read from a path, or with `load_inplace` what is in its own folder by now.

    Raises the error of the last try.
    """
    while True:
        try:
            if request.load_inplace and request.lora_path != path:
                sound = _admitted(self, admission, request)
            else:
                sound = str(admission.guard.again(path, request.lora_name))
            return _read(self, function, request, sound)
        except Exception:
            tries -= 1
            if not tries:
                raise
        time.sleep(PAUSE)
