"""The Triton backend: the modules of many adapters that share a subspace, solved in three launches.

What is solved together is a matter of timing, so no bit of a result may depend on it. Adapters share a
table only where each would run the same compiled kernels alone (`_Variant`), the tiles are `steady`, and
what follows the launches in PyTorch, whose batched products may differ with the size of a batch, takes
one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
from csulora.settings import Correction, Method, Realignment
from csulora.subspace import SafetySubspace

Members = dict[int, Member]  # of one plan, by their position in it

# Elements of the longest vector that kernels load: 16 bytes of two each.
VECTOR = 8


class _Variant(NamedTuple):
    """What decides which kernels run, and all that they are compiled for."""

    dtype: torch.dtype
    correction: Method
    R: int
    K: int
    vectors: tuple[int, ...]  # what divides all ranks, those of the results and the sides

    @classmethod
    def of(cls, members: Iterable[Member], dtype: torch.dtype, correction: Method) -> _Variant:
        """That of the members of one plan which have this correction."""
        ranks, new_ranks, directions, sides = zip(
            *((m.module.rank, m.rank, m.U.shape[1], math.gcd(len(m.U), len(m.V))) for m in members),
            strict=True,
        )
        return cls(
            dtype,
            correction,
            kernels.padded_rank(max(ranks)),
            kernels.padded_directions(max(directions)),
            tuple(math.gcd(VECTOR, *sizes) for sizes in (ranks, new_ranks, sides)),
        )


def solve(plans: Sequence[Plan], device: torch.device) -> Iterator[Solved | CsuloraError]:
    """The solution of each plan, in order, or in its place the error that stopped it.

    All plans are of one subspace. Modules of one variant go together. What the kernels do not take,
    adapters with ranks above 128 and such without modules, PyTorch solves.
    """
    launches: dict[_Variant, dict[int, Members]] = {}
    for p, plan in enumerate(plans):
        if _widest(plan) <= kernels.MAX_RANK:
            for variant, members in _variants(plan):
                launches.setdefault(variant, {})[p] = members
    parts: dict[int, list[_Part]] = {}
    for variant, rows in launches.items():
        found = _launch(list(rows.values()), plans[0].subspace, variant, device)
        for p, part in zip(rows, found, strict=True):
            parts.setdefault(p, []).append(part)
    for p, plan in enumerate(plans):
        yield _joined(plan, parts.pop(p)) if p in parts else _by_torch(plan, device)


def _variants(plan: Plan) -> Iterator[tuple[_Variant, Members]]:
    """A plan's members by their correction, nearly always one for all."""
    groups: dict[Method, Members] = {}
    for i, member in enumerate(plan.members):
        groups.setdefault(member.correction, {})[i] = member
    dtype = _working_type(plan)
    for correction, members in groups.items():
        yield _Variant.of(members.values(), dtype, correction), members


class _Part(NamedTuple):
    """What one launch found about m members of one plan."""

    members: Members
    columns: list[int]  # of the members in the table
    row: int  # of the plan in the table
    out: kernels.Table | None  # on the CPU; None: the strengths keep all
    finite: Tensor  # (m) bool
    squares_fit: Tensor  # (m) bool
    figures: Figures
    amplified: Amplification


def _launch(
    rows: Sequence[Members], subspace: SafetySubspace, variant: _Variant, device: torch.device
) -> list[_Part]:
    """Project, solve and recompose members of several plans, one row of a table each.

    Computes from and to factors of the variant's type (float32 or bfloat16), to which all are converted.
    """
    dtype, correction = variant.dtype, variant.correction
    wanted = {_key(m): (m.target, m.transposed) for members in rows for m in members.values()}
    basis = _whole_basis(subspace, device).take(wanted)
    factors = [
        {_key(m): (m.module.B.to(dtype), m.module.A.to(dtype)) for m in members.values()}
        for members in rows
    ]
    table = kernels.pack(factors, basis)
    workspace = kernels.workspace(table, basis, correction, steady=True)
    projection = kernels.project(table, basis, workspace=workspace)
    spectrum = None
    if isinstance(correction, Realignment):
        spectrum = _spectrum(rows, list(wanted), workspace.tiles.K, device)
    cores = kernels.solve(projection, correction, spectrum, workspace=workspace)
    out = None
    if not correction.is_identity:
        out = kernels.recompose(table, basis, projection, cores, workspace=workspace).to("cpu")
    found = _Found(projection, cores, table.entries[:, :, 0], spectrum)
    index = {key: column for column, key in enumerate(wanted)}
    parts = []
    for row, members in enumerate(rows):
        columns = [index[_key(member)] for member in members.values()]
        own = found.of(row, columns)
        figures = _figures(own.cores)
        known = *_sizes(own), figures, _amplification(own, figures, correction)
        parts.append(_Part(members, columns, row, out, *known))
    return parts


