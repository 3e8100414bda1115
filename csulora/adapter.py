"""PEFT LoRA adapter folders: loading them checked, and writing them whole."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files import peft_config
from csulora.files.companions import copy_companions
from csulora.files.folders import check_apart, inside, whole_folder, writing
from csulora.files.hub import resolve_source
from csulora.files.json import json_bytes, json_rows
from csulora.files.peft_ranks import Rules, scaling
from csulora.files.peft_tensors import PREFIX, Factors, factor_name, factor_word, sort_out
from csulora.files.plain import mode_of, read_bytes, sha256_file, write_bytes
from csulora.files.safetensors import (
    SAFETENSORS_DTYPES,
    check_finite,
    open_safetensors,
    read_safetensors,
    write_safetensors,
)
from csulora.output import (
    REPORT,
    SIGNATURE,
    WEIGHTS,
    Written,
    check_replaceable,
    made_of,
    mark_in,
    metadata_of,
)
from csulora.report import Report
from csulora.text import encodable, listed, span

PICKLE = "adapter_model.bin"
# Of a source, not copied beside other weights, of which a signature would say nothing.
OWN = frozenset({WEIGHTS, REPORT, SIGNATURE, peft_config.FILE})
HUB_PATTERNS = ["*"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The update of one linear weight, dW = scaling * B @ A, or of an embedding.

    An embedding is a linear weight for one-hot tokens: d_in is the vocabulary. It is stored the other
    way round, as (d_in, d_out), so what is added to it is dW^T.
    """

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    alpha: float
    scaling: float
    embedding: bool = False

    def __repr__(self) -> str:
        shape = f"{self.B.shape[0]} x {self.A.shape[1]}"
        dtype = str(self.B.dtype).removeprefix("torch.")
        return f"LoraModule({shape}, rank {self.rank}, alpha {self.alpha:g}, {dtype})"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def detached(self) -> LoraModule:
        """The same without gradients, for factors that are parameters of a model."""
        if not (self.A.requires_grad or self.B.requires_grad):
            return self
        return replace(self, A=self.A.detach(), B=self.B.detach())

    def portable(self, rank: int) -> LoraModule:
        """The same update with the scaling folded into a B of at least float32, zeros up to `rank`."""
        # A type of 16 bits need not hold B's digits, or its size, once it is multiplied.
        wide = self.B.to(torch.promote_types(self.B.dtype, torch.float32))
        A, B, missing = self.A, wide * self.scaling, rank - self.rank
        if missing:  # a pad of nothing copies all
            A = torch.nn.functional.pad(A, (0, 0, 0, missing))
            B = torch.nn.functional.pad(B, (0, missing))
        return replace(self, A=A, B=B, alpha=rank, scaling=1.0)


