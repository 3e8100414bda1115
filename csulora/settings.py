"""The strengths and choices of the method, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any

from csulora.errors import UsageError
from csulora_kernels import FORMS, GRANULARITIES, Form, Granularity


@dataclass(frozen=True)
class Correction:
    """How strongly each block of an update is attenuated, and in which form the result is written.

    lambda_aligned, lambda_left, lambda_right, lambda_off: strengths >= 0 (dimensionless; `inf` is the
        hard limit) of the blocks P_U dW P_V, P_U dW (I - P_V), (I - P_U) dW P_V and
        (I - P_U) dW (I - P_V). The defaults keep the aligned block; 10 is this project's choice.
    granularity: "direction" attenuates each singular direction of a block by its own relative energy,
        "component" the block as a whole.
    form: "exact" returns rank 2r with nothing lost, "same" a rank-r fit that keeps the pinned block.

    Raises UsageError for a negative or NaN strength or an unknown choice.
    """

    lambda_aligned: float = 0.0
    lambda_left: float = 10.0
    lambda_right: float = 10.0
    lambda_off: float = 10.0
    granularity: Granularity = "direction"
    form: Form = "exact"

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
            object.__setattr__(
                self, name, value + 0.0
            )  # no -0.0, which equals 0.0 but reads otherwise
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("form", self.form, FORMS)

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

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; an infinite strength is the string "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Correction:
        """The correction that `to_dict` wrote; fields that are not there have their defaults.

        Raises UsageError for a name that is no field, and as the constructor does.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"settings must be a mapping, not {values!r}")
        names = [field.name for field in fields(cls)]
        unknown = sorted(map(str, set(values) - set(names)))
        if unknown:
            raise UsageError(f"{unknown[0]!r} is no setting; there are {', '.join(names)}")
        given: dict[str, Any] = {k: math.inf if v == "inf" else v for k, v in values.items()}
        return cls(**given)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
