"""The method in factor form, in plain PyTorch: `project`, `solve`, `recompose`.

This file defines correctness: the CPU path runs it, the Triton kernels are compared with it, and the
tests compare it with a dense float64 oracle. Nothing here ever forms a d_out x d_in matrix.

Symbols are those of docs/method.md. Every function takes any leading batch dimensions, so one call
serves one module or a stack of modules of one shape:

    B  (..., d_out, r)    A  (..., r, d_in)     the LoRA factors, dW = s B A
    U  (..., d_out, k)    V  (..., d_in, k)     the safety-aligned subspace, orthonormal columns
    P  (..., k, r)        Q  (..., r, k)        P = U^T B,  Q = A V
    G_B, G_A  (..., r, r)                       Gram matrices B^T B and A A^T
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from csulora.settings import Correction

# The alternating fit of `same` stops when a step lowers the squared error by less than this share.
ALS_STALL = 1e-4
ALS_MAX_STEPS = 50
# Eigenvalues of a system of the alternating fit below this share of the largest count as zero.
SINGULAR = 1e-11


class Projection(NamedTuple):
    """What one pass over the factors yields: everything `solve` needs to know about them."""

    P: Tensor  # (..., k, r)
    Q: Tensor  # (..., r, k)
    G_B: Tensor  # (..., r, r)
    G_A: Tensor  # (..., r, r)

    def at(self, index: int) -> Projection:
        """That of one module of a stack."""
        return Projection(*(X[index] for X in self))


class Cores(NamedTuple):
    """The r x r matrices of the result, and the energies they imply.

    The corrected update is s B' A' with

        exact (rank 2r):  B' = [B_in, B_out]               A' = Y_in A_in + Y_out A_out
        same (rank r):    B' = B_in X_in + B_out X_out     A' = Y_in A_in + Y_out A_out

    so X_in and X_out are None for `exact`. Energies are in units of ||BA||_F^2 (s^2 left out); blocks
    are in the order aligned, partial_left, partial_right, off, relative to the energy before.
    """

    X_in: Tensor | None  # (..., r, r)
    X_out: Tensor | None  # (..., r, r)
    Y_in: Tensor  # (..., r', r), r' = 2r for exact and r for same
    Y_out: Tensor  # (..., r', r)
    energy: Tensor  # (...)      ||BA||_F^2
    before: Tensor  # (..., 4)   relative energy of each block of BA
    after: Tensor  # (..., 4)   the same of B'A', relative to the energy of BA
    relative_change: Tensor  # (...)      ||B'A' - BA||_F / ||BA||_F
    rank_error: Tensor  # (...)      ||B'A' - exact||_F / ||exact||_F, 0 for exact

    def at(self, index: int) -> Cores:
        """Those of one module of a stack."""
        X_in = None if self.X_in is None else self.X_in[index]
        X_out = None if self.X_out is None else self.X_out[index]
        return Cores(X_in, X_out, *(X[index] for X in self[2:]))


def project(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Projection:
    """Coordinates of the factors in the subspace, and their Gram matrices.

    Args: B (..., d_out, r), A (..., r, d_in) in float32 or float64; U (..., d_out, k),
    V (..., d_in, k) in the same dtype, columns orthonormal to that precision.
    """
    return Projection(P=U.mT @ B, Q=A @ V, G_B=B.mT @ B, G_A=A @ A.mT)


def solve(projection: Projection, correction: Correction) -> Cores:
    """Closed-form penalized minimum change: the cores of the corrected update and its energies.

    Runs in float64 whatever the dtype of the projection: the systems are r x r, and lambda times a
    float32 rounding error would not reach the promised accuracy. Returned tensors are float64.
    """
    G_in, G_out = _split_grams(projection)
    energies = torch.stack(
        [
            _dot(G_in.B, G_in.A),
            _dot(G_in.B, G_out.A),
            _dot(G_out.B, G_in.A),
            _dot(G_out.B, G_out.A),
        ],
        dim=-1,
    )
    energy = energies.sum(-1)
    # A zero update has no relative energies; any core maps it to zero, so keep the identity.
    inverse_energy = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    before = energies * inverse_energy[..., None]
    K = _block_cores(G_in, G_out, before, inverse_energy, correction)
    if correction.rank == "exact":
        X_in, X_out = None, None
        Y_in, Y_out = torch.cat([K.ff, K.of], dim=-2), torch.cat([K.fo, K.oo], dim=-2)
        result = K
    else:
        X_in, X_out, Y_in, Y_out = _fit_same_rank(G_in, G_out, K, correction)
        result = _Blocks(X_in @ Y_in, X_in @ Y_out, X_out @ Y_in, X_out @ Y_out)
    after = _block_energies(G_in, G_out, result) * inverse_energy[..., None]
    eye = torch.eye(K.ff.shape[-1], dtype=K.ff.dtype, device=K.ff.device)
    change = _block_energies(G_in, G_out, _Blocks(*(X - eye for X in result))).sum(-1)
    misfit = _block_energies(G_in, G_out, _Blocks(*(X - Y for X, Y in zip(result, K, strict=True))))
    exact = _block_energies(G_in, G_out, K).sum(-1)
    return Cores(
        X_in,
        X_out,
        Y_in,
        Y_out,
        energy,
        before,
        after,
        relative_change=(change * inverse_energy).sqrt(),
        rank_error=torch.where(exact > 0, misfit.sum(-1) / exact, torch.zeros_like(exact)).sqrt(),
    )


def recompose(
    B: Tensor, A: Tensor, U: Tensor, V: Tensor, projection: Projection, cores: Cores
) -> tuple[Tensor, Tensor]:
    """The corrected factors B' (..., d_out, r') and A' (..., r', d_in), r' = 2r (exact) or r (same).

    Computes in the dtype of U; B and A may be of a lower precision.
    """
    r = A.shape[-2]
    dtype = U.dtype
    # A' = Y_in A_in + Y_out (A - A_in) as one product, with A_in = Q V^T and A stacked by rows.
    rows = A.new_empty((*A.shape[:-2], 2 * r, A.shape[-1]), dtype=dtype)
    torch.matmul(projection.Q.to(dtype), V.mT, out=rows[..., :r, :])
    rows[..., r:, :] = A
    A_new = torch.cat([cores.Y_in - cores.Y_out, cores.Y_out], dim=-1).to(dtype) @ rows
    if cores.X_in is None or cores.X_out is None:
        B_new = B.new_empty((*B.shape[:-1], 2 * r), dtype=dtype)
        B_in = torch.matmul(U, projection.P.to(dtype), out=B_new[..., :r])
        torch.sub(B, B_in, out=B_new[..., r:])
        return B_new, A_new
    inner = (projection.P.double() @ (cores.X_in - cores.X_out)).to(dtype)
    return U @ inner + B.to(dtype) @ cores.X_out.to(dtype), A_new


class _Side(NamedTuple):
    """Gram matrices of one part (inside or outside the subspace) of both factors, (..., r, r)."""

    B: Tensor
    A: Tensor


class _Blocks(NamedTuple):
    """One r x r core for each of the four blocks; the first letter is the left (B) side."""

    ff: Tensor
    fo: Tensor
    of: Tensor
    oo: Tensor


def _split_grams(projection: Projection) -> tuple[_Side, _Side]:
    P, Q, G_B, G_A = (X.double() for X in projection)
    G_in = _Side(P.mT @ P, Q @ Q.mT)
    return G_in, _Side(_positive(G_B - G_in.B), _positive(G_A - G_in.A))


def _positive(G: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix, so that rounding in G - G_in can never flip a sign.

    A factor that lies inside the subspace leaves a difference of pure rounding error; a negative
    eigenvalue times a large lambda would make I + lambda/E X Y singular.
    """
    G = (G + G.mT) / 2
    _, failed = torch.linalg.cholesky_ex(G)
    indefinite = failed != 0
    if bool(indefinite.any()):
        values, vectors = torch.linalg.eigh(G[indefinite])
        G = G.clone()
        G[indefinite] = (vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT
    return G


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))


