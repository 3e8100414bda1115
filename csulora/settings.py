"""The strengths and choices of each method, as one frozen value: `Correction` and `Realignment`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, Self

from csulora.errors import UsageError
from csulora_kernels import FORMS, GRANULARITIES, Form, Granularity

_LAMBDAS = ("lambda_aligned", "lambda_left", "lambda_right", "lambda_off")


class _Settings:
    """What the settings of all methods have in common: plain values and back."""

    method: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The method and all fields as JSON values; an infinite strength is the string "inf"."""
        values = asdict(self)  # type: ignore[call-overload]
        plain = {name: "inf" if value == math.inf else value for name, value in values.items()}
        return {"method": self.method, **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote; fields that are not there have their defaults.

        Raises UsageError for a name that is no field, for another method, and as the constructor does.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"settings must be a mapping, not {values!r}")
        given = {k: math.inf if v == "inf" else v for k, v in values.items()}
        method = given.pop("method", cls.method)
        if method != cls.method:
            raise UsageError(f"settings of method {method!r} are not those of {cls.method}")
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(map(str, set(given) - set(names)))
        if unknown:
            raise UsageError(f"{unknown[0]!r} is no setting; there are {', '.join(names)}")
        return cls(**given)


@dataclass(frozen=True)
class Correction(_Settings):
    """CSULoRA: how strongly each block of an update is attenuated, and the form of the result.

    lambda_aligned, lambda_left, lambda_right, lambda_off: strengths >= 0 (dimensionless; `inf` is the
        hard limit) of the blocks P_U dW P_V, P_U dW (I - P_V), (I - P_U) dW P_V and
        (I - P_U) dW (I - P_V). The defaults keep the aligned block; 10 is this project's choice.
    granularity: "direction" attenuates each singular direction of a block by its own relative energy,
        "component" the block as a whole.
    form: "exact" returns rank 2r with nothing lost, "same" a rank-r fit that keeps the pinned block.

    Raises UsageError for a negative or NaN strength or an unknown choice.
    """

    method: ClassVar[str] = "csulora"

    lambda_aligned: float = 0.0
    lambda_left: float = 10.0
    lambda_right: float = 10.0
    lambda_off: float = 10.0
    granularity: Granularity = "direction"
    form: Form = "exact"

    def __post_init__(self) -> None:
        for name in _LAMBDAS:
            object.__setattr__(self, name, _strength(name, getattr(self, name)))
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

    def __str__(self) -> str:
        strengths = (f"{name[7:]} {getattr(self, name):g}" for name in _LAMBDAS)
        return f"csulora at strengths {', '.join(strengths)}, granularity {self.granularity}"

    def with_strength(self, strength: float) -> Correction:
        """The same choices with one strength for both partial blocks and the off block."""
        return replace(self, lambda_left=strength, lambda_right=strength, lambda_off=strength)


@dataclass(frozen=True)
class Realignment(_Settings):
    """Realignment, a method of this project: what an adapter does to the inputs that alignment acted on.

    On each right singular direction of D = W_aligned - W_base a share f_i of the update is replaced by
    `target` times what alignment did there, strong directions first (docs/method.md).

    strength: lambda >= 0 (dimensionless; `inf` replaces all of every direction above the edge), in
        f_i = lambda t_i / (t_1 + lambda t_i) with t_i = s_i^2 less the squared edge.
    target: gamma >= 0, how much of D is put in place of what is taken; None: 1 for "same", 1/2 for
        "exact". 0 only takes away.
    edge: leave out what random noise of D's size would reach (Marchenko-Pastur).
    opposed: only directions on which the update works against D, u_i^T dW v_i < 0.
    form: "same" keeps rank r and B as it is, "exact" has rank r + k and loses nothing.

    Raises UsageError for a strength or target out of range or an unknown choice.
    """

    method: ClassVar[str] = "realign"

    strength: float = 3.0
    target: float | None = None
    edge: bool = True
    opposed: bool = False
    form: Form = "same"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", _strength("strength", self.strength))
        if self.target is not None:
            target = _strength("target", self.target)
            if math.isinf(target):
                raise UsageError("target must be finite")
            object.__setattr__(self, "target", target)
        for name in ("edge", "opposed"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        _one_of("form", self.form, FORMS)

    @property
    def gamma(self) -> float:
        """The target, or what stands for None."""
        if self.target is not None:
            return self.target
        return 1.0 if self.form == "same" else 0.5

    @property
    def is_identity(self) -> bool:
        """The strength is 0: the method returns the adapter itself."""
        return self.strength == 0

    def __str__(self) -> str:
        edge = "" if self.edge else ", edge off"
        opposed = ", opposed only" * self.opposed
        return f"realign at strength {self.strength:g}, target {self.gamma:g}{edge}{opposed}"

    def with_strength(self, strength: float) -> Realignment:
        """The same choices with another strength."""
        return replace(self, strength=strength)


Method = Correction | Realignment
METHODS: dict[str, type[Correction] | type[Realignment]] = {
    kind.method: kind for kind in (Correction, Realignment)
}


def method_from_dict(values: Mapping[str, Any]) -> Method:
    """The settings that `to_dict` of any method wrote; CSULoRA's where no method is named.

    Raises UsageError as `from_dict` of the method does, and for an unknown method.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"settings must be a mapping, not {values!r}")
    method = values.get("method", Correction.method)
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    return METHODS[method].from_dict(values)


def _strength(name: str, value: object) -> float:
    """The value as a float, if it is a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise UsageError(f"{name} is too large a number; inf is the hard limit") from None
    if math.isnan(number) or number < 0:
        raise UsageError(f"{name} must be at least 0 (inf is the hard limit), not {number!r}")
    return number + 0.0  # no -0.0, which equals 0.0 but reads otherwise


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
