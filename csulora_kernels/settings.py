"""The strengths and choices of both methods, and their check; any object with these attributes serves as well."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

Granularity = Literal["direction", "component"]
Form = Literal["exact", "same"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
FORMS: tuple[str, ...] = get_args(Form)
METHODS = ("csulora", "realign")
# From this strength on CSULoRA removes a block whole: of no direction would more be left than 1.7e-7 of the update's norm,
# E^(1/2) / (2 lambda^(1/2)), and systems that told the difference could not be solved in float64.
REMOVES = 2.0**43
# Where both blocks that the form `same` could pin, aligned and off, have this strength, none is: what is left of a direction
# there, 5e-4 of the update's norm at most, would be the measure of the fit.
UNPINNED = 2.0**20


@dataclass(frozen=True)
class Penalties:
    """Settings of CSULoRA."""

    method: ClassVar[str] = "csulora"

    lambda_aligned: float = 0.0
    lambda_left: float = 10.0
    lambda_right: float = 10.0
    lambda_off: float = 10.0
    granularity: Granularity = "direction"
    form: Form = "exact"


@dataclass(frozen=True)
class Shares:
    """Settings of realignment: which share of each direction is replaced, by gamma times what alignment did."""

    method: ClassVar[str] = "realign"

    strength: float = 3.0
    gamma: float = 1.0
    edge: bool = True  # leave out what is below the noise edge
    opposed: bool = False  # only directions on which the update works against alignment
    form: Form = "same"


class Kind(NamedTuple):
    """What a workspace and a result are made for."""

    method: str
    form: str

    @property
    def splits_off(self) -> bool:
        """Whether the wide side of each module is written as its two parts, [inside, outside], without cores."""
        return self == ("csulora", "exact")

    @property
    def halves(self) -> int:
        """How often R rows the new factor has where it is a product with cores."""
        return 2 if self.splits_off else 1

    @property
    def writes_B(self) -> bool:
        return self != ("realign", "same")

    @property
    def sides(self) -> tuple[int, ...]:
        """Those that are written: 0 (B), 1 (A)."""
        return (0, 1) if self.writes_B else (1,)

    def rank(self, r: int, k: int) -> int:
        """Of a result, where the module has rank r and k directions."""
        if self.form == "same" or r == 0:
            return r
        return 2 * r if self.method == "csulora" else r + k


def kind_of(settings: Any) -> Kind:
    """Method and form, after a check of all settings. Raises ValueError."""
    numbers: tuple[str, ...] = ("strength", "gamma")
    choices: tuple[tuple[str, tuple[str, ...]], ...] = (("method", METHODS), ("form", FORMS))
    if settings.method == "csulora":
        numbers = ("lambda_aligned", "lambda_left", "lambda_right", "lambda_off")
        choices += (("granularity", GRANULARITIES),)
    for name in numbers:
        value = getattr(settings, name)
        if math.isnan(value) or value < 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    for name, allowed in choices:
        value = getattr(settings, name)
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(allowed)}, not {value!r}")
    return Kind(settings.method, settings.form)
