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

# The order of the blocks, and the side (0 inside, 1 outside) of B and of A that each pairs.
FF, FO, OF, OO = range(4)
LEFT, RIGHT = [0, 0, 1, 1], [0, 1, 0, 1]
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

    def unbind(self) -> list[Projection]:
        """Those of the single modules of a stack."""
        return [Projection(*parts) for parts in zip(*(X.unbind() for X in self), strict=True)]


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

    def unbind(self) -> list[Cores]:
        """Those of the single modules of a stack."""
        n = self.energy.shape[0]
        pinned = [[None] * n if X is None else X.unbind() for X in self[:2]]
        parts = (X.unbind() for X in self[2:])
        return [Cores(*row) for row in zip(*pinned, *parts, strict=True)]


def project(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Projection:
    """Coordinates of the factors in the subspace, and their Gram matrices.

    Args: B (..., d_out, r), A (..., r, d_in) in float32 or float64; U (..., d_out, k),
    V (..., d_in, k) in the same dtype, columns orthonormal to that precision.
    """
    # P^T = B^T U, the same shape of product as Q: a sixth faster than U^T B.
    return Projection(P=(B.mT @ U).mT, Q=A @ V, G_B=B.mT @ B, G_A=A @ A.mT)


def solve(projection: Projection, correction: Correction) -> Cores:
    """Closed-form penalized minimum change: the cores of the corrected update and its energies.

    Runs in float64 whatever the dtype of the projection: the systems are r x r, and lambda times a
    float32 rounding error would not reach the promised accuracy. Returned tensors are float64.
    """
    G_B, G_A = _split_grams(projection)
    blocks = _Sides(G_B[LEFT], G_A[RIGHT])
    energies = _dot(blocks.B, blocks.A)
    energy = energies.sum(0)
    # A zero update has no relative energies; any core maps it to zero, so keep the identity.
    inverse_energy = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    before = energies * inverse_energy
    K = _block_cores(blocks, before, inverse_energy, correction)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    if correction.rank == "exact":
        X_in, X_out, result = None, None, K
        Y_in, Y_out = torch.cat([K[FF], K[OF]], dim=-2), torch.cat([K[FO], K[OO]], dim=-2)
        rank_error = torch.zeros_like(energy)
    else:
        X_in, X_out, Y_in, Y_out = _fit_same_rank(G_B, G_A, K, correction)
        result = torch.stack([X_in @ Y_in, X_in @ Y_out, X_out @ Y_in, X_out @ Y_out])
        misfit = _energies_of(blocks, result - K).sum(0)
        exact = _energies_of(blocks, K).sum(0)
        rank_error = torch.where(exact > 0, misfit / exact, torch.zeros_like(exact)).sqrt()
    after = _energies_of(blocks, result) * inverse_energy
    change = _energies_of(blocks, result - eye).sum(0) * inverse_energy
    return Cores(
        X_in,
        X_out,
        Y_in,
        Y_out,
        energy,
        before.movedim(0, -1),
        after.movedim(0, -1),
        relative_change=change.sqrt(),
        rank_error=rank_error,
    )


def recompose(
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    projection: Projection,
    cores: Cores,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The corrected factors B' (..., d_out, r') and A' (..., r', d_in), r' = 2r (exact) or r (same).

    Computes in the dtype of U; B and A may be of a lower precision. `out` is memory in the dtype of U
    for both results.
    """
    dtype, r_new = U.dtype, cores.Y_in.shape[-2]
    if out is None:
        out = (
            B.new_empty((*B.shape[:-1], r_new), dtype=dtype),
            A.new_empty((*A.shape[:-2], r_new, A.shape[-1]), dtype=dtype),
        )
    P, Q = projection.P, projection.Q
    X_in, X_out = cores.X_in, cores.X_out
    Y_in: Tensor | None = cores.Y_in.mT
    Y_out: Tensor | None = cores.Y_out.mT
    if X_in is None and B.shape[-2] < A.shape[-1]:
        # The same blocks from the other side: the product with the cores costs less on the shorter one.
        (K_ff, K_of), (K_fo, K_oo) = (Y.chunk(2, dim=-2) for Y in (cores.Y_in, cores.Y_out))
        X_in, X_out = torch.cat([K_ff, K_fo], dim=-1), torch.cat([K_of, K_oo], dim=-1)
        Y_in = Y_out = None
    _compose(U, P, B.to(dtype), X_in, X_out, out=out[0])
    _compose(V, Q.mT, A.to(dtype).mT, Y_in, Y_out, out=out[1].mT)
    return out


def _compose(
    W: Tensor, C: Tensor, X: Tensor, M_in: Tensor | None, M_out: Tensor | None, out: Tensor
) -> None:
    """One side: out = X_in M_in + X_out M_out (d, r') with X_in = W C and X_out = X - X_in, X (d, r).

    Without M the two parts stand side by side, r' = 2r. For the A side everything is transposed.
    """
    r = X.shape[-1]
    C = C.to(W.dtype)
    if M_in is None or M_out is None:
        X_in = torch.matmul(W, C, out=out[..., :r])
        torch.sub(X, X_in, out=out[..., r:])
    elif out.shape[-1] == r:
        torch.matmul(W, (C.double() @ (M_in - M_out)).to(W.dtype), out=out)
        out += X @ M_out.to(W.dtype)
    else:
        both = torch.empty_like(out)
        torch.matmul(W, C, out=both[..., :r])
        both[..., r:] = X
        torch.matmul(both, torch.cat([M_in - M_out, M_out], dim=-2).to(W.dtype), out=out)


class _Sides(NamedTuple):
    """Gram matrices of both factors, stacked: (2, ..., r, r) inside and outside the subspace, or
    (4, ..., r, r) as the blocks pair them."""

    B: Tensor
    A: Tensor


def _split_grams(projection: Projection) -> _Sides:
    """Gram matrices inside and outside the subspace, (2, ..., r, r) of each factor."""
    P, Q, G_B, G_A = (X.double() for X in projection)
    inside = torch.stack([P.mT @ P, Q @ Q.mT])
    outside = _positive(torch.stack([G_B, G_A]) - inside)
    return _Sides(*torch.stack([inside, outside], dim=1))


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
        G[indefinite] = (vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT
    return G


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))


def _energies_of(blocks: _Sides, K: Tensor) -> Tensor:
    """||B_p K A_q||_F^2 = <G_Bp K, K G_Aq> of the four blocks, (4, ...), for cores K (4, ..., r, r)."""
    # Rounding can leave a tiny negative number where a block is empty.
    return _dot(blocks.B @ K, K @ blocks.A).clamp_min(0)


def _block_cores(
    blocks: _Sides, before: Tensor, inverse_energy: Tensor, correction: Correction
) -> Tensor:
    """K of the four blocks, (4, ..., r, r)."""
    eye = torch.eye(blocks.B.shape[-1], dtype=blocks.B.dtype, device=blocks.B.device)
    # An infinite strength is its limit, K = 0, also for an empty block.
    finite = [0.0 if math.isinf(x) else x for x in correction.strengths]
    strengths = before.new_tensor(finite).reshape(-1, *[1] * inverse_energy.dim())
    if correction.granularity == "component":
        K = eye * (1 / (1 + strengths * before))[..., None, None]
    else:
        scale = (strengths * inverse_energy)[..., None, None]
        K = torch.linalg.inv(eye + scale * (blocks.A @ blocks.B))
    for block, strength in enumerate(correction.strengths):
        if math.isinf(strength):
            K[block] = 0
    return K


def _fit_same_rank(
    G_B: Tensor, G_A: Tensor, K: Tensor, correction: Correction
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X_in, X_out, Y_in, Y_out of the rank-r result: one block pinned, two cores fitted to the rest.

    The pinned block is the one to keep: aligned, unless the strengths say that it is the one to lose.
    """
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand(K.shape[1:])
    if correction.lambda_aligned <= correction.lambda_off:
        K_A, K_B = _alternate(G_B, G_A, K)
        return K[FF], K_B, eye, K_A
    K_A, K_B = _alternate(G_B.flip(0), G_A.flip(0), K.flip(0))
    return K_B, K[OO], K_A, eye


def _alternate(G_B: Tensor, G_A: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating least squares for K_A, K_B in B' = B_p C + B_q K_B, A' = A_p + K_A A_q.

    Grams (2, ..., r, r) and the target K (4, ..., r, r) have the pinned side p first: C = K[0] is met
    exactly whatever K_A and K_B are.
    """
    shape = K.shape[1:]
    fit = _Fit.of(*(X.reshape(X.shape[0], -1, *shape[-2:]) for X in (G_B, G_A, K)))
    # A start at K_A = K_pq is never better, and stuck at zero where a partial block is removed whole.
    K_A = torch.eye(shape[-1], dtype=K.dtype, device=K.device).repeat(fit.C.shape[0], 1, 1)
    K_B = torch.zeros_like(K_A)
    previous = K.new_full(K_A.shape[:1], math.inf)
    # A module that has stalled drops out, so its result does not depend on the rest of the stack.
    active = torch.arange(K_A.shape[0], device=K.device)
    for _ in range(ALS_MAX_STEPS):
        K_A[active], K_B[active], error = fit.step(K_A[active])
        going = previous - error > ALS_STALL * error
        if not bool(going.all()):
            active, fit, error = active[going], fit.at(going), error[going]
        if not active.numel():
            break
        previous = error
    return K_A.reshape(shape), K_B.reshape(shape)


class _Fit(NamedTuple):
    """What a step of the alternating fit needs that does not change, (n, r, r) each; C G_Bp C etc. as
    in section "Rank of the result" of docs/method.md."""

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
            _dot(KGK, G_A[1]),
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
        error = _dot(self.G_Bq @ D, D @ self.G_Ap) + self.constant - _dot(rhs @ self.G_Aq, K_A)
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
