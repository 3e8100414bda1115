"""The PyTorch backend: modules of equal ranks are solved together, those of small adapters at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate, pairwise
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
from csulora.method.stages import Cores, Figures, Projection, project, split_wide, wide_side
from csulora.pipeline.memory import allocate
from csulora.pipeline.plan import Member, Plan
from csulora.pipeline.solved import Gathered, Pair, Solved, overflow
from csulora.settings import Correction, Method

# Adapters of as many bytes together are solved as one: what small ones cost is the calls, not the
# arithmetic. Larger ones gain nothing, and their modules are best used one by one, while in the cache.
TOGETHER = 1 << 20
# Matrices of multiples of so many numbers begin at whole cache lines wherever they stand in a stack. The
# last bits of a product may depend on where a matrix begins, but no result on what came together with it.
LINE = 16


class Block(NamedTuple):
    """The members of one module: that of a large adapter, or those of g small ones.

    Tensors of a large adapter have no leading dimension, those of small ones have it even for one.
    """

    positions: list[int]  # among all members
    B: Tensor  # (g, d_out, r) float32, on the device, converted once for both passes over it
    A: Tensor  # (g, r, d_in)
    U: Tensor  # (g, d_out, k)
    V: Tensor  # (g, d_in, k)
    # In the wide factor's place stands what becomes of it, in the memory and type for the result.
    split: bool = False

    @property
    def wide(self) -> int:
        """Of its factors, see `stages.wide_side`."""
        return wide_side(self.B, self.A)

    def project(self) -> Projection:
        return project(self.B, self.A, self.U, self.V)

    def with_parts_in(self, memory: Pair, projection: Projection) -> Block:
        """The block after the parts of its wide factor were written, while all is in the cache."""
        positions, B, A, U, V, _ = self
        into = memory[self.wide]
        parts = into if into.dtype == U.dtype else torch.empty_like(into, dtype=U.dtype)
        # Row by row, as it will lie in the stack: the last bits of a product depend on it.
        projection = projection._replace(P=projection.P.contiguous())
        split_wide(B, A, U, V, projection, parts)
        if parts is not into:
            into.copy_(parts)
        return Block(positions, *((into, A) if self.wide == 0 else (B, into)), U, V, split=True)


class Stack(NamedTuple):
    """Members of one rank and one subspace rank, projected, in the order of their blocks."""

    blocks: list[Block]
    projection: Projection  # (n, ...)
    squares_fit: Tensor  # (n) bool, whether float32 holds the squares of the factors

    @property
    def positions(self) -> list[int]:
        return [i for block in self.blocks for i in block.positions]

    def spans(self) -> list[tuple[int, int]]:
        """The rows of each block, from and to."""
        return _spans(block.positions for block in self.blocks)

    def take(self, which: list[int]) -> Stack:
        """Some of the blocks."""
        spans = self.spans()
        rows = [row for b in which for row in range(*spans[b])]
        blocks = [self.blocks[b] for b in which]
        return Stack(blocks, self.projection.of(rows), self.squares_fit[rows])


class Part:
    """A block that has been solved."""

    def __init__(self, block: Block, projection: Projection, cores: Cores | Shift) -> None:
        self._block, self._projection, self._cores = block, projection, cores
        self.positions = block.positions
        self._made: Pair | None = None

    def factors(self, row: int, member: Member, into: Pair | None) -> Pair:
        """The new factors of one member; those of small adapters are made all at once, and kept."""
        if self._block.B.dim() == 2:
            return self._recompose(None if into is None else self._room(into))
        self._made = self._made or self._recompose(None)
        B, A = self._made
        # What stays as it is should be seen to.
        return member.module.B.to(B) if B is self._block.B else B[row], A[row]

    def _room(self, into: Pair) -> Pair:
        """The memory for the result where it holds one or can be computed in, else some like it."""
        U, split, wide = self._block.U, self._block.split, self._block.wide
        B, A = (
            X
            if (split and side == wide) or (X.dtype == U.dtype and X.device == U.device)
            else torch.empty_like(X, dtype=U.dtype, device=U.device)
            for side, X in enumerate(into)
        )
        return B, A

    def _recompose(self, out: Pair | None) -> Pair:
        _, B, A, U, V, split = self._block
        if isinstance(self._cores, Shift):
            return realign.recompose(B, A, U, V, self._cores, out)
        assert out is not None or not split  # what was written early is asked for from there
        return stages.recompose(B, A, U, V, self._projection, self._cores, out, split=split)


def solve(plans: Sequence[Plan], device: torch.device) -> Iterator[Solved | CsuloraError]:
    """The solution of each plan, one after the other, or in its place the error that stopped it.

    All plans are of one subspace.
    """
    for group in _groups(plans):
        try:
            solved = _solve_group(group, device)
        except CsuloraError as error:
            if len(group) > 1:  # one of them is at fault
                for plan in group:
                    yield from solve([plan], device)
                continue
            yield error
            continue
        yield from solved


def _groups(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """Plans in their order, as many at once as are to be solved together."""
    group: list[Plan] = []
    left = TOGETHER
    for plan in plans:
        size = _size(plan.members)
        if group and size > left:
            yield group
            group, left = [], TOGETHER
        group.append(plan)
        left -= size
    if group:
        yield group


def _size(members: Sequence[Member]) -> int:
    return sum(m.module.B.nbytes + m.module.A.nbytes for m in members)


def _solve_group(plans: Sequence[Plan], device: torch.device) -> list[Solved]:
    members = [plan.members for plan in plans]
    if len(plans) > 1 or _size(plans[0].members) <= TOGETHER or device.type != "cpu":
        return solve_stacks(plans, project_members(members, device))
    memory = allocate(plans[0])
    early = {i: memory[i] for i, member in enumerate(plans[0].members) if _splits(plans[0], member)}
    stacks = project_members(members, device, early)
    return [solved._replace(memory=memory) for solved in solve_stacks(plans, stacks)]


def _splits(plan: Plan, member: Member) -> bool:
    """Whether the wide factor of a member's result is its parts as they are, whatever the strengths."""
    correction = member.correction
    exact = isinstance(correction, Correction) and correction.form == "exact"
    return exact and not correction.is_identity and plan.only_rounds(member)


