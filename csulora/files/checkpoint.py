"""Hugging Face checkpoints, read lazily: which weights there are, and one weight at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.folders import inside
from csulora.files.hub import resolve_source
from csulora.files.json import read_json
from csulora.files.layouts import of_a_sense
from csulora.files.names import model_name
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.quantised import PACKED, kind_of_config, kind_of_weight
from csulora.files.safetensors import Header, open_safetensors, read_tensor
from csulora.text import encodable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json"]
WEIGHT = ".weight"
# Leaves of the names of input embeddings and output heads, as far as models tie them.
EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings", "shared", "embeddings"}
)
HEADS = frozenset({"lm_head", "embed_out"})
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Weight:
    """Where one weight lies and what it is; nothing of it has been read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, F16, ...
    header: Header  # of its file, which must not have changed when the weight is read
    quantised: str = ""  # by which method, if it is


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: every `*.weight` by module name, and the model's configuration.

    A model that ties its output head to the input embeddings stores one weight; it is listed for both.
    """

    name: str
    folder: Path
    weights: dict[str, Weight]
    promised: dict[str, Path]  # by module, weights that an index lists and no shard holds
    config: dict[str, object]

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], warn: Callable[[str], object] = warnings.warn
    ) -> Checkpoint:
        """List the weights of a local folder or a hub id.

        `warn` is told where files contradict each other, and what was done about it.

        Raises CsuloraError for a folder without safetensors weights, a malformed file or an index
        that points outside the folder.
        """
        folder = resolve_source(source, HUB_PATTERNS)
        if not folder.is_dir():
            raise CsuloraError(f"{folder}: expected a checkpoint folder, found a file")
        config_file = folder / "config.json"
        config = read_json(config_file, CONFIG_LIMIT) if os.path.lexists(config_file) else {}
        files, index = _files(folder, warn)
        weights: dict[str, Weight] = {}
        present: set[str] = set()
        for file in files:
            names, found = _list_weights(file, kind_of_config(config))
            present |= names
            weights.update(found)
        absent = {name: file for name, file in index.items() if name not in present}
        if absent:
            first = min(absent)
            warn(
                f"{folder / INDEX}: lists {len(absent)} tensor(s) that no shard holds, such as {first} "
                f"in {absent[first].name}"
            )
        return cls(
            name=encodable(
                model_name(os.path.abspath(folder)) if Path(source).exists() else str(source)
            ),
            folder=folder,
            weights=weights | _tied_head(weights, config),
            promised={
                name.removesuffix(WEIGHT): file
                for name, file in absent.items()
                if name.endswith(WEIGHT)
            },
            config=config,
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


def _files(folder: Path, warn: Callable[[str], object]) -> tuple[list[Path], dict[str, Path]]:
    """Weight files of a folder, in the order in which transformers reads them, and the index."""
    index = folder / INDEX
    if os.path.lexists(folder / SINGLE):
        if os.path.lexists(index) and _lists_shards(index):
            warn(f"{folder}: holds {SINGLE} and {INDEX}; read is {SINGLE}, as by transformers")
        return [folder / SINGLE], {}
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
    entries: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CsuloraError(f"{index}: entry of {name} is not a file name")
        entries[name] = inside(folder, file, index)
    return sorted(set(entries.values())), entries


def _lists_shards(index: Path) -> bool:
    """Whether an index that nobody needs speaks of other files than the one beside it."""
    try:
        weight_map = read_json(index).get("weight_map")
    except CsuloraError:
        return True
    return not isinstance(weight_map, dict) or any(file != SINGLE for file in weight_map.values())


def _list_weights(file: Path, method: str) -> tuple[set[str], dict[str, Weight]]:
    """All tensor names of a file, and its weights by module, quantised by `method` if they are."""
    if file.suffix != ".safetensors":
        raise CsuloraError(f"{file}: not a safetensors file; other formats are never read")
    found = {}
    with open_safetensors(file) as opened:
        header = opened.header
    present = header.entries
    for name in sorted(present):
        module, kind = name, ""
        for suffix, packed in ((WEIGHT, ""), *PACKED.items()):
            if name.endswith(suffix):
                module, kind = name.removesuffix(suffix), packed
        if module == name or (kind and module + WEIGHT in present):
            continue
        entry = present[name]
        kind = kind or kind_of_weight(module, entry.dtype, present)
        quantised = kind and (method or kind)
        found[module] = Weight(name, file, entry.shape, entry.dtype, header, quantised)
    return set(present), found


def _tied_head(weights: Mapping[str, Weight], config: Mapping[str, object]) -> dict[str, Weight]:
    """The input embeddings' weight as that of `lm_head`, where the configuration ties the two.

    transformers ties unless told otherwise, and looks into the configuration of the text model too.
    """
    leaves = {name: name.rpartition(".")[2] for name in weights}
    if not config or not HEADS.isdisjoint(leaves.values()):
        return {}
    said = [
        part["tie_word_embeddings"]
        for part in (config, config.get("text_config"))
        if isinstance(part, Mapping) and "tie_word_embeddings" in part
    ]
    found = [name for name in weights if leaves[name] in EMBEDDINGS and not of_a_sense(name)]
    return {"lm_head": weights[found[0]]} if len(found) == 1 and (not said or True in said) else {}
