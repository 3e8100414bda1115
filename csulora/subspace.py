"""The safety-aligned subspace of a model pair: U, S, V per module, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from csulora.errors import CsuloraError, UsageError
from csulora.files.folders import whole_file
from csulora.files.json import load_json
from csulora.files.safetensors import open_safetensors, safetensors_chunks, write_safetensors
from csulora.method.realign import Spectrum, noise_edge
from csulora.text import span

if TYPE_CHECKING:
    from csulora_kernels import Basis

FORMAT = "csulora_subspace/1"
# Larger than float32 rounding, smaller than what a bfloat16 basis shows (about 4e-3).
ORTHONORMAL = 1e-4
# Metadata that tells where a subspace comes from; a file written by another program may lack it.
_ORIGIN = ("base", "aligned", "base_digest", "aligned_digest")


@dataclass(frozen=True, eq=False)
class ModuleSubspace:
    """Leading singular triplets of D = W_aligned - W_base of one module, in (d_out, d_in) orientation."""

    U: Tensor  # (d_out, k) float32, orthonormal columns
    S: Tensor  # (k) float32, descending
    V: Tensor  # (d_in, k) float32, orthonormal columns
    energy_share: float  # ||U^T D V||^2 / ||D||^2, 0 where D = 0
    fan_in_fan_out: bool = False  # the checkpoint stores the weight as (d_in, d_out)

    def __repr__(self) -> str:
        shape = f"{self.U.shape[0]} x {self.V.shape[0]}"
        share = f"{100 * self.energy_share:.1f} % of the energy"
        return f"ModuleSubspace({shape}, rank {self.rank}, {share})"

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.S.shape[0]

    @cached_property
    def noise_edge(self) -> float:
        """The singular value up to which random noise of the size of D's remainder would reach."""
        return noise_edge(self.S, self.energy_share, self.U.shape[0], self.V.shape[0])

    def spectrum(self, scaling: float) -> Spectrum:
        """What realignment has to know of D, for an update of that scaling."""
        edge, s = (torch.tensor(x, dtype=torch.float64) for x in (self.noise_edge, scaling))
        return Spectrum(self.S.double(), edge, s)

    def prefix(self, rank: int) -> ModuleSubspace:
        """The at most `rank` leading directions, U and V as views."""
        if rank >= self.S.shape[0]:
            return self
        energy = float(self.S.double().square().sum())
        kept = float(self.S[:rank].double().square().sum())
        share = self.energy_share * kept / energy if energy else 0.0
        U, V = self.U[:, :rank], self.V[:, :rank]
        return replace(self, U=U, S=self.S[:rank], V=V, energy_share=share)

    def leading(self, rank: int) -> ModuleSubspace:
        """`prefix` with U and V as copies, where it is not all."""
        if rank >= self.S.shape[0]:
            return self
        found = self.prefix(rank)
        # Contiguous: a product's last bits may depend on strides, and copies elsewhere have none.
        return replace(found, U=found.U.contiguous(), V=found.V.contiguous())


@dataclass(frozen=True)
class Origin:
    """The checkpoint pair and the seed a subspace was estimated from; digests are hex sha256."""

    base: str
    aligned: str
    base_digest: str
    aligned_digest: str
    seed: int


@dataclass(frozen=True, eq=False)
class SafetySubspace:
    """Per module the directions in which alignment moved the weights.

    `modules` maps the checkpoint's parameter path without `.weight` to its ModuleSubspace.
    """

    modules: dict[str, ModuleSubspace]
    origin: Origin
    path: Path | None = None  # the file it was loaded from

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()}) or [0]
        pair = f"{self.origin.base} to {self.origin.aligned}"
        return f"SafetySubspace({len(self.modules)} modules, rank {span(ranks)}, {pair})"

    @property
    def rank(self) -> int:
        """The largest number of directions of a module."""
        return max(module.rank for module in self.modules.values())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rank: int | None = None) -> SafetySubspace:
        """Read a subspace file, optionally only its `rank` leading directions per module.

        The file is read once, and `sha256` is of the bytes that were read, whatever becomes of the file.

        Raises CsuloraError for a file that is not a subspace, or whose bases are not finite,
        orthonormal float32 matrices of fitting shapes.
        """
        file = Path(path)
        with open_safetensors(file) as opened:
            origin, details = _read_metadata(file, opened.header.metadata)
            names = _check_outlines(file, opened.outlines())
            tensors, digest = opened.read()
        loaded = cls(
            {name: _module(file, name, tensors, details) for name in names}, origin, path=file
        )
        loaded.__dict__["sha256"] = digest
        return loaded if rank is None else loaded.leading(rank)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the subspace file whole or not at all (format in docs/formats.md)."""
        target = Path(path)
        try:
            with whole_file(target) as temporary:
                write_safetensors(temporary, self._tensors(), self._metadata())
        except OSError as error:
            raise CsuloraError(f"{target}: cannot be written ({error.strerror or error})") from None

    def leading(self, rank: int) -> SafetySubspace:
        """The subspace of at most `rank` directions per module; a prefix of this one.

        Raises UsageError if rank is below 1 or above every module's rank.
        """
        largest = max(module.S.shape[0] for module in self.modules.values())
        if not 1 <= rank <= largest:
            raise UsageError(f"subspace rank must be between 1 and {largest}, not {rank}")
        modules = {name: module.leading(rank) for name, module in self.modules.items()}
        leading = replace(self, modules=modules)
        # Settings name the rank; the digest is that of the file.
        leading.__dict__["sha256"] = self.sha256
        return leading

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the file it was loaded from, as it was then, or of the one `save` would write."""
        digest = hashlib.sha256()
        for chunk in safetensors_chunks(self._tensors(), self._metadata()):
            digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def packed(self) -> dict[torch.device, Basis]:
        """The bases in the layout of the kernels, on each device that has asked for them."""
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{letter}": getattr(module, letter)
            for name, module in self.modules.items()
            for letter in ("U", "S", "V")
        }

    def _metadata(self) -> dict[str, str]:
        transposed = sorted(name for name, m in self.modules.items() if m.fan_in_fan_out)
        return {
            "csulora_format": FORMAT,
            "base": self.origin.base,
            "aligned": self.origin.aligned,
            "base_digest": self.origin.base_digest,
            "aligned_digest": self.origin.aligned_digest,
            "seed": str(self.origin.seed),
            "energy_share": json.dumps(
                {n: m.energy_share for n, m in sorted(self.modules.items())}
            ),
            "fan_in_fan_out": json.dumps(transposed),
        }