def project_members(
    adapters: Sequence[Sequence[Member]],
    device: torch.device,
    memory: Mapping[int, Pair] | None = None,
) -> list[Stack]:
    """The members of some adapters, in stacks; positions count all members, adapter by adapter.

    memory: for members of one large adapter, of whose result the wide factor is then written, as
    `stages.split_wide` has it.

    Raises CsuloraError for factors whose squares float32 cannot hold.
    """
    members = [member for own in adapters for member in own]
    owners = [a for a, own in enumerate(adapters) for _ in own]
    small = _size(members) <= TOGETHER
    stacks: dict[tuple[object, ...], dict[tuple[object, ...], list[int]]] = {}
    for i, (member, owner) in enumerate(zip(members, owners, strict=True)):
        shared = None if _in_line(member) else owner
        blocks = stacks.setdefault((member.module.rank, member.U.shape[1], shared), {})
        blocks.setdefault((member.target, member.transposed, member.correction), []).append(i)
    return [
        _stack(
            (_block(members, own, device, small) for own in blocks.values()), memory or {}, members
        )
        for blocks in stacks.values()
    ]


def solve_stacks(plans: Sequence[Plan], stacks: Sequence[Stack]) -> list[Solved]:
    """The solutions of plans from the projections of their members, which other strengths may share."""
    members = [member for plan in plans for member in plan.members]
    known = Gathered.of(len(members))
    place: dict[int, tuple[Part, int]] = {}
    for stack in stacks:
        for correction, own in _by_correction(members, stack):
            cores, figures, amplified = _solve(members, own, correction)
            known.put(own.positions, figures, amplified, own.squares_fit)
            for part in _parts(own, cores):
                place |= {i: (part, row) for row, i in enumerate(part.positions)}
    spans = _spans(plan.members for plan in plans)
    needed = known.needs_float64(plans)
    # The last of a stack first: its basis is the one that is still in the cache.
    order = [i for stack in stacks for i in reversed(stack.positions)]
    return [
        Solved(
            Figures(*(X[begin:end] for X in known.figures)),
            needed[begin:end],
            _factors(plan, begin, place),
            [i - begin for i in order if begin <= i < end],
        )
        for plan, (begin, end) in zip(plans, spans, strict=True)
    ]


