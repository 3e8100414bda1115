"""What float32 does to a result: which modules it would spoil, told before anything is recomposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csulora.method import realign
from csulora.method.rank_fit import dot
from csulora.method.realign import Shift, Spectrum
from csulora.method.stages import (
    Cores,
    Figures,
    Grams,
    Projection,
    solve_grams,
    split_grams,
    ungauged,
)

if TYPE_CHECKING:
    from csulora.settings import Correction, Method, Realignment

# Amplifications up to which float32 arithmetic keeps to 1e-5 and a half type to 2 of its ulp.
COMPUTING_LIMIT = 4.0
STORING_LIMIT = 3.0
# Errors of cores, against those limits: Gram matrices are sums, whose roundoff averages out.
CORE_WEIGHT = 0.2
ROUNDOFF = 2.0**-24  # of float32
# Of a shift, whose estimate is closer: 1,800 random problems, the columns of B up to 1,000 times apart,
# had at most 3.3e-7 error per unit. Where a half type is written, the arithmetic may lose more.
SHIFT_LIMIT = 25.0
SHIFT_LIMIT_HALF = 2000.0
# Squares below this may be what is left of a sum that float32 cannot hold.
SMALLEST_SQUARE = 1e-30
# Of the energy of the single columns of B times rows of A: what float32 Gram matrices tell of less than
# this is rounding, and can be 0 or negative.
SMALLEST_ENERGY = 1e-5
# A factor is singular whose Gram matrix, columns scaled to norm 1, has an eigenvalue below this.
SMALLEST_CORRELATION = 1e-5


HALF = (torch.float16, torch.bfloat16)


class Limits(NamedTuple):
    """The amplification up to which a module may be computed in float32, and stored as it comes out."""

    computing: float
    storing: float


class Amplification(NamedTuple):
    """First-order relative error of the update B'A' per unit of roundoff.

    About 1 where nothing cancels; large where the result is small beside what it is computed from, or
    where the two factors of a small product are large.
    """

    computing: Tensor  # (...) of the factors in the dtype they are computed in
    storing: Tensor  # (...) of the new factors in the dtype they are stored in


def solve_with_amplification(
    projection: Projection, correction: Correction
) -> tuple[Cores, Figures, Amplification]:
    """`solve`, and how much `recompose` would amplify rounding errors."""
    grams, t = split_grams(projection)
    cores, figures = solve_grams(grams, correction)
    return ungauged(cores, t), figures, amplification(grams, cores, figures, correction)


def amplification(
    grams: Grams,
    cores: Cores,
    figures: Figures,
    correction: Correction,
    used: Tensor | None = None,
) -> Amplification:
    """How much `recompose` would amplify rounding errors, for what `solve_grams` found.

    used: (..., r), False for columns that are padding.
    """
    G_B, G_A = grams
    energy, squares, stored = (_of_exact if cores.X_in is None else _of_same)(grams, cores)
    inverse = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    squares = squares.sum(-1) * inverse + _of_relative_energies(grams, figures, correction)
    computing, storing = squares.sqrt(), (stored.sum(-1) * inverse).sqrt()
    computing = torch.where(figures.relative_change.isnan(), math.inf, computing)
    if cores.X_in is not None:
        # The fit divides by its systems; where they are singular it divides rounding errors by noise.
        computing = torch.where(singular(grams, used) & (energy > 0), math.inf, computing)
    computing = torch.where(cancels(G_B.sum(0), G_A.sum(0)), math.inf, computing)
    return Amplification(computing, storing)


def _of_relative_energies(grams: Grams, figures: Figures, correction: Correction) -> Tensor:
    """What rounding of Gram matrices does to the result (...) by way of the cores, squared and relative.

    The more a block is attenuated, the more its core follows its relative energy, which is as far off as
    the Gram matrices are: outside the subspace by roundoff of the whole, of which they are differences.
    A block whose energy is lost in that passes for nothing to attenuate, and stays as it is.
    """
    G_B, G_A = grams
    errors = (_errors(G_B, G_A) + _errors(G_A, G_B).transpose(0, 1)).flatten(0, 1)
    before, after = (X.movedim(-1, 0) for X in (figures.before, figures.after))
    energies = before * figures.energy
    lost = 8 * ROUNDOFF * errors.sqrt()
    attenuated = energies.new_tensor(correction.strengths) > 0
    lost = torch.where(
        attenuated[:, *[None] * figures.energy.dim()] & (energies <= lost), lost, 0.0
    )
    errors = torch.where(energies > 0, errors / energies.square(), 0.0)
    kept = torch.where(before > 0, after / before, 1.0).clamp(0, 1).sqrt()
    total = after.sum(0)
    shares = torch.where(total > 0, after / total, 0.0)
    followed = CORE_WEIGHT**2 * (shares * (1 - kept).square() * errors).sum(0)
    left = total * figures.energy
    return followed + torch.where(left > 0, lost.sum(0) / left, 0.0) / ROUNDOFF**2


def _errors(rounded: Tensor, other: Tensor) -> Tensor:
    """Squared errors (2, 2, ...) of <X, G>, X inside and outside of `rounded`, G of `other`.

    In units of roundoff. Entry i, j of X is off by (e_i e_j)^(1/2), with e (..., r, 2) of the columns
    inside and outside.
    """
    inside, whole = _diagonal(rounded[0]), _diagonal(rounded.sum(0))
    e = torch.stack([(inside * whole).sqrt(), whole], dim=-1)
    return (e * (other.square() @ e)).sum(-2).movedim(-1, 0)


def _of_exact(grams: Grams, cores: Cores) -> tuple[Tensor, Tensor, Tensor]:
    """`_of_same` for B' = [B_in, B_out], of which the Gram matrix is that of B_in and that of B_out."""
    G_B, G_A = grams
    r = G_B.shape[-1]
    own_B = G_B.movedim(0, -3)  # (..., 2, r, r), for the two halves of Y
    Y = cores.Y_in, cores.Y_out
    left = [(own_B @ y.unflatten(-2, (2, r))).flatten(-3, -2) for y in Y]
    right = [y @ G for y, G in zip(Y, G_A, strict=True)]
    energy = dot(left[0], right[0]) + dot(left[1], right[1])
    B_in, B_out = _diagonal(G_B)
    rows = (right[0] * Y[0] + right[1] * Y[1]).sum(-1)  # of A'
    squares = (
        B_in * rows[..., :r]
        + (B_in + B_out) * rows[..., r:]
        + _diagonal(G_A[0]) * (left[0] * Y[0]).sum(-2)
        + _diagonal(G_A.sum(0)) * (left[1] * Y[1]).sum(-2)
    )
    return energy, squares, 2 * torch.cat([B_in, B_out], dim=-1) * rows