@dataclass(frozen=True)
class Source:
    """Where an adapter came from: its folder, and sha256 of its two defining files."""

    folder: Path
    name: str
    sha256: str  # of adapter_model.safetensors
    config_sha256: str  # of adapter_config.json
    corrected: bool = False  # its weights say that csulora corrected them

    @property
    def digests(self) -> tuple[str, str]:
        """Of the weights and of the configuration."""
        return self.sha256, self.config_sha256

    def to_dict(self) -> dict[str, str]:
        """What a report says of it; the folder may be another one elsewhere."""
        return {"name": self.name, "sha256": self.sha256, "config_sha256": self.config_sha256}


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A PEFT LoRA adapter in memory.

    modules: by module name as PEFT sees it (no `base_model.model.` prefix); updates of linear weights
        and embeddings.
    config: PEFT's configuration, as the adapter came with it; `written_config` is that of its modules.
    passed_through: tensors by their name in the file that are not such updates, kept as they are.
    passed_through_ranks: ranks of the LoRA modules among them (DoRA, convolutions, ...), by the name with
        which PEFT looks into rank_pattern.
    made: how it was corrected, as its file will say or said: `settings`, `subspace`, `source`, and
        `before`, the same of an earlier correction; empty for an adapter that never was.
    """

    modules: dict[str, LoraModule]
    config: dict[str, Any]
    passed_through: dict[str, Tensor] = field(default_factory=dict)
    passed_through_ranks: dict[str, int] = field(default_factory=dict)
    source: Source | None = None
    made: dict[str, Any] = field(default_factory=dict)

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

        pass_through: keep tensors that are not a LoRA update on a linear weight or embedding instead of
            refusing.
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
        config_data = read_bytes(config_file, peft_config.CONFIG_LIMIT)
        config = peft_config.parse_config(config_file, config_data)
        weights = _weights_file(path)

        def check(outlines: dict[str, Tensor]) -> None:
            cls._of(weights, outlines, config, pass_through, None)

        found = read_safetensors(weights, pin_memory=pin_memory, check=check)
        config_digest = hashlib.sha256(config_data).hexdigest()
        made = made_of(mark_in(found.metadata))
        source = Source(path, name or folder_name(folder), found.sha256, config_digest, bool(made))
        return replace(cls._of(weights, found.tensors, config, pass_through, source), made=made)

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
        rules = Rules(where, config)
        updates, others, ranks = sort_out(where, tensors, config, rules)
        if others and not pass_through:
            remedy = "pass --pass-through to copy them uncorrected"
            if config.get("use_dora"):
                remedy = "use_dora makes DoRA of all modules, which cannot be corrected"
            raise CsuloraError(
                f"{where}: {len(others)} tensor(s) are not a LoRA update on a linear weight or "
                f"embedding: {listed(others)}; {remedy}"
            )
        if not updates and not others:
            raise CsuloraError(f"{where}: holds no LoRA tensors")
        modules = {name: _module(where, name, updates[name], rules) for name in sorted(updates)}
        return cls(modules, config, others, ranks, source)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that PEFT saves them under, without copies."""
        tensors = dict(self.passed_through)
        for name, module in self.modules.items():
            tensors[factor_name(name, "A", module.embedding)] = module.A
            tensors[factor_name(name, "B", module.embedding)] = module.B
        return tensors

    def written_config(self, before: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The configuration under which PEFT gives every module its own rank and alpha.

        `config` where that is so already; for a changed adapter its values are scaled and its keys stay.
        Biases are mentioned where there are some. before: the ranks that the modules had under `config`,
        where it is that of another adapter. Raises CsuloraError where no configuration can say it.
        """
        return copy.deepcopy(self._corrected_config(before))

    def _corrected_config(self, before: Mapping[str, int] | None = None) -> dict[str, Any]:
        """`written_config` that shares its parts with `config`."""
        return peft_config.corrected_config(
            self.config,
            {name: module.rank for name, module in self.modules.items()},
            {name: module.alpha for name, module in self.modules.items()},
            self.passed_through,
            self.passed_through_ranks,
            before,
        )

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
        `report` (or what its `to_dict` returned) becomes `csulora_report.json`, with the digests of what
        was written. Raises ExistsError if the folder exists and `overwrite` is not set or it is no output
        of csulora, and CsuloraError if it lies within the source folder or around it.
        """
        values = report.to_dict() if isinstance(report, Report) else report
        return write_folder(self, Path(folder), overwrite=overwrite, report=values).left_out


def write_folder(
    adapter: LoraAdapter,
    folder: Path,
    *,
    overwrite: bool,
    report: Mapping[str, Any] | None,
    durable: bool = True,
    companions: bool = True,
    mode: int | None = None,
) -> Written:
    """`LoraAdapter.save`, and what a report says of it; durable and companions as in `correct_folder`.

    mode: permission bits of the files, None: those of the source's.
    """
    if adapter.source is not None:
        check_apart(folder, adapter.source.folder)
    check_replaceable(folder)
    whole = whole_folder(folder, overwrite=overwrite, durable=durable)
    with writing(folder), whole as temporary:
        left_out: list[str] = []
        config_mode = mode
        if adapter.source is not None:
            origin = adapter.source.folder
            if companions:
                left_out = copy_companions(origin, temporary, adapter.nbytes, OWN, durable=durable)
            if mode is None:
                mode, config_mode = mode_of(origin / WEIGHTS), mode_of(origin / peft_config.FILE)
        config = json_bytes(adapter._corrected_config())
        metadata = metadata_of(adapter.made)
        digest = write_safetensors(
            temporary / WEIGHTS, adapter.tensors(), metadata, mode=mode, durable=durable
        )
        write_bytes(temporary / peft_config.FILE, config, mode=config_mode, durable=durable)
        written = Written(digest, hashlib.sha256(config).hexdigest(), left_out)
        if report is not None:
            rows = json_rows({**report, **written.in_report()})
            write_bytes(temporary / REPORT, rows, mode=mode, durable=durable)
    return written


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise CsuloraError for what an adapter file could not hold."""
    for name, X in tensors.items():
        if not isinstance(X, Tensor) or X.is_meta or X.layout != torch.strided:
            raise CsuloraError(f"tensors: {name} is not a dense tensor in memory")
        if X.dtype not in SAFETENSORS_DTYPES:
            raise CsuloraError(f"tensors: {name} is {X.dtype}, which no adapter file holds")
        if encodable(name) != name:
            raise CsuloraError(f"tensors: {name!r} is no name in Unicode, which no file holds")


def identify(folder: str | os.PathLike[str], *, name: str | None = None) -> Source:
    """The digests of an adapter folder (or hub id) without loading it; `name` as in `LoraAdapter.load`.

    Raises CsuloraError where the folder or one of its two files is missing.
    """
    path = resolve_source(folder, HUB_PATTERNS)
    config, weights = inside(path, peft_config.FILE, path), _weights_file(path)
    config_digest = sha256_file(config, peft_config.CONFIG_LIMIT)
    with open_safetensors(weights) as opened:
        return Source(path, name or folder_name(folder), opened.hash(), config_digest)


def folder_name(folder: str | os.PathLike[str]) -> str:
    """The last part of a path or a hub id, as text."""
    return encodable(Path(os.path.abspath(folder)).name)


def _weights_file(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if os.path.lexists(weights):
        return inside(folder, WEIGHTS, folder)
    if (folder / PICKLE).exists():
        raise CsuloraError(
            f"{folder / PICKLE}: a pickle; pickles are never read: load the adapter with PEFT and "
            "save it with safe_serialization=True"
        )
    if shards := sorted(folder.glob(f"{weights.stem}-*-of-*{weights.suffix}")):
        raise CsuloraError(
            f"{shards[0]}: the adapter is in {len(shards)} file(s), as transformers splits it; save it "
            "in one, with save_pretrained(..., max_shard_size='100GB')"
        )
    raise CsuloraError(f"{weights}: no such file")


def _module(path: str | Path, name: str, factors: Factors, rules: Rules) -> LoraModule:
    pair, embedding = factors
    A, B = pair["A"], pair["B"]
    for side, tensor in pair.items():
        if tensor.dtype not in DTYPES:
            raise CsuloraError(
                f"{path}: tensor {factor_name(name, side, embedding)} is {tensor.dtype}; "
                "float32, bfloat16 or float16 is needed"
            )
    alphas = rules.alphas(name, A.shape[0])
    if A.shape[0] != B.shape[1] or not alphas:
        raise CsuloraError(
            f"{path}: {PREFIX}{name}: {factor_word('A', embedding)} {tuple(A.shape)} and "
            f"{factor_word('B', embedding)} {tuple(B.shape)} do not fit rank {rules.rank(name)} of "
            f"{peft_config.FILE}"
        )
    s = scaling(alphas[0], A.shape[0], rules.rslora)
    return LoraModule(A=A, B=B, alpha=alphas[0], scaling=s, embedding=embedding)
