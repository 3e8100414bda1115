"""The method in dense float64, by full SVD of the blocks: the truth that every test compares with.

It forms d_out x d_in matrices and is written from the definition (docs/method.md, "The problem"), not
from the factor form, so that it shares no step with the code under test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blocks(dW: Tensor, U: Tensor, V: Tensor) -> list[Tensor]:
    """ff, fo, of, oo of dW (d_out, d_in) for projectors of U (d_out, k), V (d_in, k)."""
    dW, U, V = dW.double(), U.double(), V.double()
    left = U @ (U.mT @ dW)
    ff = (left @ V) @ V.mT
    of = ((dW - left) @ V) @ V.mT
    return [ff, left - ff, of, dW - left - of]


def correct(dW: Tensor, U: Tensor, V: Tensor, strengths, granularity: str) -> Tensor:
    """dW* (d_out, d_in) for strengths (aligned, left, right, off)."""
    parts = blocks(dW, U, V)
    E = float(dW.double().square().sum())
    if E == 0:
        return dW.double()
    attenuate = {"component": _component, "direction": _direction}[granularity]
    return sum(attenuate(M, lam, E) for M, lam in zip(parts, strengths, strict=True))


def energies(dW: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return torch.stack([M.square().sum() for M in blocks(dW, U, V)])


def _component(M: Tensor, lam: float, E: float) -> Tensor:
    if math.isinf(lam):
        return torch.zeros_like(M)
    return M / (1 + lam * M.square().sum() / E)


def _direction(M: Tensor, lam: float, E: float) -> Tensor:
    if math.isinf(lam):
        return torch.zeros_like(M)
    X, s, Yt = torch.linalg.svd(M, full_matrices=False)
    return (X * (s / (1 + lam * s.square() / E))) @ Yt
