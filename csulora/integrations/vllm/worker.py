"""The last line, in the processes that read adapters: what no hook in front has seen."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from csulora.errors import CsuloraError
from csulora.integrations.vllm.admission import Admission, refusing
from csulora.integrations.vllm.hooks import Function, Hook
from csulora.serving import counters

LOAD = Hook("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"))
DUMMY = Hook(
    "vllm.lora.model_manager",
    "LoRAModelManager.create_dummy_lora",
    ("self", "lora_id", "rank", "embedding_modules"),
)
ZERO_RANK = 8
logger = logging.getLogger("csulora.integrations.vllm")


def install(admission: Admission) -> None:
    """Put the hook in place. Raises CsuloraError if vLLM is not one that it knows."""
    DUMMY.check()
    LOAD.wrap(lambda function: load_of_sound(function, admission))


def load_of_sound(function: Function, admission: Admission) -> Function:
    """`_load_adapter`, with the path of sound weights.

    On a first load it may raise. What was evicted is loaded again within a step, where any exception ends
    the engine with the requests of everybody: then an adapter of zeros stands in, and the base model
    answers.
    """

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if admission.observing:
            return function(self, lora_request)
        loaded = self.__dict__.setdefault("_csulora_loaded", {})
        which = lora_request.lora_int_id, lora_request.lora_path
        if which in loaded:
            return _again(self, function, admission, lora_request, loaded[which])
        name = lora_request.lora_name
        with refusing(name, CsuloraError):
            path = admission.path(lora_request.lora_path, name, self.lora_config.max_lora_rank)
        lora = function(self, msgspec.structs.replace(lora_request, lora_path=path))
        loaded[which] = path
        return lora

    return _load_adapter


def _again(self: Any, function: Function, admission: Admission, request: Any, path: str) -> Any:
    """The adapter that was admitted at a path, or zeros; never raises for want of sound weights."""
    try:
        sound = admission.guard.again(path, request.lora_name)  # logs and counts, if there is none
        if sound is not None:
            return function(self, msgspec.structs.replace(request, lora_path=str(sound)))
    except Exception as error:
        counters.add("zeroed")
        reason = str(error) or type(error).__name__
        logger.error("%s: answers as the base model from now on: %s", request.lora_name, reason)
    rank = min(ZERO_RANK, self.lora_config.max_lora_rank)
    return self._adapter_manager.create_dummy_lora(
        request.lora_int_id, rank, self.embedding_modules
    )
