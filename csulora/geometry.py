"""What an adapter's weights tell about its place relative to D, without a verdict on its safety."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from csulora.adapter import LoraAdapter
from csulora.errors import CsuloraError
from csulora.method.geometry import Sums, ladder, nested_sums, total
from csulora.method.stages import project
from csulora.pipeline.backend import pick_device
from csulora.pipeline.plan import Member, Plan
from csulora.settings import Correction
from csulora.subspace import SafetySubspace
from csulora.text import listed

# Above these a hint is given; found on models trained for the purpose (docs/evidence.md).
WIDE = 0.05  # k as a share of the smaller side
OVERLAPPING = 0.10  # |cos(dW, D_k)|

NO_VERDICT = (
    "This is no verdict on safety: by their weights a clean and a poisoned adapter look the same "
    "(docs/evidence.md)."
)


@dataclass(frozen=True)
class Place:
    """Where an update dW lies relative to the leading k directions of D.

    relative_energy: shares of ||dW||^2 by block; 0 for a zero update.
    read_gain: ||dW V||^2 over what random directions in place of V would read, ||dW||^2 k / d_in.
    overlap: cos(dW, D_k), -1 to 1; below 0 the update works against what alignment did.
    """

    k: int
    relative_energy: dict[str, float]
    read_gain: float
    overlap: float


@dataclass(frozen=True)
class Geometry:
    """The places of each module and of all together, by growing k up to all directions, and hints."""

    modules: dict[str, list[Place]]
    totals: list[Place]
    hints: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As strictly valid JSON values."""
        return {**asdict(self), "verdict": NO_VERDICT}


def geometry(adapter: LoraAdapter, subspace: SafetySubspace, *, device: str = "auto") -> Geometry:
    """Shares by k, how much the update reads of D's inputs, and its overlap with D, in one pass.

    Raises CsuloraError where adapter and subspace do not fit together or an energy is out of range.
    """
    members = Plan.of(adapter, subspace, Correction()).members
    ranks = ladder(max((member.U.shape[1] for member in members), default=0))
    chosen = pick_device(device)
    sums = {m.name: _sums(m, subspace, ranks, chosen) for m in members}
    modules = {m.name: _places(m.U.shape[1], ranks, sums[m.name]) for m in members}
    totals = [
        _place(k, total(s)) for k, s in zip(ranks, zip(*sums.values(), strict=True), strict=False)
    ]
    return Geometry(modules, totals, _hints(members, totals))


def _sums(
    member: Member, subspace: SafetySubspace, ranks: list[int], device: torch.device
) -> list[Sums]:
    m = member.module
    factors = (X.to(device, torch.float64) for X in (m.B, m.A, member.U, member.V))
    S = subspace.modules[member.target].S.to(device)
    found = nested_sums(project(*factors), S, m.scaling, m.A.shape[1], ranks)
    if not all(map(math.isfinite, found[-1])):
        raise CsuloraError(f"{member.name}: the energy of its update is out of range")
    return found


def _places(rank: int, ranks: list[int], sums: list[Sums]) -> list[Place]:
    """One for each k up to the module's own."""
    return [
        _place(min(k, rank), s)
        for k, s, smaller in zip(ranks, sums, [0, *ranks], strict=False)
        if smaller < rank or k == ranks[0]
    ]


def _place(k: int, sums: Sums) -> Place:
    energy = sums.energy
    blocks = ("aligned", "partial_left", "partial_right", "off")
    shares = {b: getattr(sums, b) / energy if energy else 0.0 for b in blocks}
    reads = sums.aligned + sums.partial_right
    norms = math.sqrt(energy) * math.sqrt(sums.displacement)
    return Place(
        k,
        shares,
        reads / sums.random_read if sums.random_read else 0.0,
        sums.inner / norms if norms else 0.0,
    )


def _hints(members: tuple[Member, ...], totals: list[Place]) -> list[str]:
    hints = []
    wide = [m.name for m in members if m.U.shape[1] > WIDE * min(m.U.shape[0], m.V.shape[0])]
    if wide:
        hints.append(
            f"k is above {WIDE:.0%} of the smaller side of {len(wide)} module(s), where the subspace "
            f"holds skill as well: {listed(wide)}; --subspace-rank takes fewer directions"
        )
    if totals and abs(totals[-1].overlap) > OVERLAPPING:
        how = "works against" if totals[-1].overlap < 0 else "repeats"
        hints.append(
            f"the update {how} what alignment did, by an overlap of {totals[-1].overlap:+.1%} with D"
        )
    return hints
