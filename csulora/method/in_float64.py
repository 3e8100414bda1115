"""The same stages in float64 throughout, for modules whose result float32 would spoil.

The fast path computes factors in float32 and Gram matrices outside the subspace as differences. That
loses digits where the result is small beside the update (strong attenuation of the aligned block, a
subspace of nearly every direction), where the factors of `same` are rank-deficient, or where squares
vanish in float32. `csulora.method.precision` tells which modules those are; they are few, and come
here.

The result is the same update in a balanced form: columns of B' and rows of A' orthogonal, with equal
norms, the form that loses least when it is stored. Realignment leaves B as it is where that loses
little enough.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csulora.method.rank_fit import dot
from csulora.method.realign import Spectrum, rates, share, target_of
from csulora.method.stages import (
    Cores,
    Figures,
    Grams,
    Projection,
    even_gauge,
    project,
    solve_grams,
)

if TYPE_CHECKING:
    from csulora.settings import Correction, Realignment

# Singular values below this share of the largest are what float64 leaves of zero.
NOISE = 1e-12
# So are those of a product below this share of the norms of its columns times rows, which may cancel.
ROUNDING = 1e-15


class Parts(NamedTuple):
    """Both factors in float64, split at the subspace."""

    B_in: Tensor  # (d_out, r)
    B_out: Tensor  # (d_out, r)
    A_in: Tensor  # (r, d_in)
    A_out: Tensor  # (r, d_in)


def split(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Parts:
    """Parts of B (d_out, r) and A (r, d_in) of any type, in the balanced form of their product.

    In it no columns cancel each other, so that Gram matrices hold the update and not only its factors.
    """
    B, A = balanced(B, A)
    U, V = U.to(B), V.to(B)  # the factors may lie on another device
    B_in, A_in = U @ (U.mT @ B), (A @ V) @ V.mT
    return Parts(B_in, B - B_in, A_in, A - A_in)


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B (d_out, r) and A (r, d_in) of any type in the balanced form of their product, float64."""
    B, A = B.double(), A.double()
    t = even_gauge(B.square().sum(0), A.square().sum(1))
    return _balanced(B * t, A / t[:, None], B.shape[1])


def grams_of(parts: Parts) -> Grams:
    """Their Gram matrices (2, r, r), which no difference has touched."""
    B_in, B_out, A_in, A_out = parts
    return Grams(
        torch.stack([B_in.mT @ B_in, B_out.mT @ B_out]),
        torch.stack([A_in @ A_in.mT, A_out @ A_out.mT]),
    )


def solve(parts: Parts, correction: Correction) -> tuple[Cores, Figures]:
    """The cores from Gram matrices of the parts themselves.

    For `same` those of `exact` where that result has no more than rank r: nothing has to be fitted.
    """
    grams = grams_of(parts)
    if correction.form == "same":
        exact = solve_grams(grams, replace(correction, form="exact"))
        if fits_rank(parts, exact[0]):
            return exact
    return solve_grams(grams, correction)


def fits_rank(parts: Parts, exact: Cores) -> bool:
    """Whether the result of `exact` has no more than rank r, so that `same` loses nothing."""
    S = _triplets(*_factors(parts, exact))[1]
    return bool((S[parts.B_in.shape[1] :] <= NOISE * S[0]).all())


def energy_of(B: Tensor, A: Tensor) -> Tensor:
    """||B A||^2 (scalar) of factors in float64.

    Columns that cancel each other do so in the product with R, B = Q R, where Gram matrices would not.
    """
    return (torch.linalg.qr(B, mode="r")[1] @ A).square().sum()


class Attenuated(NamedTuple):
    """A module corrected by CSULoRA."""

    parts: Parts
    cores: Cores

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B' (d_out, rank) and A' (rank, d_in), float64, balanced."""
        return _balanced(*_factors(self.parts, self.cores), rank)


class Realigned(NamedTuple):
    """A module that is realigned: left right is its update, without the scaling."""

    left: Tensor  # (d_out, n)
    right: Tensor  # (n, d_in)
    # B and A' in which only A' is new, where they lose no more by rounding than they may.
    kept: tuple[Tensor, Tensor] | None

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B' (d_out, rank) and A' (rank, d_in), balanced in float64 where B is not kept."""
        return self.kept or _balanced(self.left, self.right, rank)


def attenuate(
    B: Tensor, A: Tensor, U: Tensor, V: Tensor, correction: Correction
) -> tuple[Attenuated, Figures]:
    """A module's update by CSULoRA, for B (d_out, r) and A (r, d_in) of any type."""
    parts = split(B, A, U, V)
    cores, figures = solve(parts, correction)
    return Attenuated(parts, cores), figures


