"""PEFT LoRA adapter folders: loading them checked, and writing them whole."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora import peft_config
from csulora.buffers import read_safetensors
from csulora.errors import CsuloraError, DiskFullError
from csulora.files import (
    copy_file,
    inside,
    json_bytes,
    json_rows,
    read_bytes,
    resolve_source,
    sha256_file,
    whole_folder,
    write_bytes,
    write_safetensors,
)
from csulora.names import ends_with

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
REPORT = "csulora_report.json"
HUB_PATTERNS = ["*"]
PREFIX = "base_model.model."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraModule:
    """The update of one linear weight, dW = scaling * B @ A."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    alpha: float
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def portable(self, rank: int) -> LoraModule:
        """The same update with the scaling folded into B and zeros up to `rank`."""
        missing = rank - self.rank
        return LoraModule(
            A=torch.nn.functional.pad(self.A, (0, 0, 0, missing)),
            B=torch.nn.functional.pad(self.B * self.scaling, (0, missing)),
            alpha=rank,
            scaling=1.0,
        )


@dataclass(frozen=True)
class Source:
    """Where an adapter came from: its folder, and sha256 of its two defining files."""

    folder: Path
    name: str
    sha256: str  # of adapter_model.safetensors
    config_sha256: str  # of adapter_config.json


