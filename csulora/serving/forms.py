"""Which form an adapter is corrected in, so that its rank is one that the server takes."""

from __future__ import annotations

from csulora.adapter import LoraAdapter
from csulora.serving.config import ServingConfig
from csulora.settings import Method
from csulora.subspace import SafetySubspace

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank can be


def choose(
    adapter: LoraAdapter, subspace: SafetySubspace, config: ServingConfig, max_rank: int | None
) -> tuple[Method, int]:
    """The settings to correct an adapter with, and the largest rank of the result.

    Raises RefusedError where no form fits, CsuloraError where adapter and subspace do not fit.
    """
    raise NotImplementedError
