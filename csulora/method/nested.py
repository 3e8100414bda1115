"""What many settings would leave of an update, from one projection: for every k and every strength.

Bases are nested, so P and Q of k directions are leading rows and columns of one P and one Q, and the Gram
matrices are those of all k. Every strength then only weights numbers that do not depend on it: the
singular values of the blocks for CSULoRA, a few products a direction of D for realignment. No core and no
factor is formed. The figures are those of `stages.solve_grams` and `realign.solve`.

All tensors are float64, with a leading dimension n, the modules of one shape of P and Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csulora.method.in_float64 import Columns
from csulora.method.precision import SMALLEST_CORRELATION
from csulora.method.rank_fit import dot
from csulora.method.realign import Spectrum, share, target_of
from csulora.method.stages import (
    LEFT,
    RIGHT,
    Figures,
    Grams,
    Projection,
    project,
    solve_grams,
    split_grams,
)
from csulora_kernels.settings import REMOVES

if TYPE_CHECKING:
    from csulora.settings import Correction, Realignment


def project_once(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> Projection:
    """`stages.project` of one module, with Gram matrices summed in float64.

    Args: B (d_out, r) and A (r, d_in) of any type, U (d_out, K) and V (d_in, K) in float32. P and Q are
    products in float32, which leaves about 1e-7 of the update's energy in doubt; the Gram matrices have
    to tell the columns of B apart.
    """
    found = project(B.to(U), A.to(V), U, V)
    B, A = B.double(), A.double()
    return Projection(found.P.double(), found.Q.double(), B.mT @ B, A @ A.mT)


def leading(projection: Projection, k: int) -> Projection:
    """The projection on the k leading directions; all of them where there are fewer."""
    return projection._replace(P=projection.P[..., :k, :], Q=projection.Q[..., :k])


class Blocks(NamedTuple):
    """The four blocks of updates at one k, for CSULoRA."""

    grams: Grams
    energies: Tensor  # (4, n) ||block||^2
    squares: Tensor  # (4, n, r) squared singular values of each block

    @classmethod
    def of(cls, projection: Projection) -> Blocks:
        grams, _ = split_grams(projection)
        values, vectors = torch.linalg.eigh(grams.B)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]  # G_B = root root^T
        inner, A = root[LEFT], grams.A[RIGHT]
        squares = torch.linalg.eigvalsh(inner.mT @ A @ inner).clamp_min(0)
        return cls(grams, dot(grams.B[LEFT], A), squares)


def attenuated(blocks: Blocks, corrections: Sequence[Correction]) -> Figures:
    """The figures of CSULoRA at settings that differ in strengths alone, (s, n) and (s, n, 4).

    The form `same` costs its fit, as it does in `stages`.
    """
    if corrections[0].form == "same":
        found = [solve_grams(blocks.grams, correction)[1] for correction in corrections]
        return Figures(*(torch.stack(parts) for parts in zip(*found, strict=True)))
    energy = blocks.energies.sum(0)
    per_energy = _inverse(energy)
    if corrections[0].granularity == "component":
        x = (blocks.energies * per_energy)[..., None]  # one value a block, attenuated as a whole
    else:
        x = blocks.squares * per_energy[..., None]
    strengths = x.new_tensor([c.strengths for c in corrections])[..., None, None]
    # The limit, also for an empty block.
    kept = torch.where(strengths >= REMOVES, 0.0, 1 / (1 + strengths.clamp_max(REMOVES) * x))
    change = (x * (1 - kept).square()).sum((1, -1))
    return Figures(
        energy.expand_as(change),
        (blocks.energies * per_energy).mT.expand(*change.shape, 4),
        (x * kept.square()).sum(-1).mT,
        change.sqrt(),
        torch.zeros_like(change),
    )


class Directions(NamedTuple):
    """What realignment weights by direction i of D; q_i the columns of Q, p_j the rows of P.

    h_i is what comes in place of B q_i for a unit of D: the nearest to u_i on the columns of B for
    `same`, u_i itself for `exact`. `inside` sums over the rows j up to each k: its part in U_k.
    """

    projection: Projection
    reached: Tensor  # (n, K) ||B B^+ u_i||^2
    whole: tuple[Tensor, Tensor, Tensor]  # (n, K) <B q_i, B q_i>, <B q_i, h_i>, <h_i, h_i>
    inside: tuple[Tensor, Tensor, Tensor]  # (n, K, K) the same in U_k, by k - 1 and i
    writes: Tensor  # (n, K) ||u_j^T B A||^2

    @classmethod
    def of(cls, projection: Projection, N: Tensor, same: bool) -> Directions:
        """N (n, K, K): U^T B B^+ U, from `reach`."""
        P, Q, G_B, G_A = projection
        M = P @ Q
        m, reached = (X.diagonal(dim1=-2, dim2=-1) for X in (M, N))
        qq = (Q * (G_B @ Q)).sum(-2)
        writes = (P * (P @ G_A)).sum(-1)
        if same:
            whole = qq, m, reached
            inside = tuple(X.cumsum(-2) for X in (M * M, M * N, N * N))
        else:
            one = torch.ones_like(m)
            rows = torch.ones_like(M)
            whole = qq, m, one
            inside = (M * M).cumsum(-2), m[..., None, :] * rows, rows
        return cls(projection, reached, whole, inside, writes)  # type: ignore[arg-type]


def reach(projection: Projection) -> tuple[Tensor, Tensor]:
    """U^T B B^+ U (n, K, K), and (n) whether G_B tells the columns of B apart; else use `reach_of`."""
    P, G_B = projection.P, projection.G_B
    norms = G_B.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(norms > 0, norms, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(G_B * scale[..., None] * scale[..., None, :])
    # A column of zeros has an eigenvalue of exactly 0, which divides nothing.
    empty = (norms <= 0).sum(-1)
    used = torch.arange(values.shape[-1], device=values.device) >= empty[..., None]
    apart = ((values > SMALLEST_CORRELATION) | ~used).all(-1)
    inverse = torch.where(used, 1 / values, 0.0)
    X = (P * scale[..., None, :]) @ vectors
    return X * inverse[..., None, :] @ X.mT, apart


def reach_of(B: Tensor, U: Tensor) -> Tensor:
    """U^T B B^+ U (K, K) of one module from B (d_out, r) itself, as `in_float64.realign` has it."""
    reached = Columns.of(B.double()).coordinates(U.double())
    return reached.mT @ reached


def realigned(
    directions: Directions, k: int, spectrum: Spectrum, realignments: Sequence[Realignment]
) -> Figures:
    """The figures of realignment at the k leading directions, (s, n) and (s, n, 4), for settings that
    differ in strengths alone.

    spectrum: that of the k leading directions, or of all where there are fewer.
    """
    projection = leading(directions.projection, k)
    k = projection.P.shape[-2]
    f = torch.stack([share(projection, spectrum, one) for one in realignments])
    b = target_of(f, spectrum, realignments[0])
    energy = dot(projection.G_B, projection.G_A).clamp_min(0)
    whole = [X[..., :k] for X in directions.whole]
    inside = [X[..., k - 1, :k] if k else X[..., :0].sum(-2) for X in directions.inside]
    read, both = whole[0].sum(-1), inside[0].sum(-1)
    left = directions.writes[..., :k].sum(-1) - both
    before = torch.stack([both, left, read - both, energy - left - read], dim=-1).clamp_min(0)
    kept, both_kept = (_weighted(X, 1 - f, b).clamp_min(0) for X in (whole, inside))
    after = before.repeat(len(f), 1, 1)
    after[..., 0], after[..., 2] = both_kept, (kept - both_kept).clamp_min(0)
    lost = torch.zeros_like(kept)
    if realignments[0].form == "same":
        lost = (b.square() * (1 - directions.reached[..., :k]).clamp(0, 1)).sum(-1)
    per_energy = _inverse(energy)[..., None]
    exact = after.sum(-1) + lost
    change = _weighted(whole, -f, b).clamp_min(0) * per_energy[..., 0]
    return Figures(
        energy.expand_as(change),
        (before * per_energy).expand_as(after),
        after * per_energy,
        change.sqrt(),
        torch.where(exact > 0, lost / exact, torch.zeros_like(exact)).sqrt(),
    )


def _weighted(products: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """||sum_i (a_i B q_i + b_i h_i) v_i^T||^2, (n): the v_i are orthonormal."""
    qq, qh, hh = products
    return (a.square() * qq + 2 * a * b * qh + b.square() * hh).sum(-1)


def _inverse(energy: Tensor) -> Tensor:
    return torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
