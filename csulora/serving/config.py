"""The operator's configuration: one TOML file, named by an environment variable."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from csulora.adapter import DTYPES
from csulora.errors import CsuloraError, UsageError
from csulora.files.plain import read_bytes
from csulora.settings import METHODS, Method

VARIABLE = "CSULORA_CONFIG"
Mode = Literal["correct", "require", "observe", "off"]
MODES: tuple[str, ...] = get_args(Mode)
FORMS = ("portable", "keep")

_LIMIT = 1 << 20  # bytes of a configuration
_DTYPES = {"keep": None, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B")
_REQUIRED = ("mode", "subspace", "cache")
_OPTIONAL = (
    *("method", "folders", "cache_bytes", "form", "dtype", "max_lora_rank", "audit"),
    *("trusted_keys", "settings"),
)


@dataclass(frozen=True)
class ServingConfig:
    """What a guard does; `load` reads it, docs/serving.md describes each key.

    mode: "correct", "require", "observe" or "off".
    method: settings of the correction. fixed_form: whether they name the form, which is otherwise chosen
        for each adapter.
    folders: where names of requests, and sources of corrected folders, are looked for.
    cache_bytes: what the cache is kept within, None: no limit.
    portable: write the form that all stacks read alike; otherwise that of the source.
    dtype: of the corrected factors, None: each factor's own.
    max_lora_rank: where the stack does not tell; None: no limit.
    audit: file of the audit log, None: none.
    trusted_keys: public keys whose signature of a corrected folder counts.
    """

    mode: Mode
    subspace: Path
    method: Method
    fixed_form: bool
    folders: tuple[Path, ...]
    cache: Path
    cache_bytes: int | None
    portable: bool
    dtype: torch.dtype | None
    max_lora_rank: int | None
    audit: Path | None
    trusted_keys: tuple[Path, ...]


def from_environment() -> ServingConfig | None:
    """The configuration that `VARIABLE` names, None where it is not set.

    Raises as `load`, also for a variable that is set and empty.
    """
    found = os.environ.get(VARIABLE)
    if found is None:
        return None
    if not found.strip():
        raise CsuloraError(f"{VARIABLE} is set and names no file")
    return load(found)


def named(path: str | os.PathLike[str] | None) -> ServingConfig:
    """The configuration that a command is given, or else that of the environment.

    Raises UsageError where there is neither, and as `load`.
    """
    config = from_environment() if path is None else load(path)
    if config is None:
        raise UsageError(f"no configuration: name one with --config or {VARIABLE}")
    return config


def load(path: str | os.PathLike[str]) -> ServingConfig:
    """Read a configuration; relative paths in it are relative to its folder.

    Raises CsuloraError, naming file and key, for a file that cannot be read, unknown or missing keys,
    values that cannot be, and files and folders that are not there (which mode "off" does not look for).
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        values = tomllib.loads(read_bytes(file, _LIMIT).decode())
    except (ValueError, RecursionError) as error:
        raise CsuloraError(f"{file}: not readable as TOML ({error})") from None
    for key in values:
        if key not in _REQUIRED + _OPTIONAL:
            raise CsuloraError(f"{file}: {key} is no key; there are {_all_keys()}")
    for key in _REQUIRED:
        if key not in values:
            raise CsuloraError(f"{file}: {key} is missing")
    reader = _Reader(file, values)
    config = ServingConfig(
        mode=reader.choice("mode", MODES),
        subspace=reader.path("subspace"),
        method=reader.method(),
        fixed_form="form" in reader.table("settings"),
        folders=reader.paths("folders"),
        cache=reader.path("cache"),
        cache_bytes=reader.size("cache_bytes"),
        portable=reader.choice("form", FORMS, "portable") == "portable",
        dtype=_DTYPES[reader.choice("dtype", tuple(_DTYPES), "keep")],
        max_lora_rank=reader.rank("max_lora_rank"),
        audit=reader.path("audit") if "audit" in values else None,
        trusted_keys=reader.paths("trusted_keys"),
    )
    if config.mode != "off":
        _check_paths(file, config)
    return config


def _all_keys() -> str:
    return ", ".join(_REQUIRED + _OPTIONAL)


def _check_paths(file: Path, config: ServingConfig) -> None:
    """Raise CsuloraError for what is not there, and for a cache among the adapters."""
    for key, paths in (("subspace", (config.subspace,)), ("trusted_keys", config.trusted_keys)):
        for path in paths:
            if not os.path.isfile(path):
                raise CsuloraError(f"{file}: {key}: {path}: no such file")
    for folder in config.folders:
        if not os.path.isdir(folder):
            raise CsuloraError(f"{file}: folders: {folder}: no such folder")
        one, other = Path(os.path.realpath(folder)), Path(os.path.realpath(config.cache))
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise CsuloraError(f"{file}: cache: {config.cache} lies within {folder} or around it")
    if config.audit is not None and not os.path.isdir(config.audit.parent):
        raise CsuloraError(f"{file}: audit: {config.audit.parent}: no such folder")


def _quotes(settings: Mapping[str, Any]) -> str:
    """What to add to an error where a pattern has no quotes, so that TOML made tables of its parts."""
    patterns = settings.get("strength_for")
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        if isinstance(value, dict):
            while isinstance(value, dict) and value:
                part, value = next(iter(value.items()))
                name = f"{name}.{part}"
            return f"; a pattern with a point in it needs quotes: {json.dumps(name)}"
    return ""


class _Reader:
    """Values of a configuration by key, checked."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self._file, self._values = file, values

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> Any:
        value = self._values.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(key, f"must be one of {', '.join(allowed)}, not {value!r}")
        return value

    def path(self, key: str) -> Path:
        return self._path(key, self._values[key])

    def paths(self, key: str) -> tuple[Path, ...]:
        value = self._values.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, f"must be a list of paths, not {value!r}")
        return tuple(self._path(key, one) for one in value)

    def size(self, key: str) -> int | None:
        """Bytes, as a number or as text such as "50GB" (1000 to a step) or "50GiB" (1024)."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, str) and (found := _BYTES.fullmatch(value)):
            number, step, binary = found.groups()
            size = float(number) * (1024 if binary else 1000) ** " KMGT".index(step or " ")
            value = int(size) if math.isfinite(size) else value
        return self._positive(key, value, "a number of bytes, or text such as 50GB")

    def rank(self, key: str) -> int | None:
        value = self._values.get(key)
        return None if value is None else self._positive(key, value, "a whole number")

    def table(self, key: str) -> dict[str, Any]:
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, f"must be a table, not {value!r}")
        return value

    def method(self) -> Method:
        name = self.choice("method", tuple(METHODS), next(iter(METHODS)))
        settings = self.table("settings")
        if "method" in settings:
            raise self._wrong("settings", "method is a key of its own, above the table")
        try:
            return METHODS[name].from_dict(settings)
        except (CsuloraError, TypeError) as error:
            raise self._wrong("settings", f"{error}{_quotes(settings)}") from None

    def _path(self, key: str, value: object) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(key, f"must be a path, not {value!r}")
        return Path(os.path.abspath(self._file.parent / os.path.expanduser(value)))

    def _positive(self, key: str, value: object, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, f"must be {what}, above 0, not {value!r}")
        return value

    def _wrong(self, key: str, reason: str) -> CsuloraError:
        return CsuloraError(f"{self._file}: {key}: {reason}")