@dataclass(frozen=True)
class LoraAdapter:
    """A PEFT LoRA adapter in memory.

    modules: by module name as PEFT sees it (no `base_model.model.` prefix); updates of linear weights.
    extra: tensors by their name in the file that are not such updates, kept as they are.
    extra_modules: names and ranks of LoRA modules among `extra` (DoRA, embeddings, convolutions, ...).
    """

    modules: dict[str, LoraModule]
    config: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)
    extra_modules: dict[str, int] = field(default_factory=dict)
    source: Source | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        pass_through: bool = False,
        pin_memory: bool = False,
    ) -> LoraAdapter:
        """Read a PEFT adapter folder (or hub id); each file is read once, tensors are views of it.

        pass_through: keep tensors that are not a LoRA update on a linear weight instead of refusing.
        pin_memory: read into page-locked memory, for a correction on a GPU.

        Raises CsuloraError, naming file and tensor, for anything malformed: missing files, a pickle,
        another PEFT method, unpaired or ill-shaped factors, ranks that contradict the configuration,
        NaN or Inf, unsupported types, and (without pass_through) anything that is not B A.
        """
        path = resolve_source(folder, HUB_PATTERNS)
        if not path.is_dir():
            raise CsuloraError(f"{path}: expected an adapter folder, found a file")
        config_file = inside(path, peft_config.FILE, path)
        config_data = read_bytes(config_file)
        config = peft_config.parse_config(config_file, config_data)
        weights = _weights_file(path)
        tensors, digest = read_safetensors(weights, pin_memory=pin_memory)
        linear, extra, extra_modules = _sort_out(tensors, config)
        if extra and not pass_through:
            raise CsuloraError(
                f"{weights}: {len(extra)} tensor(s) are not a LoRA update on a linear weight: "
                f"{listed(extra)}; pass --pass-through to copy them uncorrected"
            )
        if not linear and not extra:
            raise CsuloraError(f"{weights}: holds no LoRA tensors")
        return cls(
            modules={name: _module(weights, name, linear[name], config) for name in sorted(linear)},
            config=config,
            extra=extra,
            extra_modules=extra_modules,
            source=Source(
                folder=path,
                name=_folder_name(folder),
                sha256=digest,
                config_sha256=hashlib.sha256(config_data).hexdigest(),
            ),
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        report: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Write the adapter folder whole or not at all.

        Every other file of the source folder is copied, except other adapter weights (a pickled copy,
        a nested adapter), which would be uncorrected, and links to folders; their names are returned.
        `report` becomes `csulora_report.json`. Raises CsuloraError if the folder exists and `overwrite`
        is not set, and if it lies within the source folder or around it.
        """
        target = Path(folder)
        if self.source is not None:
            place, origin = target.resolve(), self.source.folder.resolve()
            if place.is_relative_to(origin) or origin.is_relative_to(place):
                raise CsuloraError(
                    f"{target}: lies inside the adapter {self.source.folder} or around it"
                )
        tensors = dict(self.extra)
        for name, module in self.modules.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.B
        try:
            with whole_folder(target, overwrite=overwrite) as temporary:
                copied, left_out = _other_files(self.source)
                for relative, path in copied.items():
                    copy_file(path, temporary / relative)
                write_safetensors(temporary / WEIGHTS, tensors, {"format": "pt"})
                write_bytes(temporary / peft_config.FILE, json_bytes(self._written_config()))
                if report is not None:
                    write_bytes(temporary / REPORT, json_rows({**report, "left_out": left_out}))
        except OSError as error:
            place = error.filename or target
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (DiskFullError if full else CsuloraError)(
                f"{target}: cannot be written ({place}: {error.strerror or error})"
            ) from None
        return left_out

    def _written_config(self) -> dict[str, Any]:
        ranks = {name: module.rank for name, module in self.modules.items()} | self.extra_modules
        alphas = {name: module.alpha for name, module in self.modules.items()}
        for name in self.extra_modules:
            alphas[name] = peft_config.module_alpha(self.config, name)
        return peft_config.corrected_config(self.config, ranks, alphas)


def identify(folder: str | os.PathLike[str]) -> Source:
    """The digests of an adapter folder (or hub id) without loading it.

    Raises CsuloraError where the folder or one of its two files is missing.
    """
    path = resolve_source(folder, HUB_PATTERNS)
    config, weights = inside(path, peft_config.FILE, path), _weights_file(path)
    return Source(path, _folder_name(folder), sha256_file(weights), sha256_file(config))


def _folder_name(folder: str | os.PathLike[str]) -> str:
    return Path(os.path.abspath(folder)).name


def _weights_file(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if weights.exists():
        return inside(folder, WEIGHTS, folder)
    if (folder / PICKLE).exists():
        raise CsuloraError(
            f"{folder / PICKLE}: a pickle; pickles are never read: load the adapter with PEFT and "
            "save it with safe_serialization=True"
        )
    raise CsuloraError(f"{weights}: no such file")


def _sort_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, int]]:
    """Split the file into linear LoRA factors by module, other tensors, and other modules' ranks."""
    factors: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if key.startswith(PREFIX) and module and side in ("A.weight", "B.weight"):
            factors.setdefault(module, {})[side[0]] = tensor
        else:
            extra[key] = tensor
    with_magnitude = {
        key.removeprefix(PREFIX).partition(".lora_magnitude_vector")[0]
        for key in extra
        if ".lora_magnitude_vector" in key
    }
    linear: dict[str, dict[str, Tensor]] = {}
    other_ranks: dict[str, int] = {}
    for name, pair in factors.items():
        plain = not (
            config.get("use_dora") or name in with_magnitude or _is_expert(name, pair, config)
        )
        if plain and all(tensor.dim() == 2 for tensor in pair.values()):
            linear[name] = pair
            continue
        other_ranks[name] = peft_config.module_rank(config, name)
        for side, tensor in pair.items():
            extra[f"{PREFIX}{name}.lora_{side}.weight"] = tensor
    for key in extra:
        if ".lora_embedding_A" in key:
            name = key.removeprefix(PREFIX).partition(".lora_embedding_A")[0]
            other_ranks[name] = peft_config.module_rank(config, name)
    return linear, extra, other_ranks


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
    rank = peft_config.module_rank(config, name)
    return "" in parents and "A" in pair and pair["A"].shape[0] != rank


def _module(
    path: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraModule:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise CsuloraError(f"{path}: {PREFIX}{name}.lora_{other}.weight has no lora_{side}")
        if pair[side].dtype not in DTYPES:
            raise CsuloraError(
                f"{path}: tensor {PREFIX}{name}.lora_{side}.weight is {pair[side].dtype}; "
                "float32, bfloat16 or float16 is needed"
            )
    A, B = pair["A"], pair["B"]
    rank = peft_config.module_rank(config, name)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise CsuloraError(
            f"{path}: {PREFIX}{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit "
            f"rank {rank} of {peft_config.FILE}"
        )
    if not A.shape[1] or not B.shape[0]:
        raise CsuloraError(f"{path}: {PREFIX}{name}: empty factors")
    alpha = peft_config.module_alpha(config, name)
    s = peft_config.scaling(alpha, rank, bool(config.get("use_rslora")))
    return LoraModule(A=A, B=B, alpha=alpha, scaling=s)


def _other_files(source: Source | None) -> tuple[dict[str, Path], list[str]]:
    """Files of the source folder to copy, by relative path, and those left out."""
    copied: dict[str, Path] = {}
    left_out: list[str] = []
    if source is None:
        return copied, left_out
    for folder, folders, files in os.walk(source.folder, onerror=_raise):
        links = [Path(folder) / name for name in folders if (Path(folder) / name).is_symlink()]
        left_out += [str(link.relative_to(source.folder)) for link in links]
        for file in files:
            relative = str((Path(folder) / file).relative_to(source.folder))
            if relative in (WEIGHTS, peft_config.FILE, REPORT):
                continue
            if file.startswith("adapter_model."):
                left_out.append(relative)
                continue
            path = inside(source.folder, relative, source.folder)
            if not path.is_file():
                raise CsuloraError(f"{path}: not a regular file; refused")
            copied[relative] = path
    return copied, sorted(left_out)


def _raise(error: OSError) -> None:
    raise error


def listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f", and {len(names) - 6} more" if len(names) > 6 else "")