class _Found(NamedTuple):
    """What the launches found about N adapters and M modules, or about m members of one plan."""

    projection: kernels.Projection  # (N, M, ...) or (m, ...)
    cores: kernels.Cores | kernels.Shift  # the same
    ranks: Tensor  # (N, M) or (m)
    spectrum: kernels.Spectrum | None  # S (M, K), edge (M), scaling (N, M); or (m, K), (m), (m)

    def of(self, row: int, columns: list[int]) -> _Found:
        """What concerns the members of one plan, in tensors of their own."""
        at = torch.tensor(columns, device=self.ranks.device)
        spectrum = self.spectrum
        if spectrum is not None:
            S, edge, scaling = spectrum
            spectrum = kernels.Spectrum(S[at], edge[at], scaling[row, at])
        return _Found(
            kernels.Projection(*(X[row, at] for X in self.projection)),
            type(self.cores)._make(None if X is None else X[row, at] for X in self.cores),
            self.ranks[row, at],
            spectrum,
        )

    @property
    def used(self) -> Tensor:
        """(..., R), which columns are not padding."""
        R = self.projection.G_B.shape[-1]
        return torch.arange(R, device=self.ranks.device) < self.ranks[..., None]


def _joined(plan: Plan, parts: list[_Part]) -> Solved | CsuloraError:
    """The solution of a plan from all launches that had some of its members."""
    wrong = [
        i
        for part in parts
        for i, ok in zip(part.members, part.finite.tolist(), strict=True)
        if not ok
    ]
    if wrong:
        return overflow(plan.members[min(wrong)].name)
    known = Gathered.of(len(plan.members))
    source: dict[int, tuple[_Part, int]] = {}
    for part in parts:
        positions = list(part.members)
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


def _sizes(own: _Found) -> tuple[Tensor, Tensor]:
    """(m) each: whether all squares are finite, and large enough to be whole sums."""
    _, _, G_B, G_A = own.projection
    squares = torch.stack([G.diagonal(dim1=-2, dim2=-1) for G in (G_B, G_A)])
    # Padding is zero, and no square that has to be held.
    squares_fit = squares_fit_float32(torch.where(own.used, squares, torch.inf))
    return torch.isfinite(squares).all(-1).all(0), squares_fit.all(0)


def _amplification(own: _Found, figures: Figures, correction: Method) -> Amplification:
    """(m) each. Padding is no part of any Gram matrix, so it adds nothing."""
    P, Q, G_B, G_A = (_finite(X) for X in own.projection)
    cores = own.cores
    if isinstance(cores, kernels.Shift):
        assert own.spectrum is not None and isinstance(correction, Realignment)
        c = None if cores.c is None else _finite(cores.c)
        shift = Shift(_finite(cores.Z).mT, c, cores.inverse_diagonal)
        energy = cores.energy * cores.after.sum(-1)
        return shift_amplification(
            Projection(P, Q, G_B, G_A), Spectrum(*own.spectrum), correction, shift, energy
        )
    inside = torch.stack([P.mT @ P, Q @ Q.mT])
    outside = torch.stack([G_B, G_A]) - inside
    X_in, X_out = (None if X is None else _finite(X) for X in (cores.X_in, cores.X_out))
    solved = Cores(X_in, X_out, _finite(cores.Y_in), _finite(cores.Y_out))
    grams = Grams(*torch.stack([inside, outside], dim=1))
    assert isinstance(correction, Correction)
    return amplification(grams, solved, figures, correction, own.used)


def _finite(X: Tensor) -> Tensor:
    """In float64, and without NaN: an adapter that has some is an error already."""
    return X.double().nan_to_num()
