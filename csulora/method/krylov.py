"""Top singular triplets of a large matrix that is only ever multiplied by thin blocks.

Block Krylov iteration with full reorthogonalisation (Musco and Musco, arXiv 1504.05477): the basis
keeps every power of D^T D applied to the start block, which is what makes it converge on the flat
spectra that differences of checkpoints have, where plain subspace iteration stalls.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from csulora.method.difference import Difference, energy_of

OVERSAMPLING = 16
# Stop when the energy of the leading k directions that is still missing is below this share of it.
MISSING = 2e-4
# Past this share of the smaller side a dense decomposition costs no more than what is left to do; of a
# small side it costs little anyway, and is exact.
DENSE_SHARE, SMALL_SHARE, SMALL = 0.75, 0.5, 512


class Triplets(NamedTuple):
    """D ~ U diag(S) V^T: U (m, k), S (k) descending, V (n, k), all float32, and ||D||_F^2."""

    U: Tensor
    S: Tensor
    V: Tensor
    energy: float


def top_triplets(
    D: Tensor | Difference,
    generator: torch.Generator,
    *,
    rank: int,
    energy_share: float | None = None,
) -> Triplets:
    """The leading singular triplets of D (m, n), float32 or a difference that is never stored.

    Args: `rank` directions; or, with `energy_share` in (0, 1], as many as hold that share of
    ||D||_F^2 (`rank` is then only the block size). `generator` draws the start block on the CPU, so
    one seed gives the same result everywhere the products are deterministic.
    Directions whose singular value is rounding noise (below max(m, n) eps S_0) are dropped: of a matrix
    of lower rank, fewer come back.
    """
    wide = D.shape[0] < D.shape[1]
    T = D.mT if wide else D  # tall: the Krylov basis lives on the smaller side
    total = float(energy_of(T))
    if total == 0:
        zeros = torch.zeros(max(T.shape), 0, device=T.device)
        return Triplets(zeros[: D.shape[0]], zeros[0], zeros[: D.shape[1]], 0.0)
    left, S, right = _krylov(T, generator, rank, energy_share, total)
    keep = _count(S, rank, energy_share, total, max(T.shape))
    left, right = _fix_signs(left[:, :keep], right[:, :keep])
    U, V = (right, left) if wide else (left, right)
    return Triplets(U.float().contiguous(), S[:keep].float(), V.float().contiguous(), total)


def _krylov(
    T: Tensor | Difference,
    generator: torch.Generator,
    rank: int,
    energy_share: float | None,
    total: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n = T.shape[1]
    block = min(n, min(rank, n) + OVERSAMPLING)
    columns = block if energy_share is None else n  # the most that can be wanted
    if block >= SMALL_SHARE * n:
        return _dense(T, columns)
    basis = torch.empty(n, 0, dtype=T.dtype, device=T.device)
    images: list[Tensor] = []
    gram = torch.empty(0, 0, dtype=torch.float64, device=T.device)
    new = torch.randn(n, block, generator=generator, dtype=T.dtype).to(T.device)
    captured: list[float] = []
    while True:
        new = _orthonormal_against(new, basis)
        images.append(T @ new)
        basis = torch.cat([basis, new], dim=1)
        new = T.mT @ images[-1]
        gram = _grown(gram, (basis.mT @ new).double())
        values = torch.linalg.eigvalsh(gram)
        captured.append(_leading_energy(values.flip(0), rank, energy_share, total))
        enough = energy_share is None or float(values.sum()) >= energy_share * total
        if enough and _missing(captured) <= MISSING * captured[-1]:
            leading = torch.linalg.eigh(gram)[1].flip(1)[:, :columns]
            return _rayleigh_ritz(
                basis.double() @ leading, torch.cat(images, dim=1).double() @ leading
            )
        if basis.shape[1] + block > (DENSE_SHARE if n > SMALL else SMALL_SHARE) * n:
            return _dense(T, columns)


def _grown(gram: Tensor, cross: Tensor) -> Tensor:
    """The Gram matrix of all images, from that of all but the last columns and the products with those.

    In float32 it decides when to stop and what leads; singular values come of the images themselves.
    """
    done = gram.shape[0]
    last = (cross[done:] + cross[done:].mT) / 2
    top = torch.cat([gram, cross[:done]], dim=1)
    return torch.cat([top, torch.cat([cross[:done].mT, last], dim=1)], dim=0)


def _leading_energy(values: Tensor, rank: int, energy_share: float | None, total: float) -> float:
    """Energy of the leading directions that will be kept, the number that has to settle."""
    if energy_share is None:
        return float(values[:rank].clamp_min(0).sum())
    # With a share, the count shrinks as the values settle; the leading half tells when they have.
    count = max(1, int((values.cumsum(0) < energy_share * total).sum()) // 2)
    return float(values[:count].sum()) / count


def _missing(captured: list[float]) -> float:
    """Estimate of the energy that further blocks would add, from that after each block so far.

    Each block gains a smaller share of what is missing than a geometric series of the last two gains,
    because Krylov iteration converges faster and faster.
    """
    if len(captured) < 3:
        return math.inf
    first, second, third = captured[-3:]
    before, gain = second - first, third - second
    if gain >= before:
        return math.inf if gain > 0 else 0.0
    return max(gain, 0.0) ** 2 / (before - gain)


def _rayleigh_ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of T restricted to a float64 basis, from images = T basis."""
    Q, R = torch.linalg.qr(images)
    left, S, right = torch.linalg.svd(R)
    rotated = basis @ right.mT
    # The basis was orthonormal in float32 only. QR may flip a column; undo that.
    V, R = torch.linalg.qr(rotated)
    return Q @ left, S, V * torch.sign(R.diagonal())


def _dense(T: Tensor | Difference, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from all of T^T T: in float64 it resolves every singular value above float32 noise, in a
    fraction of the time of a decomposition of T."""
    exact = T.double()
    leading = torch.linalg.eigh(exact.mT @ exact)[1].flip(1)[:, :columns]
    return _rayleigh_ritz(leading, exact @ leading)


def _orthonormal_against(new: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns spanning `new` minus the span of `basis`; twice is enough."""
    for _ in range(2):
        new = new - basis @ (basis.mT @ new)
        new = torch.linalg.qr(new)[0]
    return new


def _count(S: Tensor, rank: int, energy_share: float | None, total: float, size: int) -> int:
    noise = size * torch.finfo(torch.float32).eps * float(S[0])
    above = int((S.gt(noise)).sum())
    if energy_share is None:
        return min(rank, above)
    share = S.square().cumsum(0) / total
    return min(int((share < energy_share).sum()) + 1, above)


def _fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each left vector is positive: a sign that does not depend on the machine."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs
