"""Tensor names of a PEFT LoRA file: which are updates B A of a linear weight, and which are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from csulora.files.names import ends_with
from csulora.files.peft_config import module_rank

PREFIX = "base_model.model."


def factor_name(module: str, side: str) -> str:
    """The name of a module's factor "A" or "B" in an adapter file."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def sort_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, int]]:
    """Linear LoRA factors "A" and "B" by module; all other tensors; and other LoRA modules' ranks."""
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if key.startswith(PREFIX) and module and side in ("A.weight", "B.weight"):
            factors.setdefault(module, {})[side[0]] = tensor
        else:
            others[key] = tensor
    with_magnitude = {
        key.removeprefix(PREFIX).partition(".lora_magnitude_vector")[0]
        for key in others
        if ".lora_magnitude_vector" in key
    }
    linear: dict[str, dict[str, Tensor]] = {}
    other_ranks: dict[str, int] = {}
    for name, pair in factors.items():
        plain = not (
            config.get("use_dora") or name in with_magnitude or _is_expert(name, pair, config)
        )
        if plain and all(tensor.dim() == 2 for tensor in pair.values()):
            linear[name] = pair
            continue
        other_ranks[name] = module_rank(config, name)
        for side, tensor in pair.items():
            others[factor_name(name, side)] = tensor
    for key in others:
        if ".lora_embedding_A" in key:
            name = key.removeprefix(PREFIX).partition(".lora_embedding_A")[0]
            other_ranks[name] = module_rank(config, name)
    return linear, others, other_ranks


def _is_expert(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a LoRA pair belongs to `target_parameters`, where one pair holds all experts.

    A parameter given by its bare name does not tell the module; there the rank does, a multiple of
    the configured one.
    """
    parents = {str(p).rpartition(".")[0] for p in config.get("target_parameters") or ()}
    bare = name.removesuffix(".base_layer")
    while bare.endswith(".base_layer"):
        bare = bare.removesuffix(".base_layer")
    if bare != name or any(parent and ends_with(bare, parent) for parent in parents):
        return True
    rank = module_rank(config, name)
    return "" in parents and "A" in pair and pair["A"].shape[0] != rank
