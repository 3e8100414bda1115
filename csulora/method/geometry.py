"""Where an update lies relative to the leading k directions of D, for many k from one projection.

Bases are nested, so P and Q of fewer directions are leading rows and columns of one P and one Q. All
figures are sums that add up over modules; what is shown are their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from csulora.method.stages import Projection


class Sums(NamedTuple):
    """Of one update dW (d_out, d_in) at k directions, or of many added up; in weight units squared."""

    aligned: float  # ||P_U dW P_V||^2, and so on in the order of the blocks
    partial_left: float
    partial_right: float
    off: float
    random_read: float  # k / d_in of ||dW||^2: what random directions in place of V would read
    inner: float  # <dW, D_k>, signed
    displacement: float  # ||D_k||^2

    @property
    def energy(self) -> float:
        """||dW||^2."""
        return self.aligned + self.partial_left + self.partial_right + self.off


def ladder(rank: int) -> list[int]:
    """The powers of two from 2 on that are below `rank`, and `rank` itself."""
    return [k for k in (2**i for i in range(1, 63)) if k < rank] + [rank]


def nested_sums(
    projection: Projection, S: Tensor, scaling: float, d_in: int, ranks: list[int]
) -> list[Sums]:
    """The sums at the leading k directions for each k of `ranks`; more than there are means all.

    Args: a projection in float64, P (k, r), Q (r, k), Grams (r, r); S (k), the singular values of D;
    scaling s of dW = s B A.
    """
    P, Q, G_B, G_A = (X.double() for X in projection)
    E = float((G_B * G_A).sum())
    inner = scaling * (P * Q.mT).sum(1) * S.double()
    found = []
    for k in (min(rank, P.shape[0]) for rank in ranks):
        P_k, Q_k = P[:k], Q[:, :k]
        G_Bin, G_Ain = P_k.mT @ P_k, Q_k @ Q_k.mT
        both, writes, reads = (
            float((X * Y).sum()) for X, Y in ((G_Bin, G_Ain), (G_Bin, G_A), (G_B, G_Ain))
        )
        blocks = both, writes - both, reads - both, E - writes - reads + both
        # Rounding can leave a tiny negative number where a block is empty.
        ff, fo, of, oo = (scaling**2 * max(block, 0.0) for block in blocks)
        random_read = scaling**2 * E * k / d_in
        displacement = float(S[:k].double().square().sum())
        found.append(Sums(ff, fo, of, oo, random_read, float(inner[:k].sum()), displacement))
    return found


def total(sums: Sequence[Sums]) -> Sums:
    """Those of all modules."""
    return Sums._make(map(math.fsum, zip(*sums, strict=True)))