def is_subspace_file(path: Path) -> bool:
    """Whether the file says that it is a subspace, of whatever version."""
    try:
        with open_safetensors(path) as opened:
            return "csulora_format" in opened.header.metadata
    except CsuloraError:
        return False


def _read_metadata(file: Path, metadata: Mapping[str, str]) -> tuple[Origin, dict[str, Any]]:
    found = metadata.get("csulora_format")
    if found != FORMAT:
        raise CsuloraError(
            f"{file}: not a subspace file (csulora_format is {found!r}, expected {FORMAT!r}); "
            "write one with csulora estimate"
        )
    try:
        base, aligned, base_digest, aligned_digest = (metadata.get(key, "") for key in _ORIGIN)
        seed = int(metadata.get("seed", "0"))
        origin = Origin(base, aligned, base_digest, aligned_digest, seed)
        shares = _read_value(metadata, "energy_share", "{}")
        details = {
            "energy_share": {name: _share(value) for name, value in shares.items()},
            "fan_in_fan_out": {str(n) for n in _read_value(metadata, "fan_in_fan_out", "[]")},
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CsuloraError(
            f"{file}: malformed metadata ({error}); estimate the subspace again"
        ) from None
    return origin, details


def _read_value(metadata: Mapping[str, str], key: str, default: str) -> Any:
    return load_json(metadata.get(key, default).encode())


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"energy_share holds {str(value)[:20]!r}")
    return float(value)


def _check_outlines(file: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the modules, whose tensors have the right names, types and shapes."""
    strange = [name for name in tensors if not name.endswith((".U", ".S", ".V"))]
    if strange:
        raise CsuloraError(f"{file}: tensor {strange[0]} is neither a U, an S nor a V")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    if not names:
        raise CsuloraError(f"{file}: holds no modules")
    for name in names:
        _check_shapes(file, name, tensors)
    return names


def _check_shapes(file: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    try:
        U, S, V = (tensors[f"{name}.{letter}"] for letter in ("U", "S", "V"))
    except KeyError as error:
        raise CsuloraError(f"{file}: tensor {error.args[0]} is missing") from None
    k = S.shape[0] if S.dim() == 1 else -1
    for letter, X in (("U", U), ("V", V)):
        if X.dim() != 2 or X.shape[1] != k or X.dtype != torch.float32 or X.shape[0] < k:
            raise CsuloraError(
                f"{file}: tensor {name}.{letter} is {X.dtype} {tuple(X.shape)}, which does not fit "
                f"{name}.S {tuple(S.shape)} in float32"
            )
    if S.dtype != torch.float32:
        raise CsuloraError(f"{file}: tensor {name}.S is {S.dtype}, not float32")


def _module(
    file: Path, name: str, tensors: Mapping[str, Tensor], details: Mapping[str, Any]
) -> ModuleSubspace:
    U, S, V = (tensors[f"{name}.{letter}"] for letter in ("U", "S", "V"))
    k = S.shape[0]
    for letter, X in (("U", U), ("V", V)):
        # By NumPy, after whose products a process can be forked, see files.safetensors.SERIAL.
        if k and np.abs(X.numpy().T @ X.numpy() - np.eye(k)).max() > ORTHONORMAL:
            raise CsuloraError(f"{file}: columns of {name}.{letter} are not orthonormal")
    # A smaller rank is a prefix, which is the leading one only in this order.
    if bool((S.diff() > 0).any()) or bool((S < 0).any()):
        raise CsuloraError(f"{file}: tensor {name}.S is not descending and non-negative")
    return ModuleSubspace(
        U, S, V, details["energy_share"].get(name, 0.0), name in details["fan_in_fan_out"]
    )
