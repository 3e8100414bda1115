"""Tensor names of a PEFT LoRA file: which are updates B A of a weight, and which are not.

What PEFT or a server would apply as the update of such a weight is never among the others: it is a pair
that can be corrected, or the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.peft_config import FILE
from csulora.files.peft_ranks import Rules

PREFIX = "base_model.model."
LONGEST_NAME = 1_000  # of a module

# In a model, unlike in the files that PEFT writes, the adapter has a name; so in files written by hand.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", re.DOTALL)
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?", re.DOTALL)
_BIAS = re.compile(r".+\.lora_B(?:\.[^.]+)?\.bias", re.DOTALL)
_MAGNITUDE = ".lora_magnitude_vector"
_TRAINING = re.compile(r".+\.lora_velora_embed(?:\.[^.]+)?", re.DOTALL)  # no say once trained
_LORA = re.compile(r"lora_(A|B|embedding)")


class Factors(NamedTuple):
    """The factors "A" and "B" of one module's update, and of which kind they are."""

    sides: dict[str, Tensor]
    embedding: bool


class Sorted(NamedTuple):
    """The tensors of an adapter file."""

    updates: dict[str, Factors]  # of linear weights and embeddings, by module
    others: dict[str, Tensor]  # all other tensors, by their name in the file
    # Of LoRA modules among the others, by the name that PEFT's patterns see.
    other_ranks: dict[str, int]


def factor_name(module: str, side: str, embedding: bool = False) -> str:
    """The name of a module's factor "A" or "B" in an adapter file."""
    return f"{PREFIX}{module}.{factor_word(side, embedding)}{'' if embedding else '.weight'}"


def factor_word(side: str, embedding: bool) -> str:
    """What PEFT calls a factor: those of an embedding are parameters, not layers."""
    return f"lora_embedding_{side}" if embedding else f"lora_{side}"


def sort_out(
    where: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], rules: Rules
) -> Sorted:
    """Sort the tensors of an adapter file, without those that only training with VeLoRA needs.

    Raises CsuloraError, naming `where` and the tensor, for what is meant as, or would act as, the update
    of a linear weight and is none that can be corrected.
    """
    pairs, others = _paired(where, tensors)
    for key in others:
        _check_other(where, key, bool(config.get("use_dora")))
    updates: dict[str, Factors] = {}
    other_ranks: dict[str, int] = {}
    for (module, embedding), keys in pairs.items():
        pair = {side: tensors[key] for side, key in keys.items()}
        _check_pair(where, keys, pair, embedding)
        expert = not embedding and _is_expert(where, keys["A"], module, pair["A"], rules)
        if pair["A"].dim() == 2 and not expert and not config.get("use_dora"):
            if module in updates:
                raise CsuloraError(
                    f"{where}: {module} has factors of a linear weight and an embedding"
                )
            updates[module] = Factors(pair, embedding)
            continue
        others |= {key: tensors[key] for key in keys.values()}
        for name in rules.parameters(module) if expert else [module]:
            other_ranks[name] = int(rules.rank(name))
    return Sorted(updates, others, other_ranks)


def _paired(
    where: str | Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[tuple[str, bool], dict[str, str]], dict[str, Tensor]]:
    """Names in the file of the factors "A" and "B", and the tensors that are none.

    The former by module, and whether they are those of an embedding.
    """
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    others: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for key, tensor in tensors.items():
        if _TRAINING.fullmatch(key):
            continue
        found = _FACTOR.fullmatch(key) or _EMBEDDING.fullmatch(key)
        if found is None:
            others[key] = tensor
            continue
        module, side, adapter = found.groups()
        module = module.removeprefix(PREFIX)
        _check_module(where, key, module)
        pair = pairs.setdefault((module, found.re is _EMBEDDING), {})
        if other := pair.get(side):
            raise CsuloraError(f"{where}: {other} and {key} are the same factor of {module}")
        pair[side] = key
        adapters |= {adapter} if adapter else set()
    if len(adapters) > 1:
        raise CsuloraError(
            f"{where}: tensors of {len(adapters)} adapters ({', '.join(sorted(adapters)[:3])}); save "
            "each in a folder of its own"
        )
    return pairs, others


def _check_module(where: str | Path, key: str, module: str) -> None:
    if "base_model" in module.split("."):
        raise CsuloraError(f"{where}: {key} does not begin with {PREFIX} as PEFT's names do")
    if ".base_layer." in module:
        raise CsuloraError(
            f"{where}: {key} is of LoRA on an nn.MultiheadAttention, whose weight is that of three "
            "layers in one; this cannot be corrected"
        )
    if not all(module.split(".")) or len(module) > LONGEST_NAME:
        raise CsuloraError(f"{where}: {key} does not name a module")


def _check_pair(
    where: str | Path, keys: Mapping[str, str], pair: Mapping[str, Tensor], embedding: bool
) -> None:
    """Raise CsuloraError where two tensors cannot be the factors of one update."""
    for side, tensor in pair.items():
        if not tensor.numel():
            raise CsuloraError(
                f"{where}: {keys[side]} is empty, {tuple(tensor.shape)}, as a ZeRO-3 checkpoint saves "
                "it; gather the parameters before saving"
            )
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise CsuloraError(f"{where}: {keys[other]} has no {factor_word(side, embedding)}")
    for side, tensor in pair.items():
        if tensor.dim() < 2 or tensor.dim() != pair["A"].dim() or (embedding and tensor.dim() > 2):
            raise CsuloraError(
                f"{where}: {keys[side]} has {tensor.dim()} dimension(s), {tuple(tensor.shape)}; the "
                "factors of a linear weight have 2, and those of a convolution alike"
            )


def _is_expert(where: str | Path, key: str, module: str, A: Tensor, rules: Rules) -> bool:
    """Whether a LoRA pair belongs to `target_parameters`, where one pair holds all experts.

    The rank tells: that of all experts is a multiple of the configured one. A pair of one rank updates
    one matrix, as that of a linear weight does.
    """
    ranks = {rules.rank(name) for name in rules.parameters(module)}
    single = A.shape[0] in {rules.rank(name) for name in rules.names(module)}
    expert = not single and any(A.shape[0] % rank == 0 for rank in ranks)
    if module.endswith(".base_layer") and not expert:
        raise CsuloraError(
            f"{where}: {key} is named like one of target_parameters, but {FILE} names none that it fits"
        )
    return expert


def _check_other(where: str | Path, key: str, use_dora: bool) -> None:
    """Raise CsuloraError for what is no factor by its name, but may act as one or tell of one."""
    if _MAGNITUDE in key and not use_dora:
        raise CsuloraError(
            f"{where}: {key} is a magnitude of DoRA, but use_dora is not set, so that PEFT would apply "
            f"plain LoRA; set use_dora to true in {FILE} if DoRA is meant"
        )
    if _LORA.search(key) and not _BIAS.fullmatch(key):
        raise CsuloraError(
            f"{where}: {key} is not named as PEFT names it, {factor_name('MODULE', 'A')}; save the "
            "adapter with PEFT"
        )
