"""Adapters by name from the configured folders, corrected when they are first asked for."""

from __future__ import annotations

from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from csulora.integrations.vllm.admission import Admission, refusing


class Resolver(LoRAResolver):
    """Asked before all others, since the next one would serve what this one refuses."""

    def __init__(self, admission: Admission, max_rank: int) -> None:
        self._admission = admission
        self._max_rank = max_rank

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """A request for the corrected adapter; None for a name that is in none of the folders.

        Raises VLLMUnprocessableEntityError, which clients see as 422, for a refused adapter: None would
        let the next resolver have its turn.
        """
        with refusing(lora_name, VLLMUnprocessableEntityError):
            path = await self._admission.finding(lora_name, self._max_rank)
        if path is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)  # vLLM sets the id