def realign(
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    spectrum: Spectrum,
    realignment: Realignment,
    storing_limit: float,
) -> tuple[Realigned, Figures]:
    """A module's realigned update, for B (d_out, r) and A (r, d_in) of any type.

    storing_limit: up to which amplification of A' alone B is kept.
    """
    old, V = B, V.to(A.device, torch.float64)
    B, A, U = B.double(), A.double(), U.to(B.device, torch.float64)
    projection = project(B, A, U, V)
    f = share(projection, spectrum, realignment)
    target = target_of(f, spectrum, realignment)
    taken = A - (projection.Q * f) @ V.mT
    if realignment.form == "exact":
        left, right = torch.cat([B, U * target], dim=1), torch.cat([taken, V.mT])
        figures = _figures_of(projection, left, right, B, A, U, V, target.new_zeros(()))
        return Realigned(left, right, None), figures
    columns = Columns.of(B)
    left, X, norms = columns.left, columns.X, columns.norms
    reached = columns.coordinates(U)
    added = (reached * target) @ V.mT
    right = columns.R @ taken + X @ added
    lost = (target.square() * (1 - reached.square().sum(0)).clamp_min(0)).sum()
    figures = _figures_of(projection, left, right, B, A, U, V, lost)
    A_new = taken + (columns.Yt.mT / columns.S) @ added / norms[:, None]
    stored = dot(norms.square()[:, None], A_new.square()).sqrt()
    small = bool(stored <= storing_limit * right.norm())
    return Realigned(left, right, (old, A_new) if small else None), figures


def replaced_energies(
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    spectrum: Spectrum,
    realignment: Realignment,
) -> tuple[Tensor, Tensor]:
    """Rates of the directions (k), and the squared change (k) that replacing all of each would make.

    In units of ||BA||^2. Directions are orthogonal to each other, so that shares f change sum f^2 of it.
    """
    B, A, U, V = (X.double() for X in (B, A, U, V))
    projection = project(B, A, U, V)
    put = target_of(torch.ones_like(spectrum.S), spectrum, realignment)
    if realignment.form == "exact":
        change = U * put - B @ projection.Q
    else:
        columns = Columns.of(B)
        change = columns.coordinates(U) * put - columns.X.mT @ (columns.R @ projection.Q)
    return rates(projection, spectrum, realignment), change.square().sum(0)


class Columns(NamedTuple):
    """The columns of B, told apart down to `NOISE` after they are scaled to norm 1.

    B = left R. left X is an orthonormal basis of what they span, and B / norms = left X S Yt.
    """

    left: Tensor  # (d_out, r)
    R: Tensor  # (r, r)
    X: Tensor  # (r, q)
    S: Tensor  # (q)
    Yt: Tensor  # (q, r)
    norms: Tensor  # (r), 1 for a zero column

    @classmethod
    def of(cls, B: Tensor) -> Columns:
        norms = torch.where(B.any(0), B.norm(dim=0), 1.0)
        left, R = torch.linalg.qr(B / norms)
        X, S, Yt = torch.linalg.svd(R, full_matrices=False)
        kept = NOISE * S[0] < S
        return cls(left, R * norms, X[:, kept], S[kept], Yt[kept], norms)

    def coordinates(self, U: Tensor) -> Tensor:
        """What they reach of U (d_out, k), in their orthonormal basis: (q, k)."""
        return self.X.mT @ (self.left.mT @ U)


def _balanced(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B' = X S^(1/2) (d_out, rank) and A' = S^(1/2) Y^T (rank, d_in) of the product B A, then zeros."""
    X, S, Yt = _triplets(B, A)
    noise = (ROUNDING * (B.norm(dim=0) * A.norm(dim=1)).sum()).clamp_min(NOISE * S[0])
    root = torch.where(noise < S, S, 0.0)[:rank].sqrt()
    B, A = X.new_zeros(X.shape[0], rank), X.new_zeros(rank, Yt.shape[1])
    torch.mul(X[:, :rank], root, out=B[:, : len(root)])
    torch.mul(Yt[:rank], root[:, None], out=A[: len(root)])
    return B, A


def _figures_of(
    projection: Projection,
    left: Tensor,
    right: Tensor,
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    lost: Tensor,
) -> Figures:
    """Energies of the update left right beside those of B A, from which it differs inside V only."""
    P, Q, _, _ = projection
    inside, before = left @ (right @ V), B @ Q
    outside = A - Q @ V.mT
    fo, all_out = P @ outside, energy_of(B, outside)
    rest = torch.stack([fo.square().sum(), (all_out - fo.square().sum()).clamp_min(0)])
    energies = []
    for J in (before, inside):
        ff = U.mT @ J
        of = J - U @ ff
        energies.append(torch.stack([ff.square().sum(), rest[0], of.square().sum(), rest[1]]))
    energy = energies[0].sum()
    per_energy = 1 / energy if energy > 0 else torch.zeros_like(energy)
    exact = energies[1].sum() + lost
    return Figures(
        energy,
        energies[0] * per_energy,
        energies[1] * per_energy,
        ((inside - before).square().sum() * per_energy).sqrt(),
        (lost / exact).sqrt() if exact > 0 else torch.zeros_like(exact),
    )


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