def _factors(
    plan: Plan, begin: int, place: Mapping[int, tuple[Part, int]]
) -> Callable[[int, Pair | None], Pair]:
    """What a plan is handed as `Solved.factors`; its members are those from `begin` on."""

    def factors(i: int, into: Pair | None) -> Pair:
        part, row = place[begin + i]
        return part.factors(row, plan.members[i], into)

    return factors


def _solve(
    members: Sequence[Member], stack: Stack, correction: Method
) -> tuple[Cores | Shift, Figures, Amplification]:
    """What makes the result, its energies, and what float32 would do to it."""
    if isinstance(correction, Correction):
        return solve_with_amplification(stack.projection, correction)
    spectra = (members[i].spectrum for i in stack.positions)
    spectrum = Spectrum(
        *(torch.stack(X).to(stack.projection.P.device) for X in zip(*spectra, strict=True))
    )
    return realign_with_amplification(stack.projection, spectrum, correction)


def _parts(stack: Stack, cores: Cores | Shift) -> list[Part]:
    blocks, projection = stack.blocks, stack.projection
    if blocks[0].B.dim() == 2:
        own: Sequence[Cores | Shift] = cores.unbind()
        return list(map(Part, blocks, projection.unbind(), own))
    spans = [slice(*span) for span in stack.spans()]
    return [
        Part(b, projection.of(rows), cores.of(rows)) for b, rows in zip(blocks, spans, strict=True)
    ]


def _block(
    members: Sequence[Member], positions: list[int], device: torch.device, small: bool
) -> Block:
    group = [members[i] for i in positions]
    if small:
        # `stack` promotes where types differ, which loses nothing.
        B, A = (
            torch.stack(parts).to(device, torch.float32)
            for parts in ([m.module.B for m in group], [m.module.A for m in group])
        )
    else:
        B, A = (X.to(device, torch.float32) for X in (group[0].module.B, group[0].module.A))
    U, V = group[0].U.to(B), group[0].V.to(B)
    if small:
        U, V = (X.expand(len(group), *X.shape) for X in (U, V))
    return Block(positions, B, A, U, V)


def _stack(blocks: Iterable[Block], memory: Mapping[int, Pair], members: Sequence[Member]) -> Stack:
    rows: list[Projection] = []
    kept: list[Block] = []
    for block in blocks:
        rows.append(block.project())
        into = memory.get(block.positions[0])
        kept.append(block if into is None else block.with_parts_in(into, rows[-1]))
    join = torch.stack if kept[0].B.dim() == 2 else torch.cat
    projection = Projection(*(join(parts) for parts in zip(*rows, strict=True)))
    squares = torch.cat([G.diagonal(dim1=-2, dim2=-1) for G in projection[2:]], dim=-1)
    finite = torch.isfinite(squares).all(-1)
    stack = Stack(kept, projection, squares_fit_float32(squares))
    if not bool(finite.all()):
        raise overflow(members[stack.positions[int(finite.int().argmin())]].name)
    return stack


def _in_line(member: Member) -> bool:
    """Whether all its matrices are a whole number of cache lines, so that it may share a stack."""
    r, k = member.module.rank, member.U.shape[1]
    sizes = [r * size for size in (member.U.shape[0], member.V.shape[0], r, k)]
    return all(size % LINE == 0 for size in (*sizes, k * k))  # realignment sums over k x k


def _by_correction(members: Sequence[Member], stack: Stack) -> Iterator[tuple[Method, Stack]]:
    """The part of a stack that each correction is for; nearly always one, for all of it."""
    groups: dict[Method, list[int]] = {}
    for b, block in enumerate(stack.blocks):
        groups.setdefault(members[block.positions[0]].correction, []).append(b)
    for correction, which in groups.items():
        yield correction, stack if len(groups) == 1 else stack.take(which)


def _spans(parts: Iterable[Sized]) -> list[tuple[int, int]]:
    """Where each part of a whole begins and ends."""
    return list(pairwise([0, *accumulate(map(len, parts))]))
