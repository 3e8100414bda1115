"""Which linear weights are stored as (d_in, d_out), as transformers' Conv1D stores them.

An oblong weight tells by its shape. A square one is stored like the oblong ones of its stack of layers: a
model may consist of parts by different authors, and PEFT leaves in `fan_in_fan_out` what the last module
wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from csulora.files.checkpoint import HEADS
from csulora.files.peft_config import FILE

# Model types whose blocks use Conv1D, and what these layers are called.
MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_EMBEDDINGS = ("wte", "wpe", "shared")  # that are not called so


def model_type(config: Mapping[str, object], name: str) -> object:
    """The type of the model that a weight belongs to: of a part, where its name begins with one."""
    part = config.get(name.partition(".")[0])
    whole = part if isinstance(part, Mapping) and "model_type" in part else config
    return whole.get("model_type")


def may_be_turned(name: str) -> bool:
    """Whether a module is called as Conv1D layers and embeddings are: their weights are (d_in, d_out)."""
    leaf = name.rpartition(".")[2]
    return leaf in (*LAYERS, *_EMBEDDINGS) or ("embed" in leaf and leaf not in HEADS)


def stack_of(name: str) -> str:
    """What a module's name has before its first number."""
    parts = name.split(".")
    before = list(takewhile(lambda part: not part.isdecimal(), parts))
    return ".".join(before) if len(before) < len(parts) else ""


def by_stack(oblong: Mapping[str, bool]) -> dict[str, dict[bool, str]]:
    """Oblong modules, and whether each is stored as (d_in, d_out): one of either kind for each stack."""
    found: dict[str, dict[bool, str]] = {}
    for name, turned in oblong.items():
        found.setdefault(stack_of(name), {}).setdefault(turned, name)
    return found


def cannot_be_told(what: str, seen: Mapping[bool, str], flag: bool) -> str:
    """The error for a square weight.

    seen: the oblong modules of its stack, none or one of either kind.
    flag: the adapter's `fan_in_fan_out`.
    """
    if len(seen) == 2:
        reason = f"that of {seen[True]} is, that of {seen[False]} is not"
    else:
        reason = (
            "no oblong module of the same layers shows it, and fan_in_fan_out need not be true of all; "
            "estimate --like an adapter that updates an oblong one of them, too"
            + f", or set fan_in_fan_out to false in {FILE} if all are linear layers"
            * flag
        )
    return f"{what} is square, and whether it is stored as (d_in, d_out) cannot be told: {reason}"
