"""Tensor names of a PEFT LoRA file: which are updates B A of a weight, and which are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from csulora.files.names import ends_with
from csulora.files.peft_config import module_rank

PREFIX = "base_model.model."


class Factors(NamedTuple):
    """What a file holds of one LoRA module: "A", "B" or both, and of which kind they are."""

    sides: dict[str, Tensor]
    embedding: bool


def factor_name(module: str, side: str, embedding: bool) -> str:
    """The name of a module's factor "A" or "B" in an adapter file."""
    return f"{PREFIX}{module}.{factor_word(side, embedding)}{'' if embedding else '.weight'}"


def factor_word(side: str, embedding: bool) -> str:
    """What PEFT calls a factor: those of an embedding are parameters, not layers."""
    return f"lora_embedding_{side}" if embedding else f"lora_{side}"


def sort_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor], dict[str, int]]:
    """LoRA factors by module; all other tensors; and the ranks of the LoRA modules among those."""
    linear: dict[str, dict[str, Tensor]] = {}
    embedded: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if key.startswith(PREFIX) and module and side in ("A.weight", "B.weight"):
            linear.setdefault(module, {})[side[0]] = tensor
        elif key.startswith(PREFIX) and module and side in ("embedding_A", "embedding_B"):
            embedded.setdefault(module, {})[side[-1]] = tensor
        else:
            others[key] = tensor
    with_magnitude = {
        key.removeprefix(PREFIX).partition(".lora_magnitude_vector")[0]
        for key in others
        if ".lora_magnitude_vector" in key
    }
    updates: dict[str, Factors] = {}
    other_ranks: dict[str, int] = {}
    found = [(name, Factors(sides, False)) for name, sides in linear.items()]
    found += [(name, Factors(sides, True)) for name, sides in embedded.items()]
    for name, factors in found:
        sides, embedding = factors
        plain = not (
            config.get("use_dora")
            or name in with_magnitude
            or (name in linear and name in embedded)  # no module of PEFT's is both
            or (not embedding and _is_expert(name, sides, config))
        )
        if plain and all(tensor.dim() == 2 for tensor in sides.values()):
            updates[name] = factors
            continue
        other_ranks[name] = module_rank(config, name)
        for side, tensor in sides.items():
            others[factor_name(name, side, embedding)] = tensor
    return updates, others, other_ranks


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
