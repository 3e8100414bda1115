"""Hugging Face checkpoints, read lazily: which weights there are, and one weight at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.folders import inside
from csulora.files.hub import resolve_source
from csulora.files.json import read_json
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.safetensors import Header, open_safetensors, read_tensor
from csulora.text import encodable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json"]
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Weight:
    """Where one weight lies and what it is; nothing of it has been read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, F16, ...
    header: Header  # of its file, which must not have changed when the weight is read


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: every `*.weight` by module name, and the model's configuration."""

    name: str
    folder: Path
    weights: dict[str, Weight]
    config: dict[str, object]

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """List the weights of a local folder or a hub id.

        Raises CsuloraError for a folder without safetensors weights, a malformed file or an index
        that points outside the folder.
        """
        folder = resolve_source(source, HUB_PATTERNS)
        if not folder.is_dir():
            raise CsuloraError(f"{folder}: expected a checkpoint folder, found a file")
        weights: dict[str, Weight] = {}
        for file, names in _files(folder).items():
            weights.update(_list_weights(file, names))
        config = folder / "config.json"
        return cls(
            name=encodable(
                Path(os.path.abspath(folder)).name if Path(source).exists() else str(source)
            ),
            folder=folder,
            weights=weights,
            config=read_json(config, CONFIG_LIMIT) if os.path.lexists(config) else {},
        )

    def read(self, module: str) -> Tensor:
        """The weight of one module as stored: float32, bfloat16 or float16, on the CPU.

        Raises CsuloraError also where the file has changed since the checkpoint was opened.
        """
        weight = self.weights[module]
        if weight.dtype not in FLOAT_DTYPES:
            raise CsuloraError(
                f"{weight.file}: tensor {weight.name} is {weight.dtype}; "
                "use an unquantized checkpoint in float32, bfloat16 or float16"
            )
        return read_tensor(weight.header, weight.name)


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of a folder, each with the names that the index promises (None: all)."""
    if os.path.lexists(folder / SINGLE):
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not os.path.lexists(index):
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise CsuloraError(
                f"{folder}: holds {pickles[0]}, a pickle, and no {SINGLE}; "
                "pickles are never read: save the model with safe_serialization=True"
            )
        raise CsuloraError(f"{folder}: neither {SINGLE} nor {INDEX} found")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CsuloraError(f"{index}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CsuloraError(f"{index}: entry of {name} is not a file name")
        names = files.setdefault(inside(folder, file, index), set())
        assert names is not None
        names.add(name)
    return files


def _list_weights(file: Path, names: set[str] | None) -> dict[str, Weight]:
    if file.suffix != ".safetensors":
        raise CsuloraError(f"{file}: not a safetensors file; other formats are never read")
    found = {}
    with open_safetensors(file) as opened:
        header = opened.header
    missing = sorted((names or set()) - header.entries.keys())
    if missing:
        raise CsuloraError(f"{file}: the index promises tensor {missing[0]}, which is not there")
    for name in sorted(header.entries if names is None else names):
        if name.endswith(".weight"):
            entry = header.entries[name]
            found[name.removesuffix(".weight")] = Weight(
                name, file, entry.shape, entry.dtype, header
            )
    return found
