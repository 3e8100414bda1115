"""D = W_aligned - W_base as an operator: on a GPU it is multiplied by, and never stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import csulora_kernels

ROWS = 1024  # of D at a time, where it has to be looked at


@dataclass(frozen=True, eq=False)
class Difference:
    """D (m, n) of two weights as they are stored, with the part of a Tensor's interface that
    `csulora.method.krylov` uses. Products run as a Triton kernel."""

    base: Tensor  # contiguous; (m, n), or (n, m) if transposed
    aligned: Tensor
    transposed: bool = False

    dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.base.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def mT(self) -> Difference:
        return replace(self, transposed=not self.transposed)

    def __matmul__(self, X: Tensor) -> Tensor:
        """D X for X (n, c) in float32."""
        return csulora_kernels.displacement_product(
            self.base, self.aligned, X, transposed=self.transposed
        )

    def double(self) -> Tensor:
        """D itself, for the dense decomposition of a small one."""
        D = self.aligned.double() - self.base.double()
        return D.mT if self.transposed else D

    def rows(self) -> Iterator[Tensor]:
        """D in float32, a few rows (or, if transposed, columns) at a time."""
        for W, other in zip(self.aligned.split(ROWS), self.base.split(ROWS), strict=True):
            yield W.float() - other.float()


def energy_of(D: Tensor | Difference) -> Tensor:
    """||D||_F^2 in float64, row by row: one float32 sum over millions would be off by 1e-5 and more."""
    parts: Iterable[Tensor] = [D] if isinstance(D, Tensor) else D.rows()
    return torch.stack(
        [torch.linalg.vector_norm(X, dim=1).double().square().sum() for X in parts]
    ).sum()
