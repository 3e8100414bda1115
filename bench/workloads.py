"""What is measured and forecast: adapters on a model's modules, with values to run them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shapes import MODELS
from torch import Tensor

import csulora_kernels as kernels
from csulora import Correction, Realignment
from csulora.settings import Method
from csulora_kernels import Tiles, choose
from csulora_kernels.layout import Shape
from csulora_kernels.settings import Kind

MODELS["toy"] = ({"a": (96, 80), "b": (72, 96)}, 1)
FORMS = ("exact", "same", "realign same", "realign exact")


@dataclass(frozen=True)
class Workload:
    """N adapters of one rank on every module of a model."""

    shapes: tuple[Shape, ...]
    adapters: int
    r: int
    form: str  # exact or same, of CSULoRA, or "realign" before it
    dtype: torch.dtype

    @classmethod
    def of(
        cls, model: str, adapters: int, r: int, form: str, k: int = 64, dtype=torch.bfloat16
    ) -> Workload:
        sides, layers = MODELS[model]
        shapes = tuple(Shape(*pair, k) for pair in sides.values()) * layers
        return cls(shapes, adapters, r, form, dtype)

    def tiles(self, capability: int = 90, processors: int = 132) -> Tiles:
        return choose(self.shapes, self.adapters, self.r, self.dtype, capability, processors)

    @property
    def kind(self) -> Kind:
        realign = self.form.startswith("realign ")
        return Kind("realign" if realign else "csulora", self.form.removeprefix("realign "))

    @property
    def length(self) -> int:
        """d_out + d_in of all modules."""
        return sum(s.d_out + s.d_in for s in self.shapes)

    @property
    def factors(self) -> int:
        return self.adapters * self.length * self.r * self.dtype.itemsize

    @property
    def basis(self) -> int:
        return 4 * sum((s.d_out + s.d_in) * s.k for s in self.shapes)

    @property
    def result(self) -> int:
        """Bytes of the new factors that are written."""
        lengths = [(s, s.d_in + (s.d_out if self.kind.writes_B else 0)) for s in self.shapes]
        elements = sum(length * self.kind.rank(self.r, s.k) for s, length in lengths)
        return self.adapters * elements * self.dtype.itemsize

    @property
    def floor(self) -> int:
        """Every byte of input read once and every byte of output written once."""
        return self.factors + self.basis + self.result


def batch(work: Workload, device: torch.device) -> tuple[kernels.Basis, kernels.Table]:
    """Random factors and bases; modules of one shape share values, but no memory."""
    seen: dict[tuple[int, int], Tensor] = {}

    def orthonormal(d: int, k: int) -> Tensor:
        if (d, k) not in seen:
            seen[d, k] = torch.linalg.qr(torch.randn(d, k, device=device))[0]
        return seen[d, k]

    bases = {
        f"m{m}": (orthonormal(s.d_out, s.k), orthonormal(s.d_in, s.k))
        for m, s in enumerate(work.shapes)
    }
    one = torch.zeros((), dtype=work.dtype, device=device)
    blank = {
        f"m{m}": (one.expand(s.d_out, work.r), one.expand(work.r, s.d_in))
        for m, s in enumerate(work.shapes)
    }
    basis = kernels.pack_basis(bases, device)
    table = kernels.pack([blank] * work.adapters, basis, device)
    table.data.normal_()
    return basis, table


def method_of(work: Workload) -> Method:
    """The settings of a workload: the defaults of its form, all directions of D taken."""
    if work.kind.method == "realign":
        return Realignment(form=work.kind.form, edge=False)
    return Correction(form=work.kind.form)


def spectrum_of(work: Workload, K: int, device: torch.device) -> kernels.Spectrum:
    """Singular values that fall, of the size of the factors' product."""
    k = max(s.k for s in work.shapes)
    S = torch.zeros(len(work.shapes), K, dtype=torch.float64)
    S[:, :k] = 1000.0 / (1 + torch.arange(k, dtype=torch.float64))
    scaling = torch.full((work.adapters, len(S)), 2.0, dtype=torch.float64)
    edge = torch.zeros(len(S), dtype=torch.float64)
    return kernels.Spectrum(S.to(device), edge.to(device), scaling.to(device))
