"""JSON in and out: strictly valid, finite numbers only, the same bytes for the same values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.plain import read_bytes

JSON_LIMIT = 64 << 20  # bytes of a file: indices and reports name every module of a model
# Of a file. A value takes many times its text in memory; a tensor's entry in a header has about seven.
MOST_VALUES = 1 << 21
DEEPEST = 100  # lists and objects within each other; copying and writing are recursive


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from a file; what could not be written back is refused."""
    return parse_json(path, read_bytes(path, limit))


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """`read_json` of a file whose bytes are at hand."""
    try:
        value = load_json(data)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CsuloraError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CsuloraError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_json(data: bytes | bytearray, **options: Any) -> Any:
    """The value of a JSON text in UTF-8; options as in `json.loads`.

    Raises ValueError, also for numbers that are not finite and for more values than any file of ours
    holds, and RecursionError.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    return json.loads(data.decode(), parse_constant=_finite, parse_float=_finite, **options)


def _check_depth(value: Any) -> None:
    """Raise ValueError for more than `DEEPEST` lists and objects within each other."""
    level = [value]
    for _ in range(DEEPEST + 1):
        nested = [one for one in level if isinstance(one, (dict, list))]
        level = [x for one in nested for x in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} levels deep")


def _finite(literal: str) -> float:
    """The number of a JSON literal; ValueError for NaN, infinities and what float64 does not reach."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is not a finite number")
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Deterministic, strictly valid JSON text (an infinite strength must already be a string)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def json_rows(value: Mapping[str, Any]) -> bytes:
    """The same with lines for two levels only: a report stays readable, and quick to write."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return (_rows(value, "  ", lambda entry: _inner(entry, encode), encode) + "\n").encode()


def _inner(value: Any, encode: Callable[[Any], str]) -> str:
    if isinstance(value, Mapping) and value:
        return _rows(value, "    ", encode, encode)
    return encode(value)


def _rows(
    value: Mapping[str, Any], indent: str, inner: Callable[[Any], str], encode: Callable[[str], str]
) -> str:
    rows = ",\n".join(f"{indent}{encode(key)}: {inner(entry)}" for key, entry in value.items())
    return "{\n" + rows + "\n" + indent[:-2] + "}"
