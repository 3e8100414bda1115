"""Hooks in the process that takes requests: the API server, or the one that holds an `LLM`."""

from __future__ import annotations

import inspect
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError

from csulora.errors import CsuloraError
from csulora.integrations.hooks import Function, Hook
from csulora.integrations.vllm.admission import Admission, refusing
from csulora.integrations.vllm.prefixes import Prefixes
from csulora.integrations.vllm.resolver import Resolver
from csulora.serving.guard import refusal_text

_MODELS = "vllm.entrypoints.openai.models.serving"
_ASYNC = "vllm.v1.engine.async_llm"
_INPUT = "vllm.v1.engine.input_processor"
START = Hook(_MODELS, "OpenAIServingModels.__init__", ("self", "engine_client"), among=True)
LOAD = Hook(
    _MODELS,
    "OpenAIServingModels.load_lora_adapter",
    ("self", "request", "base_model_name"),
    waits=True,
)
ADD = Hook(_ASYNC, "AsyncLLM.add_lora", ("self", "lora_request"), waits=True)
REQUEST = Hook(_ASYNC, "AsyncLLM.add_request", ("self", "lora_request"), waits=True, among=True)
VALIDATE = Hook(_INPUT, "InputProcessor._validate_lora", ("self", "lora_request"))
PROCESS = Hook(_INPUT, "InputProcessor.process_inputs", ("self", "lora_request"), among=True)


def install(admission: Admission) -> None:
    """Put the hooks in place. Raises CsuloraError if vLLM is not one that they know."""
    START.wrap(lambda function: with_resolver(function, admission))
    LOAD.wrap(lambda function: load_of_sound(function, admission))
    ADD.wrap(lambda function: add_of_sound(function, admission))
    REQUEST.wrap(lambda function: checked_request(function, admission))
    VALIDATE.wrap(lambda function: checked(function, admission))
    PROCESS.wrap(lambda function: salted(function, Prefixes(admission.guard.config.cache)))


def max_rank_of(lora_config: Any) -> int | None:
    """The largest rank that a server takes; None where it takes no adapters."""
    return None if lora_config is None else lora_config.max_lora_rank


def with_resolver(function: Function, admission: Admission) -> Function:
    """`OpenAIServingModels.__init__`: csulora's resolver is asked first, whatever else is installed."""

    def start(self: Any, engine_client: Any, *arguments: Any, **options: Any) -> None:
        function(self, engine_client, *arguments, **options)
        max_rank = max_rank_of(engine_client.vllm_config.lora_config)
        if max_rank is not None:
            self.lora_resolvers.insert(0, Resolver(admission, max_rank))

    return start


def load_of_sound(function: Function, admission: Admission) -> Function:
    """`load_lora_adapter`, for the endpoint and `--lora-modules`: 422 and the reason, or sound weights.

    The path tells the weights apart, and so the prefix cache of adapters that are loaded anew.
    """

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        max_rank = max_rank_of(self.engine_client.vllm_config.lora_config)
        if max_rank is None or not request.lora_name or not request.lora_path:
            return await function(self, request, base_model_name)
        try:
            path = await admission.admitting(request.lora_path, request.lora_name, max_rank)
        except CsuloraError as error:
            return create_error_response(
                message=refusal_text(request.lora_name, error),
                err_type="UnprocessableEntityError",
                status_code=HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        request = request.model_copy(update={"lora_path": path})
        answer = await function(self, request, base_model_name)
        loaded = self.lora_requests.get(request.lora_name)
        if loaded is not None:
            loaded.load_inplace = False  # 0.32 leaves it set and reads the adapter at every step
        return answer

    return load


def add_of_sound(function: Function, admission: Admission) -> Function:
    """`AsyncLLM.add_lora`: what other resolvers found, before the engine waits for it."""

    async def add_lora(self: Any, lora_request: Any) -> Any:
        max_rank = max_rank_of(self.vllm_config.lora_config)
        if max_rank is not None:
            with refusing(lora_request.lora_name, VLLMUnprocessableEntityError):
                await admission.settling(lora_request, max_rank)
        return await function(self, lora_request)

    return add_lora


def checked_request(function: Function, admission: Admission) -> Function:
    """`AsyncLLM.add_request`: an adapter that has to be repaired holds up its own request alone."""
    signature = inspect.signature(function)

    async def add_request(self: Any, *arguments: Any, **options: Any) -> Any:
        request = options.get("lora_request")
        if request is None and arguments:
            bound = signature.bind(self, *arguments, **options)
            request = bound.arguments.get("lora_request")
        max_rank = max_rank_of(self.vllm_config.lora_config)
        if request is not None and max_rank is not None:
            with refusing(request.lora_name, VLLMValidationError):
                await admission.settling(request, max_rank)
        return await function(self, *arguments, **options)

    return add_request


def checked(function: Function, admission: Admission) -> Function:
    """`InputProcessor._validate_lora`, which sees every request of every way into vLLM: 400, or goes on.

    VLLMValidationError, since any other error would be a 500 without a text.
    """

    def _validate_lora(self: Any, lora_request: Any) -> None:
        function(self, lora_request)
        if lora_request is None:
            return
        with refusing(lora_request.lora_name, VLLMValidationError):
            admission.settle(lora_request, max_rank_of(self.lora_config))

    return _validate_lora


def salted(function: Function, prefixes: Prefixes) -> Function:
    """`InputProcessor.process_inputs`: an adapter's request goes on from no prefix of zeros."""

    def process_inputs(self: Any, *arguments: Any, **options: Any) -> Any:
        request = function(self, *arguments, **options)
        if request.lora_request is not None:
            request.cache_salt = prefixes.salt(request.cache_salt)
        return request

    return process_inputs
