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
# Nor before the last block gained less than this: where more directions are alike than a block has, the
# gains pause before they rise again.
LAST_GAIN = 2e-3
# A gain below this share of the largest energy is rounding.
SETTLED = 1e-7
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
    Directions whose singular value is rounding noise (below max(m, n)^(1/2) eps S_0) are dropped: of a
    matrix of lower rank, fewer come back.
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
    seen: list[Tensor] = []
    while True:
        new = _orthonormal_against(new, basis)
        images.append(T @ new)
        basis = torch.cat([basis, new], dim=1)
        new = T.mT @ images[-1]
        gram = _grown(gram, (basis.mT @ new).double())
        seen.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))
        wanted = _wanted(seen[-1], rank, energy_share, total)
        if _missing(seen, wanted) <= MISSING * float(seen[-1][:wanted].sum()):
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


def _wanted(energies: Tensor, rank: int, energy_share: float | None, total: float) -> int:
    """How many of the leading directions will be kept, as far as their energies are known by now."""
    if energy_share is None:
        return rank
    return int((energies.cumsum(0) / total < energy_share).sum()) + 1


def _missing(seen: list[Tensor], wanted: int) -> float:
    """Estimate of the energy that further blocks would add to the leading directions.

    seen: energies of all directions after each block so far. Each direction gains a smaller share of what
    it misses than a geometric series of its last two gains, because Krylov iteration converges faster
    and faster. They are looked at one by one: strong ones that settle hide that others have not.
    """
    if len(seen) < 3 or wanted > len(seen[-3]):
        return math.inf
    first, second, third = (energies[:wanted] for energies in seen[-3:])
    before, gain = second - first, third - second
    settled = gain <= SETTLED * third[0]
    if bool((gain >= before)[~settled].any()) or gain.sum() > LAST_GAIN * third.sum():
        return math.inf
    return float((gain.square() / (before - gain))[~settled].sum())


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
    noise = size**0.5 * torch.finfo(torch.float32).eps * float(S[0])
    above = int((S.gt(noise)).sum())
    return min(_wanted(S.square(), rank, energy_share, total), above)


def _fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each left vector is positive: a sign that does not depend on the machine."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs
