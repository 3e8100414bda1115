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

from csulora.method.rank_fit import alternate, dot
from csulora_kernels.settings import REMOVES, UNPINNED

if TYPE_CHECKING:
    from csulora.settings import Correction

# The order of the blocks, and the side (0 inside, 1 outside) of B and of A that each pairs.
FF, FO, OF, OO = range(4)
LEFT, RIGHT = [0, 0, 1, 1], [0, 1, 0, 1]


class Projection(NamedTuple):
    """What one pass over the factors yields: everything `solve` needs to know about them."""

    P: Tensor  # (..., k, r)
    Q: Tensor  # (..., r, k)
    G_B: Tensor  # (..., r, r)
    G_A: Tensor  # (..., r, r)

    def unbind(self) -> list[Projection]:
        """Those of the single modules of a stack."""
        return [Projection(*parts) for parts in zip(*(X.unbind() for X in self), strict=True)]

    def of(self, rows: slice | list[int]) -> Projection:
        """Those of some modules of a stack."""
        return Projection(*(X[rows] for X in self))


class Cores(NamedTuple):
    """The r x r matrices of the result. The corrected update is s B' A' with

        exact (rank 2r):  B' = [B_in, B_out]               A' = Y_in A_in + Y_out A_out
        same (rank r):    B' = B_in X_in + B_out X_out     A' = Y_in A_in + Y_out A_out

    so X_in and X_out are None for `exact`.
    """

    X_in: Tensor | None  # (..., r, r)
    X_out: Tensor | None  # (..., r, r)
    Y_in: Tensor  # (..., r', r), r' = 2r for exact and r for same
    Y_out: Tensor  # (..., r', r)

    def unbind(self) -> list[Cores]:
        """Those of the single modules of a stack."""
        n = self.Y_in.shape[0]
        parts = ([None] * n if X is None else X.unbind() for X in self)
        return [Cores(*row) for row in zip(*parts, strict=True)]

    def of(self, rows: slice) -> Cores:
        """Those of some modules of a stack."""
        X_in, X_out, Y_in, Y_out = self
        if X_in is None or X_out is None:
            return Cores(None, None, Y_in[rows], Y_out[rows])
        return Cores(X_in[rows], X_out[rows], Y_in[rows], Y_out[rows])


class Figures(NamedTuple):
    """The energies that cores imply, in units of ||BA||_F^2 (s^2 left out).

    Blocks are in the order aligned, partial_left, partial_right, off, relative to the energy before.
    """

    energy: Tensor  # (...)      ||BA||_F^2
    before: Tensor  # (..., 4)   relative energy of each block of BA
    after: Tensor  # (..., 4)   the same of B'A', relative to the energy of BA
    # (...)      ||B'A' - BA||_F / ||BA||_F; NaN where rounding made a system singular
    relative_change: Tensor
    rank_error: Tensor  # (...)      ||B'A' - exact||_F / ||exact||_F, 0 for exact


class Grams(NamedTuple):
    """Gram matrices of both factors, split at the subspace: (2, ..., r, r), inside and outside."""

    B: Tensor
    A: Tensor


def project(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Projection:
    """Coordinates of the factors in the subspace, and their Gram matrices.

    Args: B (..., d_out, r), A (..., r, d_in) in float32 or float64; U (..., d_out, k),
    V (..., d_in, k) in the same dtype, columns orthonormal to that precision.
    """
    # P^T = B^T U, the same shape of product as Q: a sixth faster than U^T B.
    return Projection(P=(B.mT @ U).mT, Q=A @ V, G_B=B.mT @ B, G_A=A @ A.mT)


def solve(projection: Projection, correction: Correction) -> tuple[Cores, Figures]:
    """Closed-form penalized minimum change: the cores of the corrected update and its energies.

    Runs in float64 whatever the dtype of the projection: the systems are r x r, and lambda times a
    float32 rounding error would not reach the promised accuracy. Returned tensors are float64.
    """
    grams, t = split_grams(projection)
    cores, figures = solve_grams(grams, correction)
    return ungauged(cores, t), figures


def split_grams(projection: Projection) -> tuple[Grams, Tensor]:
    """Gram matrices in float64, of the factors in an even gauge; and the gauge t, (..., r)."""
    P, Q, G_B, G_A = (X.double() for X in projection)
    t = even_gauge(G_B.diagonal(dim1=-2, dim2=-1), G_A.diagonal(dim1=-2, dim2=-1))
    columns, rows = t[..., None, :], t[..., None]
    P, Q = P * columns, Q / rows
    inside = torch.stack([P.mT @ P, Q @ Q.mT])
    total = torch.stack([G_B * rows * columns, G_A / rows / columns])
    return Grams(*torch.stack([inside, _positive(total - inside)], dim=1)), t


def ungauged(cores: Cores, t: Tensor) -> Cores:
    """Cores for the factors themselves: B K A = (B T) (T^-1 K T) (T^-1 A)."""
    columns, rows = t[..., None, :], t[..., None]
    X_in, X_out, Y_in, Y_out = cores
    Y_in, Y_out = Y_in / columns, Y_out / columns
    if X_in is None or X_out is None:
        both = torch.cat([rows, rows], dim=-2)
        return Cores(None, None, both * Y_in, both * Y_out)
    return Cores(rows * X_in, rows * X_out, Y_in, Y_out)


def even_gauge(left: Tensor, right: Tensor) -> Tensor:
    """Powers of two t for which the columns of B and the rows of A of (B t) (t^-1 A) are about even.

    Args: their squared norms, (..., r) each. The update is the same, exactly, but in this gauge the
    rounding errors of a column are small beside that column's part of the update.
    """
    usable = (left > 0) & (right > 0)
    ratio = torch.where(usable, right, 1.0) / torch.where(usable, left, 1.0)
    return torch.exp2((0.25 * ratio.log2()).round())


def solve_grams(grams: Grams, correction: Correction) -> tuple[Cores, Figures]:
    """`solve` from float64 Gram matrices."""
    blocks = Grams(grams.B[LEFT], grams.A[RIGHT])
    energies = dot(blocks.B, blocks.A)
    energy = energies.sum(0)
    # A zero update has no relative energies; any core maps it to zero, so keep the identity.
    inverse_energy = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    before = energies * inverse_energy
    K, unsolved = _block_cores(blocks, before, inverse_energy, correction)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    if correction.form == "exact":
        result = K
        cores = Cores(
            None, None, torch.cat([K[FF], K[OF]], dim=-2), torch.cat([K[FO], K[OO]], dim=-2)
        )
        rank_error = torch.zeros_like(energy)
    else:
        wanted = _energies_of(blocks, K)
        if min(correction.lambda_aligned, correction.lambda_off) >= UNPINNED:
            X_in, X_out, Y_in, Y_out = _largest_block(wanted, K)
        else:
            X_in, X_out, Y_in, Y_out = _fit_same_rank(grams, K, correction)
        result = torch.stack([X_in @ Y_in, X_in @ Y_out, X_out @ Y_in, X_out @ Y_out])
        cores = Cores(X_in, X_out, Y_in, Y_out)
        misfit = _energies_of(blocks, result - K).sum(0)
        exact = wanted.sum(0)
        rank_error = torch.where(exact > 0, misfit / exact, torch.zeros_like(exact)).sqrt()
    after = _energies_of(blocks, result) * inverse_energy
    change = _energies_of(blocks, result - eye).sum(0) * inverse_energy
    change = torch.where(unsolved, math.nan, change)
    figures = Figures(
        energy, before.movedim(0, -1), after.movedim(0, -1), change.sqrt(), rank_error
    )
    return cores, figures


def wide_side(B: Tensor, A: Tensor) -> int:
    """0 if B (..., d_out, r) is the wide (longer) factor or both are as long, 1 if A (..., r, d_in) is.

    `exact` leaves that side in its parts: the product with the cores costs less on the other one.
    """
    return int(B.shape[-2] < A.shape[-1])


def recompose(
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    projection: Projection,
    cores: Cores,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    split: bool = False,
) -> tuple[Tensor, Tensor]:
    """The corrected factors B' (..., d_out, r') and A' (..., r', d_in), r' = 2r (exact) or r (same).

    Computes in the dtype of U; B and A may be of a lower precision. `out` is memory in the dtype of U
    for both results; split: `split_wide` has written one of them there already.
    """
    X_in, X_out, Y_in, Y_out = cores
    if out is None:
        r_new = Y_in.shape[-2]
        out = (
            B.new_empty((*B.shape[:-1], r_new), dtype=U.dtype),
            A.new_empty((*A.shape[:-2], r_new, A.shape[-1]), dtype=U.dtype),
        )
    left = None if X_in is None or X_out is None else (X_in, X_out)
    right: tuple[Tensor, Tensor] | None = (Y_in.mT, Y_out.mT)
    if left is None:
        wide = wide_side(B, A)
        if not split:
            split_wide(B, A, U, V, projection, out[wide])
        if wide == 1:
            # The same blocks from the other side.
            (K_ff, K_of), (K_fo, K_oo) = (Y.chunk(2, dim=-2) for Y in (Y_in, Y_out))
            left = torch.cat([K_ff, K_fo], dim=-1), torch.cat([K_of, K_oo], dim=-1)
            right = None
    if left is not None:
        _mix(U, projection.P, B.to(U.dtype), *left, out=out[0])
    if right is not None:
        _mix(V, projection.Q.mT, A.to(V.dtype).mT, *right, out=out[1].mT)
    return out


def split_wide(
    B: Tensor, A: Tensor, U: Tensor, V: Tensor, projection: Projection, out: Tensor
) -> None:
    """The wide factor's side of `exact`, which needs no cores: its parts inside and outside.

    out: [B_in, B_out] (..., d_out, 2r), or [A_in ; A_out] (..., 2r, d_in), in the dtype of U.
    """
    if wide_side(B, A) == 0:
        _split(U, projection.P, B.to(U.dtype), out)
    else:
        _split(V, projection.Q.mT, A.to(V.dtype).mT, out.mT)


def _split(W: Tensor, C: Tensor, X: Tensor, out: Tensor) -> None:
    """out = [W C, X - W C] (d, 2r), the parts of X (d, r). For the A side everything is transposed."""
    r = X.shape[-1]
    X_in = torch.matmul(W, C.to(W.dtype), out=out[..., :r])
    torch.sub(X, X_in, out=out[..., r:])


def _mix(W: Tensor, C: Tensor, X: Tensor, M_in: Tensor, M_out: Tensor, out: Tensor) -> None:
    """out = X_in M_in + X_out M_out (d, r') with X_in = W C and X_out = X - X_in, X (d, r).

    For the A side everything is transposed.
    """
    r = X.shape[-1]
    C = C.to(W.dtype)
    if out.shape[-1] == r:
        torch.matmul(W, (C.double() @ (M_in - M_out)).to(W.dtype), out=out)
        out += X @ M_out.to(W.dtype)
    else:
        both = torch.empty_like(out)
        torch.matmul(W, C, out=both[..., :r])
        both[..., r:] = X
        torch.matmul(both, torch.cat([M_in - M_out, M_out], dim=-2).to(W.dtype), out=out)


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


def _energies_of(blocks: Grams, K: Tensor) -> Tensor:
    """||B_p K A_q||_F^2 = <G_Bp K, K G_Aq> of the four blocks, (4, ...), for cores K (4, ..., r, r).

    blocks: the Gram matrices as the blocks pair them, (4, ..., r, r).
    """
    # Rounding can leave a tiny negative number where a block is empty.
    return dot(blocks.B @ K, K @ blocks.A).clamp_min(0)


def _block_cores(
    blocks: Grams, before: Tensor, inverse_energy: Tensor, correction: Correction
) -> tuple[Tensor, Tensor]:
    """K of the four blocks, (4, ..., r, r), and where a system for one could not be solved, (...).

    That can be where float32 Gram matrices hold little of an update whose columns cancel.
    """
    eye = torch.eye(blocks.B.shape[-1], dtype=blocks.B.dtype, device=blocks.B.device)
    removed = [strength >= REMOVES for strength in correction.strengths]  # whole, below
    bounded = [0.0 if r else s for r, s in zip(removed, correction.strengths, strict=True)]
    strengths = before.new_tensor(bounded).reshape(-1, *[1] * inverse_energy.dim())
    unsolved = torch.zeros_like(inverse_energy, dtype=torch.bool)
    if correction.granularity == "component":
        K = eye * (1 / (1 + strengths * before))[..., None, None]
    elif correction.granularity == "direction":
        scale = (strengths * inverse_energy)[..., None, None]
        K, failed = torch.linalg.inv_ex(eye + scale * (blocks.A @ blocks.B))
        unsolved = (failed != 0).any(0)
        K = torch.where((failed != 0)[..., None, None], torch.zeros_like(K), K)
    else:
        raise NotImplementedError(correction.granularity)
    K[removed] = 0  # the limit, also for an empty block
    return K, unsolved


def _fit_same_rank(
    grams: Grams, K: Tensor, correction: Correction
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X_in, X_out, Y_in, Y_out of the rank-r result: one block pinned, two cores fitted to the rest.

    The pinned block is the one to keep: aligned, unless the strengths say that it is the one to lose.
    """
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand(K.shape[1:])
    if correction.lambda_aligned <= correction.lambda_off:
        K_A, K_B = alternate(grams.B, grams.A, K)
        return K[FF], K_B, eye, K_A
    K_A, K_B = alternate(grams.B.flip(0), grams.A.flip(0), K.flip(0))
    return K_B, K[OO], K_A, eye


def _largest_block(energies: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X_in, X_out, Y_in, Y_out where strengths leave next to nothing in both blocks that could be pinned.

    Of the four blocks that of most energy stays as it is: it has rank r by itself.

    energies: of the blocks as attenuated, (4, ...).
    """
    nothing = torch.zeros_like(K[FF])
    eye = nothing + torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    largest = energies.argmax(0)[..., None, None]
    core = torch.where(largest % 2 == 0, K[0::2], K[1::2])  # as if from both sides of B
    X_in, X_out = (torch.where(largest // 2 == side, core[side], nothing) for side in range(2))
    Y_in, Y_out = (torch.where(largest % 2 == side, eye, nothing) for side in range(2))
    return X_in, X_out, Y_in, Y_out