def _block_energies(G_in: _Side, G_out: _Side, K: _Blocks) -> Tensor:
    """||B_p K A_q||_F^2 = <G_Bp K, K G_Aq> of the four blocks, (..., 4)."""
    sides = ((G_in, G_in), (G_in, G_out), (G_out, G_in), (G_out, G_out))
    values = [_dot(p.B @ X, X @ q.A) for X, (p, q) in zip(K, sides, strict=True)]
    # Rounding can leave a tiny negative number where a block is empty.
    return torch.stack(values, dim=-1).clamp_min(0)


def _block_cores(
    G_in: _Side, G_out: _Side, before: Tensor, inverse_energy: Tensor, correction: Correction
) -> _Blocks:
    strengths = correction.strengths
    if correction.granularity == "component":
        eye = torch.eye(G_in.B.shape[-1], dtype=G_in.B.dtype, device=G_in.B.device)
        cores = [
            eye * _shrink(strength, before[..., block])[..., None, None]
            for block, strength in enumerate(strengths)
        ]
        return _Blocks(*cores)
    sides = ((G_in, G_in), (G_in, G_out), (G_out, G_in), (G_out, G_out))
    return _Blocks(
        *(
            _direction_core(strength, q.A @ p.B, inverse_energy)
            for strength, (p, q) in zip(strengths, sides, strict=True)
        )
    )


