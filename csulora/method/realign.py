"""Realignment in factor form, in plain PyTorch: `solve` and `recompose`; `project` is that of `stages`.

This file defines correctness of the method, which is this project's own (docs/method.md). Symbols are
those of `stages`; D = U S V^T is the alignment's displacement, s the LoRA scaling, f (..., k) the share
of each of its directions that is replaced. The update becomes

    exact  dW - dW V f V^T + gamma U S f V^T                   rank r + k
    same   dW - dW V f V^T + gamma B B^+ U S f V^T             rank r: least squares on the columns of B

Both are B' A' with only the side of A, and columns of U, added to. A zero update stays zero: what does
nothing has undone nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csulora.method.rank_fit import dot
from csulora.method.stages import Figures, Projection

if TYPE_CHECKING:
    from csulora.settings import Realignment

# A column of B, scaled to norm 1, that is this near (squared) to those before it: float32 Gram matrices
# cannot tell it from dependent.
SMALLEST_PIVOT = 1e-5
MAX_EDGE_STEPS = 10


class Spectrum(NamedTuple):
    """What is known of D besides its directions, and the scaling of the update, in float64."""

    S: Tensor  # (..., k) singular values
    edge: Tensor  # (...) noise edge of D
    scaling: Tensor  # (...) s


class Shift(NamedTuple):
    """What is added to the factors.

    same   B' = B           A' = A + Y V^T
    exact  B' = [B, U c]    A' = [A + Y V^T ; V^T]
    """

    Y: Tensor  # (..., r, k)
    c: Tensor | None  # (..., k), None for same
    # Of G_B^+ (..., r), inf where float32 cannot tell the columns of B apart: for `precision`.
    inverse_diagonal: Tensor

    def unbind(self) -> list[Shift]:
        """Those of the single modules of a stack."""
        n = self.Y.shape[0]
        parts = ([None] * n if X is None else X.unbind() for X in self)
        return [Shift(*row) for row in zip(*parts, strict=True)]

    def of(self, rows: slice) -> Shift:
        """That of some modules of a stack."""
        Y, c, diagonal = self
        return Shift(Y[rows], None if c is None else c[rows], diagonal[rows])


def noise_edge(S: Tensor, energy_share: float, d_out: int, d_in: int) -> float:
    """The largest singular value that random noise of the size of D's remainder would have.

    Args: S (k) descending, the leading singular values of D (d_out, d_in); energy_share, ||S||^2 over
    ||D||^2 (0 where it is not known: no edge). Marchenko and Pastur: a matrix of independent entries of
    variance sigma^2 has none above sigma (sqrt(d_out) + sqrt(d_in)). The remainder is that below the q
    values that stand out, and q that of those above the edge, repeated until it stays.
    """
    squares = S.double().square()
    total = float(squares.sum())
    if not 0 < energy_share < 1 or total == 0:
        return 0.0
    remainder = total / energy_share - squares.cumsum(0)
    q, edge = len(squares), 0.0
    for _ in range(MAX_EDGE_STEPS):
        left = total / energy_share if q == 0 else float(remainder[q - 1])
        cells = (d_out - q) * (d_in - q)
        if left <= 0 or cells <= 0:
            return 0.0
        edge = math.sqrt(left / cells) * (math.sqrt(d_out) + math.sqrt(d_in))
        above = int((squares > edge * edge).sum())
        if above == q:
            break
        q = above
    return edge


def share(projection: Projection, spectrum: Spectrum, realignment: Realignment) -> Tensor:
    """f (..., k): how much of each direction is replaced; none below the edge or of a zero update."""
    return replaced(rates(projection, spectrum, realignment), realignment.strength)


def rates(projection: Projection, spectrum: Spectrum, realignment: Realignment) -> Tensor:
    """t_i / t_1 (..., k): what the strength is multiplied by; 0 for directions that are left alone."""
    squares = spectrum.S.square()
    if realignment.edge:
        squares = (squares - spectrum.edge.square()[..., None]).clamp_min(0)
    # The largest is the first; relative to it nothing can overflow.
    t = squares / squares[..., :1].clamp_min(torch.finfo(squares.dtype).tiny)
    P, Q, G_B, G_A = projection
    nothing = ((dot(G_B.double(), G_A.double()) <= 0) | (spectrum.scaling == 0))[..., None]
    if realignment.opposed:
        along = spectrum.scaling[..., None] * (P.double() * Q.double().mT).sum(-1)
        nothing = nothing | (along >= 0)
    return torch.where(nothing, torch.zeros_like(t), t)


def replaced(t: Tensor, strength: float) -> Tensor:
    """The share of a direction that is replaced, from its rate."""
    if math.isinf(strength):
        return (t > 0).to(t.dtype)
    return strength * t / (1 + strength * t)


def solve(
    projection: Projection, spectrum: Spectrum, realignment: Realignment
) -> tuple[Shift, Figures]:
    """What realignment adds to the factors, and the energies that follow. Runs in float64.

    Modules of which B has columns that float32 cannot tell apart are not solved: `precision` finds
    them by `inverse_diagonal`, and `in_float64` solves them.
    """
    P, Q, G_B, _ = (X.double() for X in projection)
    f = share(projection, spectrum, realignment)
    target = target_of(f, spectrum, realignment)
    inverse, diagonal = _inverse(G_B)
    c, Y = None, -Q * f[..., None, :]
    if realignment.form == "same":
        Y = Y + inverse @ P.mT * target[..., None, :]
    else:
        c, diagonal = target, torch.zeros_like(diagonal)
    return Shift(Y, c, diagonal), _figures(projection, Y, f, target, inverse, c is None)


def recompose(
    B: Tensor,
    A: Tensor,
    U: Tensor,
    V: Tensor,
    shift: Shift,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The realigned factors: B itself and A' (..., r, d_in), or B' (..., d_out, r + k) and A'.

    Computes in the dtype of U; B and A may be of a lower precision. `out` is memory in the dtype of U
    for what is computed: all but the B of `same`.
    """
    dtype, r = U.dtype, A.shape[-2]
    r_new = r if shift.c is None else r + V.shape[-1]
    A_new = A.new_empty((*A.shape[:-2], r_new, A.shape[-1]), dtype=dtype) if out is None else out[1]
    # The product as (d_in, r), the faster of the two ways.
    torch.matmul(V, shift.Y.mT.to(dtype), out=A_new[..., :r, :].mT)
    A_new[..., :r, :] += A
    if shift.c is None:
        return B, A_new
    A_new[..., r:, :] = V.mT
    B_new = B.new_empty((*B.shape[:-1], r_new), dtype=dtype) if out is None else out[0]
    B_new[..., :r] = B
    torch.mul(U, shift.c.to(dtype)[..., None, :], out=B_new[..., r:])
    return B_new, A_new


