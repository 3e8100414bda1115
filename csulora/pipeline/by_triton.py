"""The Triton backend: the modules of many adapters that share a subspace, solved in three launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import csulora_kernels as kernels
from csulora.errors import CsuloraError
from csulora.method.precision import (
    Amplification,
    amplification,
    shift_amplification,
    squares_fit_float32,
)
from csulora.method.realign import Shift, Spectrum
from csulora.method.stages import Cores, Figures, Grams, Projection
from csulora.pipeline import by_torch
from csulora.pipeline.plan import Member, Plan
from csulora.pipeline.solved import Gathered, Pair, Solved, overflow
from csulora.settings import Method, Realignment
from csulora.subspace import SafetySubspace

Members = dict[int, Member]  # of one plan, by their position in it


def solve(plans: Sequence[Plan], device: torch.device) -> Iterator[Solved | CsuloraError]:
    """The solution of each plan, in order, or in its place the error that stopped it.

    All plans are of one subspace. Modules of one working type and correction go together. What the
    kernels do not take, adapters with ranks above 128 and such without modules, PyTorch solves.
    """
    launches: dict[tuple[torch.dtype, Method], dict[int, Members]] = {}
    for p, plan in enumerate(plans):
        if _widest(plan) <= kernels.MAX_RANK:
            dtype = _working_type(plan)
            for i, member in enumerate(plan.members):
                rows = launches.setdefault((dtype, member.correction), {})
                rows.setdefault(p, {})[i] = member
    parts: dict[int, list[_Part]] = {}
    for (dtype, correction), rows in launches.items():
        found = _launch(list(rows.values()), plans[0].subspace, correction, dtype, device)
        for p, part in zip(rows, found, strict=True):
            parts.setdefault(p, []).append(part)
    for p, plan in enumerate(plans):
        yield _joined(plan, parts.pop(p)) if p in parts else _by_torch(plan, device)


class _Part(NamedTuple):
    """What one launch found about m members of one plan; everything on the CPU."""

    members: Members
    columns: list[int]  # of the members in the table
    row: int  # of the plan in the table
    out: kernels.Table | None  # None: the strengths keep all
    finite: Tensor  # (m) bool
    squares_fit: Tensor  # (m) bool
    figures: Figures
    amplified: Amplification


def _launch(
    rows: Sequence[Members],
    subspace: SafetySubspace,
    correction: Method,
    dtype: torch.dtype,
    device: torch.device,
) -> list[_Part]:
    """Project, solve and recompose members of several plans, one row of a table each.

    Computes from and to factors of `dtype` (float32 or bfloat16), to which all are converted.
    """
    wanted = {_key(m): (m.target, m.transposed) for members in rows for m in members.values()}
    basis = _whole_basis(subspace, device).take(wanted)
    factors = [
        {_key(m): (m.module.B.to(dtype), m.module.A.to(dtype)) for m in members.values()}
        for members in rows
    ]
    table = kernels.pack(factors, basis)
    workspace = kernels.workspace(table, basis, correction)
    projection = kernels.project(table, basis, workspace=workspace)
    spectrum = None
    if isinstance(correction, Realignment):
        spectrum = _spectrum(rows, list(wanted), workspace.tiles.K, device)
    cores = kernels.solve(projection, correction, spectrum, workspace=workspace)
    out = None
    if not correction.is_identity:
        out = kernels.recompose(table, basis, projection, cores, workspace=workspace).to("cpu")
    finite, squares_fit = (X.cpu() for X in _sizes(projection, table))
    amplified = Amplification(
        *(X.cpu() for X in _amplification(projection, cores, table, spectrum, correction))
    )
    figures = Figures(*(X.cpu() for X in _figures(cores)))
    index = {key: column for column, key in enumerate(wanted)}
    parts = []
    for row, members in enumerate(rows):
        columns = [index[_key(member)] for member in members.values()]
        parts.append(
            _Part(
                members,
                columns,
                row,
                out,
                finite[row, columns],
                squares_fit[row, columns],
                Figures(*(X[row, columns] for X in figures)),
                Amplification(*(X[row, columns] for X in amplified)),
            )
        )
    return parts


def _joined(plan: Plan, parts: list[_Part]) -> Solved | CsuloraError:
    """The solution of a plan from all launches that had some of its members."""
    known = Gathered.of(len(plan.members))
    source: dict[int, tuple[_Part, int]] = {}
    for part in parts:
        positions = list(part.members)
        bad = [plan.members[i].name for i, ok in zip(positions, part.finite, strict=True) if not ok]
        if bad:
            return overflow(bad[0])
        known.put(positions, part.figures, part.amplified, part.squares_fit)
        source |= {i: (part, column) for i, column in zip(positions, part.columns, strict=True)}

    def factors(i: int, into: Pair | None) -> Pair:
        part, column = source[i]
        assert part.out is not None  # finish asks for nothing that the strengths keep
        A = part.out.A(part.row, column)
        if part.out.kept is not None:  # B is as it was, and in its own type
            return plan.members[i].module.B, A
        return part.out.B(part.row, column), A

    return Solved(known.figures, known.needs_float64([plan]), factors, range(len(plan.members)))


def _by_torch(plan: Plan, device: torch.device) -> Solved | CsuloraError:
    (solved,) = by_torch.solve([plan], device)
    if isinstance(solved, CsuloraError) or not plan.members:
        return solved
    note = f"rank {_widest(plan)} is above {kernels.MAX_RANK}: corrected by torch, not Triton"
    return solved._replace(notes=(note,))


def _widest(plan: Plan) -> int:
    return max((member.module.rank for member in plan.members), default=0)


def _key(member: Member) -> str:
    """The name of a module in the table and its part of the basis."""
    return member.target + (".T" if member.transposed else "")


def _working_type(plan: Plan) -> torch.dtype:
    """Of the factors that kernels read and write: bfloat16 only where nothing is done to it later.

    float16 goes through float32, as its few exponents have to be evened out before rounding.
    """
    found = {X.dtype for member in plan.members for X in (member.module.B, member.module.A)}
    plain = not plan.portable and plan.dtype in (None, torch.bfloat16)
    return torch.bfloat16 if plain and found == {torch.bfloat16} else torch.float32


def _whole_basis(subspace: SafetySubspace, device: torch.device) -> kernels.Basis:
    """The subspace in the kernels' layout; made once a device and kept with the subspace."""
    kept = subspace.packed.get(device)
    if kept is None:
        bases = {name: (module.U, module.V) for name, module in subspace.modules.items()}
        kept = subspace.packed[device] = kernels.pack_basis(bases, device)
    return kept


