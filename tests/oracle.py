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


def realign(
    dW: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    *,
    strength: float,
    gamma: float,
    edge: float = 0.0,
    opposed: bool = False,
    B: Tensor | None = None,
) -> Tensor:
    """The realigned dW (d_out, d_in), towards D = U S V^T (d_out, k), (k), (d_in, k).

    Without B nothing is lost (`exact`). With B (d_out, r), dW = s B A, what is put in place of the
    removed is its least-squares fit on the columns of B (`same`). The scaling s is part of dW.
    """
    dW, U, S, V = (X.double() for X in (dW, U, S, V))
    if not bool(dW.any()):
        return dW
    f = shares(S, strength, edge)
    if opposed:
        f = torch.where(((U.mT @ dW) * V.mT).sum(1) < 0, f, 0.0)
    put = gamma * (U * (S * f)) @ V.mT
    if B is not None:
        put = _projector(B) @ put
    return dW - (dW @ V * f) @ V.mT + put


def shares(S: Tensor, strength: float, edge: float = 0.0) -> Tensor:
    """(k) the share of each direction that is replaced; `edge`: what noise reaches."""
    t = (S.double().square() - edge**2).clamp_min(0)
    if math.isinf(strength):
        return (t > 0).double()
    whole = t.max() + strength * t if t.numel() else t
    return strength * t / torch.where(whole > 0, whole, 1.0)


def _projector(B: Tensor) -> Tensor:
    """(d_out, d_out) onto the columns of B, whatever their sizes."""
    B = B.double()
    norms = B.norm(dim=0)
    X, s, _ = torch.linalg.svd(B[:, norms > 0] / norms[norms > 0], full_matrices=False)
    X = X[:, s > 1e-12 * s.max()]
    return X @ X.mT


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
