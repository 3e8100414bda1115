"""The Triton path: updates of many adapters that share a subspace, corrected in three launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import csulora_kernels
from csulora.careful import SMALLEST_SQUARE, overflow
from csulora.errors import CsuloraError
from csulora.reference import FIGURES, Amplification, Cores, amplification
from csulora.settings import Correction
from csulora.subspace import SafetySubspace

MAX_RANK = csulora_kernels.MAX_RANK


class Update(NamedTuple):
    """One module of one adapter."""

    name: str  # as the adapter calls it, for errors
    target: str  # as the subspace calls it
    transposed: bool  # U and V of the subspace change places
    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)


class Corrected(NamedTuple):
    """The new factors of an adapter's modules, on the CPU, and what is known about each of n modules."""

    factors: (
        list[tuple[Tensor, Tensor]] | None
    )  # (d_out, r'), (r', d_in); None: the strengths keep all
    cores: Cores  # energies and change alone, (n) and (n, 4)
    held: Tensor  # (n) whether float32 holds the squares of the factors
    amplification: Amplification  # (n)


def correct_updates(
    batch: Sequence[Sequence[Update]],
    subspace: SafetySubspace,
    correction: Correction,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Corrected | CsuloraError]:
    """The corrected updates of each adapter, in order, or in its place the error that stopped it.

    Computes from and to factors of `dtype` (float32 or bfloat16), to which all are converted. Ranks to
    128.
    """
    keys = [[u.target + (".T" if u.transposed else "") for u in updates] for updates in batch]
    wanted = {
        key: (u.target, u.transposed)
        for row, updates in zip(keys, batch, strict=True)
        for key, u in zip(row, updates, strict=True)
    }
    basis = _whole_basis(subspace, device).take(wanted)
    factors = [
        {key: (u.B.to(dtype), u.A.to(dtype)) for key, u in zip(row, updates, strict=True)}
        for row, updates in zip(keys, batch, strict=True)
    ]
    table = csulora_kernels.pack(factors, basis)
    workspace = csulora_kernels.workspace(table, basis, correction)
    projection = csulora_kernels.project(table, basis, workspace=workspace)
    cores = csulora_kernels.solve(projection, correction, workspace=workspace)
    out = None
    if not correction.is_identity:
        out = csulora_kernels.recompose(table, basis, projection, cores, workspace=workspace)
        out = out.to("cpu")
    finite, held = (X.cpu() for X in _sizes(projection, table))
    amplification = Amplification(*(X.cpu() for X in _amplification(projection, cores, table)))
    figures = {name: getattr(cores, name).cpu() for name in FIGURES}
    place = {key: m for m, key in enumerate(wanted)}
    results: list[Corrected | CsuloraError] = []
    for i, (row, updates) in enumerate(zip(keys, batch, strict=True)):
        columns = [place[key] for key in row]
        bad = [u.name for u, m in zip(updates, columns, strict=True) if not finite[i, m]]
        if bad:
            results.append(overflow(bad[0]))
            continue
        nothing = torch.empty(0)  # the cores proper have done their work
        own = {name: X[i, columns] for name, X in figures.items()}
        results.append(
            Corrected(
                None if out is None else [(out.B(i, m), out.A(i, m)) for m in columns],
                Cores(None, None, nothing, nothing, **own),
                held[i, columns],
                Amplification(*(X[i, columns] for X in amplification)),
            )
        )
    return results


def _whole_basis(subspace: SafetySubspace, device: torch.device) -> csulora_kernels.Basis:
    """The subspace in the kernels' layout; made once a device and kept with the subspace."""
    kept = subspace.packed.get(device)
    if kept is None:
        bases = {name: (module.U, module.V) for name, module in subspace.modules.items()}
        kept = subspace.packed[device] = csulora_kernels.pack_basis(bases, device)
    return kept


def _sizes(
    projection: csulora_kernels.Projection, table: csulora_kernels.Table
) -> tuple[Tensor, Tensor]:
    """(N, M) each: whether all squares are finite, and large enough to be whole sums."""
    squares = torch.stack([G.diagonal(dim1=-2, dim2=-1) for G in (projection.G_B, projection.G_A)])
    held = ((squares > SMALLEST_SQUARE) | ~_used(projection, table)).all(-1).all(0)
    return torch.isfinite(squares).all(-1).all(0), held


def _amplification(
    projection: csulora_kernels.Projection,
    cores: csulora_kernels.Cores,
    table: csulora_kernels.Table,
) -> Amplification:
    """(N, M) each. Padding is no part of any Gram matrix, so it adds nothing."""
    P, Q, G_B, G_A = (_finite(X) for X in projection)
    inside = torch.stack([P.mT @ P, Q @ Q.mT])
    outside = torch.stack([G_B, G_A]) - inside
    split = torch.stack([inside, outside], dim=1)
    X_in, X_out = (None if X is None else _finite(X) for X in (cores.X_in, cores.X_out))
    figures = {name: getattr(cores, name) for name in FIGURES}
    own = Cores(X_in, X_out, _finite(cores.Y_in), _finite(cores.Y_out), **figures)
    return amplification(split[0], split[1], own, _used(projection, table))


def _finite(X: Tensor) -> Tensor:
    """In float64, and without NaN: an adapter that has some is an error already."""
    return X.double().nan_to_num()


def _used(projection: csulora_kernels.Projection, table: csulora_kernels.Table) -> Tensor:
    """(N, M, R): which columns are not padding."""
    ranks = table.entries[:, :, 0, None]
    return torch.arange(projection.G_B.shape[-1], device=ranks.device) < ranks
