"""The same stages in float64 throughout, for modules whose result float32 would spoil.

The fast path computes factors in float32 and Gram matrices outside the subspace as differences. That
loses digits where the result is small beside the update (strong attenuation of the aligned block, a
subspace of nearly every direction), where the factors of `same` are rank-deficient, or where squares
vanish in float32. `csulora.method.precision` tells which modules those are; they are few, and come
here.

The result is the same update in a balanced form: columns of B' and rows of A' orthogonal, with equal
norms, the form that loses least when it is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csulora.method.stages import Cores, Figures, Grams, even_gauge, solve_grams

if TYPE_CHECKING:
    from csulora.settings import Correction

# Singular values below this share of the largest are what float64 leaves of zero.
NOISE = 1e-12


class Parts(NamedTuple):
    """Both factors in float64, split at the subspace."""

    B_in: Tensor  # (d_out, r)
    B_out: Tensor  # (d_out, r)
    A_in: Tensor  # (r, d_in)
    A_out: Tensor  # (r, d_in)


def split(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Parts:
    """Parts of B (d_out, r) and A (r, d_in) of any type, in a gauge that evens out their columns."""
    B, A = B.double(), A.double()
    U, V = U.to(B), V.to(B)  # the factors may lie on another device
    t = even_gauge(B.square().sum(0), A.square().sum(1))
    B, A = B * t, A / t[:, None]
    B_in, A_in = U @ (U.mT @ B), (A @ V) @ V.mT
    return Parts(B_in, B - B_in, A_in, A - A_in)


def solve(parts: Parts, correction: Correction) -> tuple[Cores, Figures]:
    """The cores from Gram matrices of the parts themselves, which no difference has touched.

    For `same` those of `exact` where that result has no more than rank r: nothing has to be fitted.
    """
    B_in, B_out, A_in, A_out = parts
    grams = Grams(
        torch.stack([B_in.mT @ B_in, B_out.mT @ B_out]),
        torch.stack([A_in @ A_in.mT, A_out @ A_out.mT]),
    )
    if correction.form == "same":
        exact = solve_grams(grams, replace(correction, form="exact"))
        S = _triplets(*_factors(parts, exact[0]))[1]
        if bool((S[B_in.shape[1] :] <= NOISE * S[0]).all()):
            return exact
    return solve_grams(grams, correction)


def recompose(parts: Parts, cores: Cores, rank: int) -> tuple[Tensor, Tensor]:
    """B' (d_out, rank) and A' (rank, d_in) in float64: B' = X S^(1/2), A' = S^(1/2) Y^T, then zeros."""
    X, S, Yt = _triplets(*_factors(parts, cores))
    root = S[:rank].sqrt()
    B, A = X.new_zeros(X.shape[0], rank), X.new_zeros(rank, Yt.shape[1])
    torch.mul(X[:, :rank], root, out=B[:, : len(root)])
    torch.mul(Yt[:rank], root[:, None], out=A[: len(root)])
    return B, A


def _factors(parts: Parts, cores: Cores) -> tuple[Tensor, Tensor]:
    B_in, B_out, A_in, A_out = parts
    X_in, X_out, Y_in, Y_out = cores
    A = Y_in @ A_in + Y_out @ A_out
    if X_in is None or X_out is None:
        return torch.cat([B_in, B_out], dim=1), A
    return B_in @ X_in + B_out @ X_out, A


def _triplets(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets X, S, Y^T of the product B A."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    X, S, Yt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ X, S, Yt @ Q_A.mT
