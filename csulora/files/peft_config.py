"""`adapter_config.json`: what PEFT would make of it, and the configuration of a corrected adapter."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.json import parse_json
from csulora.files.names import is_tame, pattern_regex, pattern_value

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
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


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
            if not is_tame(key):
                raise CsuloraError(
                    f"{path}: {field} key {key!r}: repeats within repeats, which can take for ever to "
                    "match; name the modules instead"
                )
            try:
                re.compile(pattern_regex(key))
            except (re.error, OverflowError, RecursionError) as error:
                raise CsuloraError(f"{path}: {field} key {key!r}: {error}") from None
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list):
        raise CsuloraError(f"{path}: target_parameters must be a list, not {parameters!r}")
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


def module_rank(config: Mapping[str, Any], name: str) -> int:
    """The rank PEFT gives the module of this name."""
    return int(pattern_value(config.get("rank_pattern") or {}, name, config["r"]))


def module_alpha(config: Mapping[str, Any], name: str) -> float:
    """The lora_alpha PEFT gives the module of this name."""
    return pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """s in dW = s B A, by PEFT's rule: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_for_rank(alpha: float, old_rank: int, new_rank: int, rslora: bool) -> float:
    """The lora_alpha that keeps s when the rank changes; stays an integer where it can."""
    if new_rank == old_rank:
        return alpha
    if rslora:
        return alpha * math.sqrt(new_rank / old_rank)
    exact = alpha * new_rank / old_rank
    return int(exact) if float(exact).is_integer() else exact


def corrected_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """The configuration under which PEFT gives every module its new rank and alpha.

    Where nothing changed the patterns stay as they are, and their keys stay where the modules that one
    speaks for still agree: PEFT may know them by other names than the file does. Otherwise the most
    common value becomes the default and each other module gets an entry of its own, longest names first,
    so that no entry can shadow another.
    """
    new = dict(config)
    if isinstance(new.get("init_lora_weights"), str):
        new["init_lora_weights"] = True  # an initialisation has no say once there are weights
    same = all(
        module_rank(config, name) == ranks[name] and module_alpha(config, name) == alphas[name]
        for name in ranks
    )
    if same:
        return new
    if config.get("target_parameters"):
        # PEFT knows these by names that tensors do not carry; they keep the defaults and patterns they
        # had, and every corrected module is named before them.
        for key, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            new[key] = _longest_first(values) | (config.get(key) or {})
        return new
    for field, key, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        kept = _same_keys(config.get(key) or {}, config[field], values)
        new[field], new[key] = kept or _default_and_rest(values)
    return new


def portable_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The form that every serving stack reads alike: one rank, lora_alpha = r, nothing else."""
    new = dict(config)
    new.update(r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    # The adapter holds no biases, or it would have been refused; servers reject the mention of them.
    new.update(
        {key: value for key, value in (("bias", "none"), ("lora_bias", False)) if key in new}
    )
    if isinstance(new.get("init_lora_weights"), str):
        new["init_lora_weights"] = True
    return new


def _as_list(value: Any) -> list[Any]:
    """PEFT holds some lists as sets."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is not a value of a configuration file")


def _same_keys(
    pattern: Mapping[str, Any], default: Any, values: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """A default and a pattern of the same keys that give each module its value, if there are such."""
    places = {key: float(place) for place, key in enumerate(pattern)}
    found: dict[float, Any] = {}
    for name, value in values.items():
        if found.setdefault(pattern_value(places, name, -1.0), value) != value:
            return None
    return found.get(-1.0, default), {key: found.get(places[key], pattern[key]) for key in pattern}


def _default_and_rest(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    counts = Counter(values.values())
    default = max(counts, key=lambda value: (counts[value], value))
    rest = [name for name in values if values[name] != default]
    # A key is a regular expression that may match after any dot of a longer name.
    shadowing = [
        name
        for name in values
        if values[name] == default and any(name.endswith("." + other) for other in rest)
    ]
    return default, _longest_first({name: values[name] for name in [*rest, *shadowing]})


def _longest_first(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in sorted(values, key=lambda name: (-len(name), name))}


def _check_number(path: Path, field: str, value: Any, *, integral: bool = False) -> None:
    kinds = (int,) if integral else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "an integer" if integral else "a number"
        raise CsuloraError(f"{path}: {field} must be {expected}, not {value!r}")
    # Beyond float64 an integer cannot even be converted.
    if abs(value) > sys.float_info.max or (integral and value <= 0):
        raise CsuloraError(f"{path}: {field} is {value!r}; a positive, finite value is needed")