def target_of(f: Tensor, spectrum: Spectrum, realignment: Realignment) -> Tensor:
    """(gamma / s) S f, (..., k): what comes in place of what is taken, where f is not 0."""
    scaling = torch.where(spectrum.scaling == 0, 1.0, spectrum.scaling)[..., None]
    return realignment.gamma / scaling * spectrum.S * f


def _inverse(G: Tensor) -> tuple[Tensor, Tensor]:
    """G^-1 (..., r, r) and its diagonal for a Gram matrix; zero rows and columns stay zero.

    0, and a diagonal of inf, where a column is nearly dependent on others.
    """
    norms = G.diagonal(dim1=-2, dim2=-1)
    empty = norms <= 0
    scale = torch.where(empty, 1.0, norms).rsqrt()
    outer = scale[..., None] * scale[..., None, :]
    correlation = G * outer + torch.diag_embed(empty.to(G.dtype))
    L, failed = torch.linalg.cholesky_ex(correlation)
    pivots = L.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    regular = (failed == 0) & (pivots > SMALLEST_PIVOT)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    inverse = torch.cholesky_inverse(torch.where(regular[..., None, None], L, eye)) * outer
    used = ~(empty[..., None] | empty[..., None, :]) & regular[..., None, None]
    inverse = torch.where(used, inverse, torch.zeros_like(inverse))
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    return inverse, torch.where(regular[..., None], diagonal, torch.full_like(diagonal, math.inf))


def _figures(
    projection: Projection, Y: Tensor, f: Tensor, target: Tensor, inverse: Tensor, same: bool
) -> Figures:
    """Energies of the four blocks before and after, and what changed.

    Outside of V nothing changes. Inside, in coordinates of V, the update is B Z (+ U c for `exact`).
    """
    P, Q, G_B, G_A = (X.double() for X in projection)
    G_Bin, G_Ain = P.mT @ P, Q @ Q.mT
    G_Bout, G_Aout = G_B - G_Bin, G_A - G_Ain
    before = [dot(G, H) for G in (G_Bin, G_Bout) for H in (G_Ain, G_Aout)]
    added = torch.zeros_like(P @ Q) if same else torch.diag_embed(target)
    Z = Q + Y
    ff, of = _inside(P, G_Bout, Z, added)
    change_in, change_out = _inside(P, G_Bout, Y, added)
    change = (change_in + change_out).clamp_min(0)
    # Of gamma D f, what no combination of the columns of B reaches.
    reached = (P @ inverse * P).sum(-1).clamp(0, 1)
    lost = (target.square() * (1 - reached)).sum(-1) if same else torch.zeros_like(change)
    energy = dot(G_B, G_A).clamp_min(0)
    after = torch.stack([ff, before[1], of, before[3]], dim=-1).clamp_min(0)
    per_energy = torch.where(energy > 0, 1 / energy, torch.zeros_like(energy))
    exact = after.sum(-1) + lost
    rank_error = torch.where(exact > 0, lost / exact, torch.zeros_like(exact)).sqrt()
    return Figures(
        energy,
        torch.stack(before, dim=-1).clamp_min(0) * per_energy[..., None],
        after * per_energy[..., None],
        (change * per_energy).sqrt(),
        rank_error,
    )


def _inside(P: Tensor, G_Bout: Tensor, Z: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Energies inside and outside U of B Z V^T + U added V^T."""
    return (P @ Z + added).square().sum((-2, -1)), dot(G_Bout, Z @ Z.mT)
