"""Energies and relative change of any number of settings, from one pass over an adapter's factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from csulora.adapter import LoraAdapter
from csulora.errors import CsuloraError
from csulora.method import in_float64, nested
from csulora.method.nested import Blocks, Directions
from csulora.method.precision import cancels
from csulora.method.realign import Spectrum
from csulora.method.stages import Figures, Projection
from csulora.pipeline.backend import pick_device
from csulora.pipeline.plan import Member, Plan
from csulora.report import BLOCKS, Totals
from csulora.settings import Correction, Method
from csulora.subspace import SafetySubspace
from csulora.sweep.grid import Family


class _Stack(NamedTuple):
    """Modules of one rank and one number of directions, projected."""

    members: list[Member]
    projection: Projection  # (n, ...)
    N: Tensor  # (n, K, K) U^T B B^+ U
    scaling: Tensor  # (n)


class Energies:
    """What settings would leave of one adapter. Every other number of directions is a part of the
    projection on all of them, and no factor is formed. Energies are right to about 1e-7 of the whole, so
    that a relative change below 0.001 is only known to be that small.

    Raises CsuloraError where adapter and subspace do not fit together, as `csulora.correct` does.
    """

    def __init__(
        self,
        adapter: LoraAdapter,
        subspace: SafetySubspace,
        families: Sequence[Family],
        *,
        device: str = "auto",
    ) -> None:
        place = pick_device(device)
        self._subspace = subspace
        # Whether each method can take this adapter at all; the members are the same.
        plans = [Plan.of(adapter, subspace, f.start) for f in _one_each(families)]
        members = plans[0].members if plans else ()
        if not members:
            raise CsuloraError(
                "no module can be corrected: none is a LoRA update on a linear weight"
            )
        groups: dict[tuple[int, int], list[Member]] = {}
        for member in members:
            groups.setdefault((member.module.rank, member.U.shape[1]), []).append(member)
        self._stacks = [_stack(group, place) for group in groups.values()]
        self.rank = max(member.module.rank for member in members)
        # Of the stacks in turn: one k is asked for many strengths.
        self._blocks = lru_cache(maxsize=1)(self._blocks_at)
        self._spectra = lru_cache(maxsize=1)(self._spectra_at)
        self._directions = lru_cache(maxsize=2)(self._directions_for)

    def totals(self, family: Family, strengths: Sequence[float]) -> list[Totals]:
        """Those that the reports of `csulora.correct` have for the same settings."""
        parts = self._figures([family.at(strength) for strength in strengths], family.k)
        figures = Figures(*(torch.cat(whole, dim=1) for whole in zip(*parts, strict=True)))
        return _totals(figures, torch.cat([stack.scaling for stack in self._stacks]))

    def _figures(self, settings: Sequence[Method], k: int) -> list[Figures]:
        """Of each stack, for settings that differ in strengths alone."""
        first = settings[0]
        if isinstance(first, Correction):
            return [nested.attenuated(blocks, settings) for blocks in self._blocks(k)]  # type: ignore[arg-type]
        pairs = zip(self._directions(first.form), self._spectra(k), strict=True)
        return [nested.realigned(part, k, spectrum, settings) for part, spectrum in pairs]  # type: ignore[arg-type]

    def _blocks_at(self, k: int) -> list[Blocks]:
        return [Blocks.of(nested.leading(stack.projection, k)) for stack in self._stacks]

    def _directions_for(self, form: str) -> list[Directions]:
        return [Directions.of(s.projection, s.N, form == "same") for s in self._stacks]

    def _spectra_at(self, k: int) -> list[Spectrum]:
        """Of D's leading k directions: what noise reaches depends on how many are known."""
        found = []
        for stack in self._stacks:
            own = (self._spectrum(member, k) for member in stack.members)
            found.append(Spectrum(*(torch.stack(X) for X in zip(*own, strict=True))))
        return found

    def _spectrum(self, member: Member, k: int) -> Spectrum:
        return self._subspace.modules[member.target].prefix(k).spectrum(member.module.scaling)


def _one_each(families: Sequence[Family]) -> list[Family]:
    return list({family.method: family for family in families}.values())


def _stack(members: list[Member], device: torch.device) -> _Stack:
    rows, Ns = [], []
    for member in members:
        B, A, U, V = (X.to(device) for X in (member.module.B, member.module.A, member.U, member.V))
        rows.append(nested.project_once(B, A, U, V))
        if bool(cancels(rows[-1].G_B, rows[-1].G_A)):  # as `correct` has it
            B, A = in_float64.balanced(B, A)
            rows[-1] = nested.project_once(B, A, U, V)
        own = Projection(*(X[None] for X in rows[-1]))
        N, apart = nested.reach(own)
        Ns.append(N[0] if bool(apart) else nested.reach_of(B, U))
    projection = Projection(*(torch.stack(parts).cpu() for parts in zip(*rows, strict=True)))
    scaling = torch.tensor([member.module.scaling for member in members], dtype=torch.float64)
    finite = torch.isfinite((projection.G_B * projection.G_A).sum((-2, -1)) * scaling.square())
    if not bool(finite.all()):
        name = members[int(finite.int().argmin())].name
        raise CsuloraError(f"{name}: NaN, or the energy of its update is out of range")
    return _Stack(members, projection, torch.stack(Ns).cpu(), scaling)


def _totals(figures: Figures, scaling: Tensor) -> list[Totals]:
    """Over all modules, each weighted by its energy, as `csulora.report.totals` has it.

    figures: (s, n) and (s, n, 4), a row a setting.
    """
    energy = scaling.square() * figures.energy
    left = energy[..., None] * figures.after
    missed = (left.sum(-1) * figures.rank_error.square()).sum(-1)
    sums = (
        energy.sum(-1),
        (energy[..., None] * figures.before).sum(-2),
        left.sum(-2),
        (energy * figures.relative_change.square()).sum(-1),
        missed,
    )
    return [_total(energy.shape[1], *row) for row in zip(*(X.tolist() for X in sums), strict=True)]


def _total(
    modules: int,
    before: float,
    blocks_before: list[float],
    blocks_after: list[float],
    changed: float,
    missed: float,
) -> Totals:
    def shares(blocks: list[float]) -> dict[str, float]:
        return {name: x / before if before else 0.0 for name, x in zip(BLOCKS, blocks, strict=True)}

    after = math.fsum(blocks_after)
    return Totals(
        modules=modules,
        energy_before=before,
        energy_after=after,
        relative_energy_before=shares(blocks_before),
        relative_energy_after=shares(blocks_after),
        relative_change=math.sqrt(changed / before) if before else 0.0,
        rank_error=math.sqrt(missed / after) if after else 0.0,
    )
