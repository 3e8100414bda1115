"""The strengths and choices of the method, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from csulora.errors import UsageError

Granularity = Literal["direction", "component"]
Rank = Literal["exact", "same"]


@dataclass(frozen=True)
class Correction:
    """How strongly each block of an update is attenuated, and in which form the result is written.

    lambda_aligned, lambda_left, lambda_right, lambda_off: strengths >= 0 (dimensionless; `inf` is the
        hard limit) of the blocks P_U dW P_V, P_U dW (I - P_V), (I - P_U) dW P_V and
        (I - P_U) dW (I - P_V). The defaults keep the aligned block; 10 is this project's choice.
    granularity: "direction" attenuates each singular direction of a block by its own relative energy,
        "component" the block as a whole.
    rank: "exact" returns rank 2r with nothing lost, "same" a rank-r fit that keeps the pinned block.

    Raises UsageError for a negative or NaN strength or an unknown choice.
    """

    lambda_aligned: float = 0.0
    lambda_left: float = 10.0
    lambda_right: float = 10.0
    lambda_off: float = 10.0
    granularity: Granularity = "direction"
    rank: Rank = "exact"

    def __post_init__(self) -> None:
        for name in ("lambda_aligned", "lambda_left", "lambda_right", "lambda_off"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise UsageError(f"{name} must be a number, not {value!r}")
            try:
                value = float(value)
            except OverflowError:
                raise UsageError(f"{name} is too large a number; inf is the hard limit") from None
            if math.isnan(value) or value < 0:
                raise UsageError(
                    f"{name} must be at least 0 (inf is the hard limit), not {value!r}"
                )
            object.__setattr__(self, name, value)
        _one_of("granularity", self.granularity, ("direction", "component"))
        _one_of("rank", self.rank, ("exact", "same"))

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """(lambda_aligned, lambda_left, lambda_right, lambda_off)."""
        return self.lambda_aligned, self.lambda_left, self.lambda_right, self.lambda_off

    @property
    def is_identity(self) -> bool:
        """All strengths are 0: the correction returns the adapter itself."""
        return not any(self.strengths)

    def with_strength(self, strength: float) -> Correction:
        """The same choices with one strength for both partial blocks and the off block."""
        return replace(self, lambda_left=strength, lambda_right=strength, lambda_off=strength)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