def _shrink(strength: float, relative_energy: Tensor) -> Tensor:
    """1 / (1 + lambda e), with the limit 0 at lambda = infinity (also for an empty block)."""
    if math.isinf(strength):
        return torch.zeros_like(relative_energy)
    return 1 / (1 + strength * relative_energy)


def _direction_core(strength: float, G_AG_B: Tensor, inverse_energy: Tensor) -> Tensor:
    """K = (I + lambda/E G_A G_B)^-1, (..., r, r)."""
    eye = torch.eye(G_AG_B.shape[-1], dtype=G_AG_B.dtype, device=G_AG_B.device)
    if strength == 0:
        return eye.expand(G_AG_B.shape)
    if math.isinf(strength):
        return torch.zeros_like(G_AG_B)
    system = eye + (strength * inverse_energy)[..., None, None] * G_AG_B
    return torch.linalg.solve(system, eye.expand(G_AG_B.shape))


def _fit_same_rank(
    G_in: _Side, G_out: _Side, K: _Blocks, correction: Correction
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X_in, X_out, Y_in, Y_out of the rank-r result: one block pinned, two cores fitted to the rest.

    The pinned block is the one to keep: aligned, unless the strengths say that it is the one to lose.
    """
    eye = torch.eye(K.ff.shape[-1], dtype=K.ff.dtype, device=K.ff.device).expand(K.ff.shape)
    if correction.lambda_aligned <= correction.lambda_off:
        K_A, K_B = _alternate(G_in, G_out, K)
        return K.ff, K_B, eye, K_A
    swapped = _Blocks(ff=K.oo, fo=K.of, of=K.fo, oo=K.ff)
    K_A, K_B = _alternate(G_out, G_in, swapped)
    return K_B, K.oo, K_A, eye


def _alternate(G_p: _Side, G_q: _Side, K: _Blocks) -> tuple[Tensor, Tensor]:
    """Alternating least squares for K_A, K_B in B' = B_p C + B_q K_B, A' = A_p + K_A A_q.

    K holds the target with p as its first side: C = K.ff is met exactly whatever K_A and K_B are.
    """
    C, K_pq, K_qp, K_qq = K
    # Never worse than a start at K_pq, which is stuck at zero where a partial block is removed whole.
    K_A = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand(C.shape)
    K_B = K_qp
    CtG = C.mT @ G_p.B
    previous = torch.full(C.shape[:-2], math.inf, dtype=C.dtype, device=C.device)
    active = torch.ones_like(previous, dtype=torch.bool)
    for _ in range(ALS_MAX_STEPS):
        right = G_p.A + K_A @ G_q.A @ K_A.mT
        new_B = _solve_right(right, K_qp @ G_p.A + K_qq @ G_q.A @ K_A.mT)
        left = CtG @ C + new_B.mT @ G_q.B @ new_B
        new_A = _solve_left(left, CtG @ K_pq + new_B.mT @ G_q.B @ K_qq)
        # A module that has stalled stands still, so its result does not depend on the rest of the stack.
        K_A = torch.where(active[..., None, None], new_A, K_A)
        K_B = torch.where(active[..., None, None], new_B, K_B)
        misfit = _Blocks(C - C, C @ K_A - K_pq, K_B - K_qp, K_B @ K_A - K_qq)
        error = _block_energies(G_p, G_q, misfit).sum(-1)
        active = active & (previous - error > ALS_STALL * error)
        if not bool(active.any()):
            break
        previous = error
    return K_A, K_B


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
