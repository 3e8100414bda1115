"""The PyTorch backend: modules of equal ranks are solved together, and recomposed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.method import realign, stages
from csulora.method.precision import (
    Amplification,
    realign_with_amplification,
    solve_with_amplification,
    squares_fit_float32,
)
from csulora.method.realign import Shift, Spectrum
from csulora.method.stages import Cores, Figures, Projection, project
from csulora.pipeline.plan import Member, Plan
from csulora.pipeline.solved import Gathered, Pair, Solved, overflow
from csulora.settings import Correction, Method


class Stack(NamedTuple):
    """Members of one rank and one subspace rank, projected."""

    positions: list[int]  # of the n members in the plan
    factors: list[Pair]  # float32, on the device, converted once for both passes over them
    projection: Projection  # (n, ...)
    squares_fit: Tensor  # (n) bool, whether float32 holds the squares of the factors

    def take(self, rows: list[int]) -> Stack:
        """Some of them."""
        return Stack(
            [self.positions[row] for row in rows],
            [self.factors[row] for row in rows],
            Projection(*(X[rows] for X in self.projection)),
            self.squares_fit[rows],
        )


def solve(plans: Sequence[Plan], device: torch.device) -> Iterator[Solved | CsuloraError]:
    """The solution of each plan, one after the other, or in its place the error that stopped it."""
    for plan in plans:
        try:
            yield solve_stacks(plan, project_members(plan.members, device))
        except CsuloraError as error:
            yield error


def project_members(members: Sequence[Member], device: torch.device) -> list[Stack]:
    """All members in stacks. Raises CsuloraError for factors whose squares float32 cannot hold."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault((member.module.rank, member.U.shape[1]), []).append(i)
    return [_stack(members, positions, device) for positions in groups.values()]


def solve_stacks(plan: Plan, stacks: Sequence[Stack]) -> Solved:
    """The solution of a plan from the projections of its members, which other strengths may share."""
    known = Gathered.of(len(plan.members))
    ready: dict[int, tuple[Pair, Projection, Cores | Shift]] = {}
    for stack in stacks:
        for correction, part in _by_correction(plan, stack):
            cores, figures, amplified = _solve(plan, part, correction)
            known.put(part.positions, figures, amplified, part.squares_fit)
            own: Sequence[Cores | Shift] = cores.unbind()
            rows = zip(part.factors, part.projection.unbind(), own, strict=True)
            ready |= zip(part.positions, rows, strict=True)

    def factors(i: int, into: Pair | None) -> Pair:
        member, ((B, A), projection, cores) = plan.members[i], ready[i]
        there = into is not None and all(
            X.dtype == torch.float32 and X.device == B.device for X in into
        )
        U, V = member.U.to(B), member.V.to(B)
        if isinstance(cores, Shift):
            return realign.recompose(B, A, U, V, cores, into if there else None)
        return stages.recompose(B, A, U, V, projection, cores, into if there else None)

    # The last of a stack first: its basis is the one that is still in the cache.
    order = [i for stack in stacks for i in reversed(stack.positions)]
    return Solved(known.figures, known.needs_float64(plan), factors, order)


def _solve(
    plan: Plan, part: Stack, correction: Method
) -> tuple[Cores | Shift, Figures, Amplification]:
    """What makes the result, its energies, and what float32 would do to it."""
    if isinstance(correction, Correction):
        return solve_with_amplification(part.projection, correction)
    spectra = (plan.members[i].spectrum for i in part.positions)
    spectrum = Spectrum(
        *(torch.stack(X).to(part.projection.P.device) for X in zip(*spectra, strict=True))
    )
    return realign_with_amplification(part.projection, spectrum, correction)


def _stack(members: Sequence[Member], positions: list[int], device: torch.device) -> Stack:
    group = [members[i] for i in positions]
    factors = [
        (member.module.B.to(device, torch.float32), member.module.A.to(device, torch.float32))
        for member in group
    ]
    rows = [
        project(B, A, member.U.to(B), member.V.to(B))
        for member, (B, A) in zip(group, factors, strict=True)
    ]
    projection = Projection(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
    squares = torch.cat([G.diagonal(dim1=-2, dim2=-1) for G in projection[2:]], dim=-1)
    finite = torch.isfinite(squares).all(-1)
    if not bool(finite.all()):
        raise overflow(group[int(finite.int().argmin())].name)
    return Stack(positions, factors, projection, squares_fit_float32(squares))


def _by_correction(plan: Plan, stack: Stack) -> Iterator[tuple[Method, Stack]]:
    """The part of a stack that each correction is for; nearly always one, for all of it."""
    groups: dict[Method, list[int]] = {}
    for row, i in enumerate(stack.positions):
        groups.setdefault(plan.members[i].correction, []).append(row)
    for correction, rows in groups.items():
        yield correction, stack if len(groups) == 1 else stack.take(rows)
