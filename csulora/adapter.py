"""PEFT LoRA adapter folders: loading them checked, and writing them whole."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora.errors import CsuloraError, ExistsError
from csulora.files import peft_config
from csulora.files.folders import check_apart, check_folder, inside, whole_folder, writing
from csulora.files.hub import resolve_source
from csulora.files.json import json_bytes, json_rows
from csulora.files.peft_tensors import PREFIX, factor_name, sort_out
from csulora.files.plain import copy_file, read_bytes, sha256_file, write_bytes
from csulora.files.safetensors import (
    SAFETENSORS_DTYPES,
    check_finite,
    read_safetensors,
    write_safetensors,
)
from csulora.report import Report
from csulora.text import listed, span

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
REPORT = "csulora_report.json"
HUB_PATTERNS = ["*"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What trainers keep beside an adapter to go on from: optimizer, scheduler, random states, nearly all
# of it pickles, whatever its name.
TRAINING = re.compile(
    r".*\.(pt|pth|bin|pkl|pickle|ckpt|distcp)|(optimizer|scheduler)\..*|rng_state.*"
    r"|zero_to_fp32\.py|latest",
    re.IGNORECASE | re.DOTALL,
)
TRAINING_FOLDER = re.compile(r"global_step\d*|(optimizer|pytorch_model_fsdp)_\d+")


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The update of one linear weight, dW = scaling * B @ A."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    alpha: float
    scaling: float

    def __repr__(self) -> str:
        shape = f"{self.B.shape[0]} x {self.A.shape[1]}"
        dtype = str(self.B.dtype).removeprefix("torch.")
        return f"LoraModule({shape}, rank {self.rank}, alpha {self.alpha:g}, {dtype})"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def detached(self) -> LoraModule:
        """The same without gradients, for factors that are parameters of a model."""
        return replace(self, A=self.A.detach(), B=self.B.detach())

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

    def to_dict(self) -> dict[str, str]:
        """What a report says of it; the folder may be another one elsewhere."""
        return {"name": self.name, "sha256": self.sha256, "config_sha256": self.config_sha256}


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A PEFT LoRA adapter in memory.

    modules: by module name as PEFT sees it (no `base_model.model.` prefix); updates of linear weights.
    config: PEFT's configuration, as the adapter came with it; `written_config` is that of its modules.
    passed_through: tensors by their name in the file that are not such updates, kept as they are.
    passed_through_ranks: ranks by module name of the LoRA modules among them (DoRA, embeddings,
        convolutions, ...).
    """

    modules: dict[str, LoraModule]
    config: dict[str, Any]
    passed_through: dict[str, Tensor] = field(default_factory=dict)
    passed_through_ranks: dict[str, int] = field(default_factory=dict)
    source: Source | None = None

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        parts = [f"{len(self.modules)} modules"]
        if ranks:
            parts.append(f"rank {span(ranks)}")
        if self.passed_through:
            parts.append(f"{len(self.passed_through)} tensors passed through")
        if self.source is not None:
            parts.append(f"from {self.source.name}")
        return f"LoraAdapter({', '.join(parts)})"

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        pass_through: bool = False,
        pin_memory: bool = False,
        name: str | None = None,
    ) -> LoraAdapter:
        """Read a PEFT adapter folder (or hub id); each file is read once, tensors are views of it.

        pass_through: keep tensors that are not a LoRA update on a linear weight instead of refusing.
        pin_memory: read into page-locked memory, for a correction on a GPU.
        name: what reports call the source, if not as its folder or hub id.

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
        config_digest = hashlib.sha256(config_data).hexdigest()
        source = Source(path, name or folder_name(folder), digest, config_digest)
        return cls._of(weights, tensors, config, pass_through, source)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        pass_through: bool = False,
    ) -> LoraAdapter:
        """An adapter from tensors by the names that PEFT saves them under, and its configuration.

        tensors: what `peft.get_peft_model_state_dict(model)` returns; they are not copied.
        config: what PEFT's `LoraConfig.to_dict()` returns, or the content of `adapter_config.json`.

        Raises as `load`.
        """
        checked = peft_config.plain_config(config)
        _check_tensors(tensors)
        check_finite("tensors", tensors)
        return cls._of("tensors", tensors, checked, pass_through, None)

    @classmethod
    def _of(
        cls,
        where: str | Path,
        tensors: Mapping[str, Tensor],
        config: dict[str, Any],
        pass_through: bool,
        source: Source | None,
    ) -> LoraAdapter:
        linear, others, ranks = sort_out(tensors, config)
        if others and not pass_through:
            raise CsuloraError(
                f"{where}: {len(others)} tensor(s) are not a LoRA update on a linear weight: "
                f"{listed(others)}; pass --pass-through to copy them uncorrected"
            )
        if not linear and not others:
            raise CsuloraError(f"{where}: holds no LoRA tensors")
        modules = {name: _module(where, name, linear[name], config) for name in sorted(linear)}
        return cls(modules, config, others, ranks, source)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that PEFT saves them under, without copies."""
        tensors = dict(self.passed_through)
        for name, module in self.modules.items():
            tensors[factor_name(name, "A")] = module.A
            tensors[factor_name(name, "B")] = module.B
        return tensors

    def written_config(self) -> dict[str, Any]:
        """The configuration under which PEFT gives every module its own rank and alpha.

        `config` itself where that is so already; patterns and defaults of a changed adapter otherwise.
        """
        ranks = {name: module.rank for name, module in self.modules.items()}
        alphas = {name: module.alpha for name, module in self.modules.items()}
        for name in self.passed_through_ranks:
            alphas[name] = peft_config.module_alpha(self.config, name)
        config = copy.deepcopy(self.config)
        return peft_config.corrected_config(config, ranks | self.passed_through_ranks, alphas)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        report: Report | Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Write the adapter folder whole or not at all.

        Every other file of the source folder is copied, except other adapter weights (a pickled copy),
        which would be uncorrected, folders of other adapters (a trainer's `checkpoint-N`), what a
        trainer keeps to go on from (any pickle), and links to folders; their names are returned.
        `report` (or what its `to_dict` returned) becomes `csulora_report.json`. Raises ExistsError if
        the folder exists and `overwrite` is not set or it holds no adapter, and CsuloraError if it lies
        within the source folder or around it.
        """
        target = Path(folder)
        if self.source is not None:
            check_apart(target, self.source.folder)
        values = report.to_dict() if isinstance(report, Report) else report
        check_replaceable(target)
        with writing(target), whole_folder(target, overwrite=overwrite) as temporary:
            copied, left_out = _other_files(self.source)
            for relative, path in copied.items():
                copy_file(path, temporary / relative)
            write_safetensors(temporary / WEIGHTS, self.tensors(), {"format": "pt"})
            write_bytes(temporary / peft_config.FILE, json_bytes(self.written_config()))
            if values is not None:
                write_bytes(temporary / REPORT, json_rows({**values, "left_out": left_out}))
        return left_out


def check_replaceable(folder: Path) -> None:
    """Raise ExistsError for what is there and no output replaces: files, links, folders of other things.

    A wrong path must not cost anybody a folder that has nothing to do with adapters.
    """
    check_folder(folder)
    names = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    if names and not names & {WEIGHTS, peft_config.FILE, REPORT}:
        raise ExistsError(f"{folder}: a folder that holds no adapter; remove it yourself")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise CsuloraError for what an adapter file could not hold."""
    for name, X in tensors.items():
        if not isinstance(X, Tensor) or X.is_meta or X.layout != torch.strided:
            raise CsuloraError(f"tensors: {name} is not a dense tensor in memory")
        if X.dtype not in SAFETENSORS_DTYPES:
            raise CsuloraError(f"tensors: {name} is {X.dtype}, which no adapter file holds")


def identify(folder: str | os.PathLike[str], *, name: str | None = None) -> Source:
    """The digests of an adapter folder (or hub id) without loading it; `name` as in `LoraAdapter.load`.

    Raises CsuloraError where the folder or one of its two files is missing.
    """
    path = resolve_source(folder, HUB_PATTERNS)
    config, weights = inside(path, peft_config.FILE, path), _weights_file(path)
    return Source(path, name or folder_name(folder), sha256_file(weights), sha256_file(config))


def folder_name(folder: str | os.PathLike[str]) -> str:
    """The last part of a path or a hub id, as text: bytes that are not UTF-8 become `\\udc80`."""
    return Path(os.path.abspath(folder)).name.encode(errors="backslashreplace").decode()


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


def _module(
    path: str | Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraModule:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise CsuloraError(f"{path}: {factor_name(name, other)} has no lora_{side}")
        if pair[side].dtype not in DTYPES:
            raise CsuloraError(
                f"{path}: tensor {factor_name(name, side)} is {pair[side].dtype}; "
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
        whole = [name for name in folders if _stays(Path(folder) / name)]
        folders[:] = [name for name in folders if name not in whole]
        left_out += [str((Path(folder) / name).relative_to(source.folder)) for name in whole]
        for file in files:
            relative = str((Path(folder) / file).relative_to(source.folder))
            if relative in (WEIGHTS, peft_config.FILE, REPORT):
                continue
            if file.startswith("adapter_model.") or TRAINING.fullmatch(file):
                left_out.append(relative)
                continue
            path = inside(source.folder, relative, source.folder)
            if not path.is_file():
                raise CsuloraError(f"{path}: not a regular file; refused")
            copied[relative] = path
    return copied, sorted(left_out)


def _stays(folder: Path) -> bool:
    """Whether a folder within an adapter is not copied: a link, another adapter, a training state."""
    nested = os.path.lexists(folder / peft_config.FILE)
    return folder.is_symlink() or nested or TRAINING_FOLDER.fullmatch(folder.name) is not None


def _raise(error: OSError) -> None:
    raise error