def _spectrum(
    rows: Sequence[Members], keys: list[str], K: int, device: torch.device
) -> kernels.Spectrum:
    """S and edge of each module, scaling of each module of each adapter; 0 where it has none."""
    S = torch.zeros(len(keys), K, dtype=torch.float64)
    edge = torch.zeros(len(keys), dtype=torch.float64)
    scaling = torch.zeros(len(rows), len(keys), dtype=torch.float64)
    index = {key: m for m, key in enumerate(keys)}
    for i, members in enumerate(rows):
        for member in members.values():
            m, known = index[_key(member)], member.spectrum
            S[m, : len(known.S)], edge[m], scaling[i, m] = known
    return kernels.Spectrum(S.to(device), edge.to(device), scaling.to(device))


def _figures(cores: kernels.Cores | kernels.Shift) -> Figures:
    return Figures(cores.energy, cores.before, cores.after, cores.relative_change, cores.rank_error)


def _sizes(projection: kernels.Projection, table: kernels.Table) -> tuple[Tensor, Tensor]:
    """(N, M) each: whether all squares are finite, and large enough to be whole sums."""
    squares = torch.stack([G.diagonal(dim1=-2, dim2=-1) for G in (projection.G_B, projection.G_A)])
    # Padding is zero, and no square that has to be held.
    squares_fit = squares_fit_float32(torch.where(_used(projection, table), squares, torch.inf))
    return torch.isfinite(squares).all(-1).all(0), squares_fit.all(0)


def _amplification(
    projection: kernels.Projection,
    cores: kernels.Cores | kernels.Shift,
    table: kernels.Table,
    spectrum: kernels.Spectrum | None,
    correction: Method,
) -> Amplification:
    """(N, M) each. Padding is no part of any Gram matrix, so it adds nothing."""
    P, Q, G_B, G_A = (_finite(X) for X in projection)
    if isinstance(cores, kernels.Shift):
        assert spectrum is not None and isinstance(correction, Realignment)
        c = None if cores.c is None else _finite(cores.c)
        shift = Shift(_finite(cores.Z).mT, c, cores.inverse_diagonal)
        energy = cores.energy * cores.after.sum(-1)
        return shift_amplification(
            Projection(P, Q, G_B, G_A), Spectrum(*spectrum), correction, shift, energy
        )
    inside = torch.stack([P.mT @ P, Q @ Q.mT])
    outside = torch.stack([G_B, G_A]) - inside
    X_in, X_out = (None if X is None else _finite(X) for X in (cores.X_in, cores.X_out))
    own = Cores(X_in, X_out, _finite(cores.Y_in), _finite(cores.Y_out))
    grams = Grams(*torch.stack([inside, outside], dim=1))
    return amplification(grams, own, _used(projection, table))


def _finite(X: Tensor) -> Tensor:
    """In float64, and without NaN: an adapter that has some is an error already."""
    return X.double().nan_to_num()


def _used(projection: kernels.Projection, table: kernels.Table) -> Tensor:
    """(N, M, R): which columns are not padding."""
    ranks = table.entries[:, :, 0, None]
    return torch.arange(projection.G_B.shape[-1], device=ranks.device) < ranks
