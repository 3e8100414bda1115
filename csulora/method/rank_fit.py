"""The rank-r form: alternating least squares for the two cores that the pinned block leaves free."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The fit stops when a step lowers the squared error by less than this share. A step starts beyond the
# last one: docs/method.md says what 16 of these are worth.
ALS_STALL = 1e-4
ALS_MAX_STEPS = 16
# Eigenvalues of one of its systems below this share of the largest count as zero.
SINGULAR = 1e-11


def alternate(G_B: Tensor, G_A: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating least squares for K_A, K_B in B' = B_p C + B_q K_B, A' = A_p + K_A A_q.

    Grams (2, ..., r, r) and the target K (4, ..., r, r) have the pinned side p first: C = K[0] is met
    exactly whatever K_A and K_B are.
    """
    shape = K.shape[1:]
    fit = _Fit.of(*(X.reshape(X.shape[0], -1, *shape[-2:]) for X in (G_B, G_A, K)))
    # A start at K_A = K_pq is never better, and stuck at zero where a partial block is removed whole.
    K_A = torch.eye(shape[-1], dtype=K.dtype, device=K.device).repeat(fit.C.shape[0], 1, 1)
    _use_spare(K_A, fit.G_Ap + fit.G_Aq)
    K_B = torch.zeros_like(K_A)
    start = K_A.clone()
    previous = K.new_full(K_A.shape[:1], math.inf)
    falls = torch.zeros_like(previous)  # steps in sequence that lowered the error
    # A module that has stalled drops out, so its result does not depend on the rest of the stack.
    active = torch.arange(K_A.shape[0], device=K.device)
    for _ in range(ALS_MAX_STEPS):
        found, K_B[active], error = fit.step(start)
        rises = error > previous
        falls = torch.where(rises, 0.0, falls + 1)
        beyond = ((falls - 1) / (falls + 1)).clamp_min(0)[:, None, None]
        start, K_A[active] = found + beyond * (found - K_A[active]), found
        going = rises | (previous - error > ALS_STALL * error)
        previous = error
        if not bool(going.all()):
            active, fit, start = active[going], fit.at(going), start[going]
            previous, falls = previous[going], falls[going]
        if not active.numel():
            break
    return K_A.reshape(shape), K_B.reshape(shape)


def _use_spare(K_A: Tensor, G_A: Tensor) -> None:
    """Start rows of A' that are zero at the outer part of the first rows, in place.

    Zero is a stationary point, at which the rank that they leave is never used. Rows are zero where
    factors of lower rank have been balanced, by which the first ones are the largest.
    """
    used = G_A.diagonal(dim1=-2, dim2=-1) > 0
    for i in (~used.all(-1)).nonzero().flatten().tolist():
        spare, first = ((~used[i]).nonzero().flatten(), used[i].nonzero().flatten())
        n = min(len(spare), len(first))
        K_A[i, spare[:n], first[:n]] = 1


def dot(X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y> of matrices, (...)."""
    return (X * Y).sum((-2, -1))


class _Fit(NamedTuple):
    """What a step of the alternating fit needs that does not change, (n, r, r) each; C G_Bp C etc. as
    in section "Form of the result" of docs/method.md."""

    C: Tensor
    K_qp: Tensor
    K_qq: Tensor
    G_Bq: Tensor
    G_Ap: Tensor
    G_Aq: Tensor
    CGC: Tensor  # C^T G_Bp C
    CGK: Tensor  # C^T G_Bp K_pq
    KG: Tensor  # K_qp G_Ap
    constant: Tensor  # (n) squared norm of the blocks pq and qq

    @classmethod
    def of(cls, G_B: Tensor, G_A: Tensor, K: Tensor) -> _Fit:
        C, K_pq, K_qp, K_qq = K
        CG = C.mT @ G_B[0]
        KGK = K_pq.mT @ G_B[0] @ K_pq + K_qq.mT @ G_B[1] @ K_qq
        return cls(
            C,
            K_qp,
            K_qq,
            G_B[1],
            G_A[0],
            G_A[1],
            CG @ C,
            CG @ K_pq,
            K_qp @ G_A[0],
            dot(KGK, G_A[1]),
        )

    def at(self, which: Tensor) -> _Fit:
        return _Fit(*(X[which] for X in self))

    def step(self, K_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K_A and K_B after one step, and the squared error of the update that they give."""
        AG = K_A @ self.G_Aq
        K_B = _solve_right(self.G_Ap + AG @ K_A.mT, self.KG + self.K_qq @ AG.mT)
        BG = K_B.mT @ self.G_Bq
        rhs = self.CGK + BG @ self.K_qq
        K_A = _solve_left(self.CGC + BG @ K_B, rhs)
        # Of the block qp; and of pq and qq together, which at their minimum in K_A have lost <rhs, K_A>.
        D = K_B - self.K_qp
        error = dot(self.G_Bq @ D, D @ self.G_Ap) + self.constant - dot(rhs @ self.G_Aq, K_A)
        return K_A, K_B, error.clamp_min(0)


def _solve_left(M: Tensor, rhs: Tensor) -> Tensor:
    """X with M X = rhs for M symmetric positive semidefinite and rhs in its range, of least norm.

    A rank-deficient factor makes M singular. Whatever rounding puts into its null space the next step
    of the fit would divide by, so there the pseudo-inverse is taken, and nowhere else, for its price.
    """
    L, failed = torch.linalg.cholesky_ex(M)
    pivots = L.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    largest = M.diagonal(dim1=-2, dim2=-1).amax(-1)
    regular = (failed == 0) & (pivots > SINGULAR * largest)
    if bool(regular.all()):
        return torch.cholesky_solve(rhs, L)
    X = torch.cholesky_solve(
        rhs, torch.where(regular[..., None, None], L, torch.eye(M.shape[-1]).to(M))
    )
    singular = ~regular
    inverse = torch.linalg.pinv(M[singular], rtol=SINGULAR, hermitian=True)
    X[singular] = inverse @ rhs[singular]
    return X


def _solve_right(M: Tensor, rhs: Tensor) -> Tensor:
    return _solve_left(M, rhs.mT).mT
