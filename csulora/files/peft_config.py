"""`adapter_config.json`: what is taken of it, and the configuration of a corrected adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.json import parse_json
from csulora.files.peft_ranks import Rules, rescaled

FILE = "adapter_config.json"
CONFIG_LIMIT = 16 << 20  # bytes of this file and of a model's configuration
IN_MEMORY = "configuration"  # what errors call one that comes from no file

# Variants under which B A is not the update of the weight, or not one update per weight. PEFT writes
# these fields as null or false for plain LoRA.
_VARIANTS = {
    "use_qalora": "QALoRA pools the input before A",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "a singular-value variant of LoRA",
    "monteclora_config": "a sampled variant of LoRA",
    "arrow_config": "a router over several adapters",
    "layer_replication": "replicated layers share one base weight",
    "alora_invocation_tokens": "the update is active for part of the tokens only",
}
# Initialisations that also change the base weight whenever the adapter is loaded.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def parse_config(path: Path, data: bytes) -> dict[str, Any]:
    """The PEFT LoRA configuration that the bytes of the file `path` hold, checked."""
    config = parse_json(path, data)
    check_config(path, config)
    return config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in memory, such as PEFT's `LoraConfig.to_dict()`, as its file would hold it.

    Raises CsuloraError for values that JSON cannot hold, and as `check_config`.
    """
    if not isinstance(config, Mapping):
        raise CsuloraError(
            f"{IN_MEMORY}: a mapping is needed, such as PEFT's LoraConfig.to_dict() returns, not a "
            f"{type(config).__name__}"
        )
    try:
        text = json.dumps(dict(config), default=_as_list)
    except (TypeError, ValueError, RecursionError) as error:
        raise CsuloraError(f"{IN_MEMORY}: {error}") from None
    return parse_config(Path(IN_MEMORY), text.encode())


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CsuloraError for another PEFT method, ill-typed fields or a LoRA variant that is not B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CsuloraError(f"{path}: peft_type is {kind!r}; only LORA adapters can be corrected")
    _check_number(path, "r", config.get("r"), integral=True)
    _check_number(path, "lora_alpha", config.get("lora_alpha"))
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise CsuloraError(f"{path}: {field} must be an object, not {pattern!r}")
        for key, value in pattern.items():
            _check_number(path, f"{field}[{key!r}]", value, integral=field == "rank_pattern")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list):
        raise CsuloraError(f"{path}: target_parameters must be a list, not {parameters!r}")
    Rules(path, config)  # compiles the patterns
    for field, meaning in _VARIANTS.items():
        if config.get(field):
            raise CsuloraError(f"{path}: {field} is set ({meaning}); this cannot be corrected")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise CsuloraError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights on loading; "
            "convert the adapter to plain LoRA first (PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...))"
        )


def corrected_config(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    others: Mapping[str, Tensor],
    kept: Iterable[str],
    before: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The configuration under which PEFT gives modules these ranks and alphas, see `rescaled`.

    others: the tensors of the file besides those of the modules; only they can be biases.
    """
    new = dict(config)
    if isinstance(new.get("init_lora_weights"), str):
        new["init_lora_weights"] = True  # an initialisation has no say once there are weights
    if new.get("velora_config"):
        new["velora_config"] = None  # how gradients are computed; its tensors are left out
    # Servers refuse the mention of biases; so what the file does not hold is not mentioned.
    biases = [name for name in others if name.endswith(".bias")]
    lora_biases = [name for name in biases if ".lora_" in name]
    if "bias" in new and len(biases) == len(lora_biases):
        new["bias"] = "none"
    if "lora_bias" in new and not lora_biases:
        new["lora_bias"] = False
    return new | rescaled(FILE, config, ranks, alphas, kept, before)


def portable_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The form that every serving stack reads alike: one rank, lora_alpha = r, nothing else."""
    new = dict(config)
    new.update(r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    return new


def _as_list(value: Any) -> list[Any]:
    """PEFT holds some lists as sets."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is not a value of a configuration file")


def _check_number(path: Path, field: str, value: Any, *, integral: bool = False) -> None:
    kinds = (int,) if integral else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "an integer" if integral else "a number"
        raise CsuloraError(f"{path}: {field} must be {expected}, not {value!r}")
    # Beyond float64 an integer cannot even be converted.
    if abs(value) > sys.float_info.max or (integral and value <= 0):
        raise CsuloraError(f"{path}: {field} is {value!r}; a positive, finite value is needed")
