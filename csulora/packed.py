"""The Triton path: updates of many adapters that share a subspace, corrected in three launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import csulora_kernels
from csulora.errors import CsuloraError
from csulora.reference import Cores
from csulora.settings import Correction
from csulora.subspace import SafetySubspace

MAX_RANK = csulora_kernels.MAX_RANK
# Squares below this may be what is left of a sum that float32 cannot hold.
SMALLEST_SQUARE = 1e-30


class Update(NamedTuple):
    """One module of one adapter."""

    name: str  # as the adapter calls it, for errors
    target: str  # as the subspace calls it
    transposed: bool  # U and V of the subspace change places
    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)


class Corrected(NamedTuple):
    """The new factors of one module, on the CPU; None where the strengths keep everything."""

    B: Tensor | None  # (d_out, r')
    A: Tensor | None  # (r', d_in)
    cores: Cores  # energies and change alone, each with a leading dimension of 1


def correct_updates(
    batch: Sequence[Sequence[Update]],
    subspace: SafetySubspace,
    correction: Correction,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Corrected] | CsuloraError]:
    """The corrected updates of each adapter, in order, or in their place the error that stopped them.

    Computes from and to factors of `dtype` (float32 or bfloat16), to which all are converted. Ranks to
    128.
    """
    pairs = [[(u.B.to(dtype), u.A.to(dtype)) for u in updates] for updates in batch]
    results = _run(batch, pairs, subspace, correction, device)
    small = [i for i, result in enumerate(results) if result is None]
    if small:
        # float32 holds factors of 1e-30, but not their squares: once more, with even magnitudes.
        evened = [[_even(u.B, u.A) for u in batch[i]] for i in small]
        again = _run(
            [batch[i] for i in small],
            [[(B, A) for B, A, _ in row] for row in evened],
            subspace,
            correction,
            device,
            all_sizes=True,
        )
        for i, result, row in zip(small, again, evened, strict=True):
            if isinstance(result, list):
                exponents = [exponent for _, _, exponent in row]
                result = [_scaled(*one) for one in zip(result, exponents, strict=True)]
            results[i] = result
    return [result for result in results if result is not None]


def _run(
    batch: Sequence[Sequence[Update]],
    pairs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    subspace: SafetySubspace,
    correction: Correction,
    device: torch.device,
    all_sizes: bool = False,
) -> list[list[Corrected] | CsuloraError | None]:
    """As `correct_updates`, but None where squares may have vanished, unless all sizes will do."""
    keys = [[u.target + (".T" if u.transposed else "") for u in updates] for updates in batch]
    wanted = {
        key: (u.target, u.transposed)
        for row, updates in zip(keys, batch, strict=True)
        for key, u in zip(row, updates, strict=True)
    }
    basis = _whole_basis(subspace, device).take(wanted)
    table = csulora_kernels.pack(
        [dict(zip(row, pair, strict=True)) for row, pair in zip(keys, pairs, strict=True)], basis
    )
    workspace = csulora_kernels.workspace(table, basis, correction)
    projection = csulora_kernels.project(table, basis, workspace=workspace)
    cores = csulora_kernels.solve(projection, correction, workspace=workspace)
    out = None
    if not correction.is_identity:
        out = csulora_kernels.recompose(table, basis, projection, cores, workspace=workspace)
        out = out.to("cpu")
    sound, held = (X.cpu() for X in _sizes(projection, table))
    figures = [getattr(cores, name).cpu() for name in Cores._fields[4:]]
    place = {key: m for m, key in enumerate(wanted)}
    results: list[list[Corrected] | CsuloraError | None] = []
    for i, (row, updates) in enumerate(zip(keys, batch, strict=True)):
        columns = [place[key] for key in row]
        bad = [u.name for u, m in zip(updates, columns, strict=True) if not sound[i, m]]
        if bad:
            results.append(
                CsuloraError(f"{bad[0]}: NaN, or factors whose squares overflow float32")
            )
        elif not all_sizes and not bool(held[i, columns].all()):
            results.append(None)
        else:
            results.append([_corrected(out, figures, i, m) for m in columns])
    return results


def _corrected(
    out: csulora_kernels.Table | None, figures: Sequence[Tensor], i: int, m: int
) -> Corrected:
    nothing = torch.empty(0)  # the cores proper have done their work
    cores = Cores(None, None, nothing, nothing, *(X[i, m : m + 1] for X in figures))
    if out is None:
        return Corrected(None, None, cores)
    return Corrected(out.B(i, m), out.A(i, m), cores)


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
    ranks = table.entries[:, :, 0, None]
    R = projection.G_B.shape[-1]
    inside = torch.arange(R, device=ranks.device) < ranks
    squares = torch.stack([G.diagonal(dim1=-2, dim2=-1) for G in (projection.G_B, projection.G_A)])
    held = ((squares > SMALLEST_SQUARE) | ~inside).all(-1).all(0)
    return torch.isfinite(squares).all(-1).all(0), held


def _even(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, int]:
    """B', A' in float32 with largest entries near 1, and e such that B A = 2^e B' A', exactly.

    Column by column, by powers of two: what a small column of B has less, its row of A has more.
    """
    B, A = B.double(), A.double()
    left, right = _exponent(B.abs().amax(0)), _exponent(A.abs().amax(1))
    used = (B != 0).any(0) & (A != 0).any(1)
    largest = (left + right)[used].max() if bool(used.any()) else left.new_zeros(())
    shift = torch.where(used, left - largest, -right)
    return (B * torch.exp2(-left)).float(), (A * torch.exp2(shift)[:, None]).float(), int(largest)


def _exponent(X: Tensor) -> Tensor:
    """Of the power of two below each entry; 0 for 0."""
    return torch.where(X > 0, X, torch.ones_like(X)).log2().floor()


def _scaled(one: Corrected, exponent: int) -> Corrected:
    """Undo `_even`: half of the power in each factor, so that both stay in range."""
    half = exponent // 2
    cores = one.cores._replace(energy=one.cores.energy * 2.0 ** (2 * exponent))
    if one.B is None or one.A is None:
        return Corrected(None, None, cores)
    return Corrected(one.B * 2.0**half, one.A * 2.0 ** (exponent - half), cores)
