"""What a backend hands over, the same from every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.method.precision import Amplification, needs_float64
from csulora.method.stages import Figures
from csulora.pipeline.plan import Plan

Pair = tuple[Tensor, Tensor]  # B (d_out, r), A (r, d_in)


class Solved(NamedTuple):
    """The solution of a plan with n members, all but its form. Figures lie on the CPU, in float64."""

    figures: Figures  # (n) and (n, 4), in the plan's order
    needs_float64: Tensor  # (n) bool: which members float32 would spoil
    # New factors of a member, of rank `Member.rank`, float32 or of the type that the backend works in; in
    # the given memory where the backend can write there.
    factors: Callable[[int, Pair | None], Pair]
    order: Sequence[int]  # of the members, in which their factors are best asked for
    notes: tuple[str, ...] = ()  # warnings for the report
    # For the new factors, of `allocate`, where the backend had to have it for what it wrote already.
    memory: Sequence[Pair] | None = None


class Gathered(NamedTuple):
    """What is known about each of n members, put together from the parts they were solved in."""

    figures: Figures
    amplified: Amplification
    squares_fit: Tensor  # (n) bool, whether float32 holds the squares of the factors

    @classmethod
    def of(cls, n: int) -> Gathered:
        energy, change, rank_error, computing, storing = torch.zeros(5, n, dtype=torch.float64)
        before, after = torch.zeros(2, n, 4, dtype=torch.float64)
        figures = Figures(energy, before, after, change, rank_error)
        return cls(figures, Amplification(computing, storing), torch.zeros(n, dtype=torch.bool))

    def put(
        self, positions: list[int], figures: Figures, amplified: Amplification, squares_fit: Tensor
    ) -> None:
        """Those of some members, from whatever device."""
        wholes = (*self.figures, *self.amplified, self.squares_fit)
        for whole, part in zip(wholes, (*figures, *amplified, squares_fit), strict=True):
            whole[positions] = part.to(whole.device)

    def needs_float64(self, plans: Sequence[Plan]) -> Tensor:
        """(n) bool, see `csulora.method.precision.needs_float64`, for the members of these plans."""
        limits = [plan.limits(member) for plan in plans for member in plan.members]
        return needs_float64(self.squares_fit, self.amplified, limits)


def overflow(name: str) -> CsuloraError:
    """The error for a module with a square that is not finite."""
    return CsuloraError(f"{name}: NaN, or factors whose squares overflow float32")
