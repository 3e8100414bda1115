"""Quantised weights in a checkpoint: how to know them, and what they are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# What stands for `<module>.weight` where a method packs it under another name.
PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
}
# What stands beside a packed `<module>.weight`.
_BESIDE = {".weight.absmax": "bitsandbytes 4-bit", ".SCB": "bitsandbytes 8-bit"}
_BYTES = ("I8", "U8")
REMEDY = (
    "use the unquantized checkpoint that it was made from, in float32, bfloat16 or float16 "
    "(or dequantize it: transformers' model.dequantize(), then save_pretrained)"
)


def kind_of_config(config: Mapping[str, object]) -> str:
    """How a checkpoint is quantised by its config.json; empty where that says nothing of it."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    found = [
        part.get(key) for part in parts for key in ("quantization_config", "compression_config")
    ]
    said = next((value for value in found if isinstance(value, Mapping)), None)
    if not said:
        return ""
    method = said.get("quant_method")
    if not isinstance(method, str):
        return (
            "bitsandbytes" if said.keys() & {"load_in_4bit", "load_in_8bit"} else "unnamed method"
        )
    bits = [n for n in (4, 8) if said.get(f"load_in_{n}bit") is True]
    return f"{method} {bits[0]}-bit" if bits else method


def kind_of_weight(module: str, dtype: str, present: Collection[str]) -> str:
    """How `<module>.weight` of a type as safetensors spells it is quantised; empty where it is not."""
    for suffix, kind in _BESIDE.items():
        if module + suffix in present:
            return kind
    if dtype.startswith(("F8", "F4", "F6")):
        return "FP" + dtype[1]
    return "8 bits or less" if dtype in _BYTES else ""