def _of_same(grams: Grams, cores: Cores) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of the result (...), and what rounding does to it, squared, by the columns (..., r) of the
    factors that are computed with and by those (..., r') of the factors that are stored."""
    G_B, G_A = grams
    X_in, X_out, Y_in, Y_out = cores
    assert X_in is not None and X_out is not None
    new_B = X_in.mT @ G_B[0] @ X_in + X_out.mT @ G_B[1] @ X_out
    new_A = Y_in @ G_A[0] @ Y_in.mT + Y_out @ G_A[1] @ Y_out.mT
    # B_out is a difference from B, so it carries the rounding of all of B; so with A.
    squares = (
        _diagonal(G_B[0]) * _diagonal(X_in @ new_A @ X_in.mT)
        + _diagonal(G_B.sum(0)) * _diagonal(X_out @ new_A @ X_out.mT)
        + _diagonal(G_A[0]) * _diagonal(Y_in.mT @ new_B @ Y_in)
        + _diagonal(G_A.sum(0)) * _diagonal(Y_out.mT @ new_B @ Y_out)
    )
    return dot(new_B, new_A), squares, 2 * _diagonal(new_B) * _diagonal(new_A)


def singular(grams: Grams, used: Tensor | None = None) -> Tensor:
    """(...) whether the columns of B or the rows of A are dependent, as far as float32 tells.

    used: (..., r), False for columns that are padding.
    """
    smallest = [_smallest_correlation(G.sum(0), used) for G in grams]
    return torch.minimum(*smallest) < SMALLEST_CORRELATION


def realign_with_amplification(
    projection: Projection, spectrum: Spectrum, realignment: Realignment
) -> tuple[Shift, Figures, Amplification]:
    """`realign.solve`, and how much its `recompose` would amplify rounding errors."""
    shift, figures = realign.solve(projection, spectrum, realignment)
    energy = figures.energy * figures.after.sum(-1)
    return shift, figures, shift_amplification(projection, spectrum, realignment, shift, energy)


def shift_amplification(
    projection: Projection,
    spectrum: Spectrum,
    realignment: Realignment,
    shift: Shift,
    energy: Tensor,
) -> Amplification:
    """How much `realign.recompose` would amplify rounding errors of a shift that `realign.solve` found.

    energy: (...) that of the result, ||B'A'||_F^2. Nothing of it can be trusted where the diagonal of
    G_B^+ is inf, so that the result there is inf.
    """
    P, Q, G_B, G_A = (X.double() for X in projection)
    f = realign.share(projection, spectrum, realignment)
    target, f = realign.target_of(f, spectrum, realignment), f[..., None, :]
    columns, rows = _diagonal(G_B), _diagonal(G_A)
    new_rows = (rows + (Q + shift.Y).square().sum(-1) - Q.square().sum(-1)).clamp_min(0)
    stored = columns * new_rows
    # B times what is rounded in A, in A' and in the coordinates Q that are taken away.
    squares = (columns * (rows + new_rows)).sum(-1)
    if shift.c is None:
        put = shift.Y + Q * f  # G_B^+ P^T (gamma / s) S f
        # Errors of P and of G_B, each divided by G_B.
        squares = squares + (
            shift.inverse_diagonal * (P.mT * target[..., None, :]).square().sum(-1)
        ).sum(-1)
        squares = squares + (shift.inverse_diagonal * columns).sum(-1) * (
            columns * put.square().sum(-1)
        ).sum(-1)
        stored = stored.sum(-1)  # only A' is written
    else:
        added = shift.c.square().sum(-1)
        squares, stored = squares + added, 2 * (stored.sum(-1) + added)
    inverse = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    computing, storing = (squares * inverse).sqrt(), (stored * inverse).sqrt()
    unsolved = torch.isinf(shift.inverse_diagonal).any(-1) & (f > 0).any((-2, -1))
    unsolved = unsolved | cancels(G_B, G_A)
    return Amplification(torch.where(unsolved, math.inf, computing), storing)


def cancels(G_B: Tensor, G_A: Tensor) -> Tensor:
    """(...) whether the update is so small beside its factors that nothing is known of its energy."""
    return dot(G_B, G_A) < SMALLEST_ENERGY * (_diagonal(G_B) * _diagonal(G_A)).sum(-1)


def squares_fit_float32(squares: Tensor) -> Tensor:
    """(...) whether float32 holds the squared norms (..., r) of a factor's columns or rows.

    Factors can be as small as 1e-30 where alpha makes up for it: a sum of squares that vanished would
    pass the update off as zero, and so as nothing to correct.
    """
    return (squares > SMALLEST_SQUARE).all(-1)


def limits(
    correction: Method, *, read: Sequence[torch.dtype], written: Sequence[torch.dtype]
) -> Limits:
    """How much amplification a module bears, by the types of its factors."""
    half = any(dtype in HALF for dtype in (*read, *written))
    if correction.method == "csulora":
        return Limits(COMPUTING_LIMIT, STORING_LIMIT if half else COMPUTING_LIMIT)
    coarse = all(dtype in HALF for dtype in written)
    return Limits(
        SHIFT_LIMIT_HALF if coarse else SHIFT_LIMIT, STORING_LIMIT if half else SHIFT_LIMIT
    )


def needs_float64(
    squares_fit: Tensor, amplified: Amplification, limits: Sequence[Limits]
) -> Tensor:
    """(n) which modules float32 would spoil, or their own type would in a form that is not balanced.

    squares_fit: (n) bool, from `squares_fit_float32`.
    """
    computing, storing = torch.tensor(limits, dtype=torch.float64).reshape(-1, 2).unbind(1)
    # Not "above": NaN is no number of which anything is known.
    kept = (amplified.computing <= computing) & (amplified.storing <= storing)
    return ~(squares_fit & kept)


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1)


def _smallest_correlation(G: Tensor, used: Tensor | None) -> Tensor:
    """Smallest eigenvalue of a Gram matrix (..., r, r) after its columns are scaled to norm 1."""
    if used is not None:
        G = G + torch.diag_embed((~used).to(G.dtype))
    scale = _diagonal(G).clamp_min(1e-300).rsqrt()
    return torch.linalg.eigvalsh(G * scale[..., None] * scale[..., None, :])[..., 0]
