"""The strengths and choices of each method, as one frozen value: `Correction` and `Realignment`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, get_args

from csulora.errors import CsuloraError, UsageError
from csulora.strengths import Frozen, OwnStrength, by_module, checked_patterns, checked_strength
from csulora.text import listed
from csulora_kernels import FORMS, GRANULARITIES, Form, Granularity
from csulora_kernels.settings import Kind

# Which implementation corrects, and what runs a batch.
BACKENDS = ("auto", "torch", "triton")
EngineName = Literal["local", "ray"]
ENGINES: tuple[str, ...] = get_args(EngineName)

_LAMBDAS = ("lambda_aligned", "lambda_left", "lambda_right", "lambda_off")


class _Settings:
    """What the settings of all methods have in common: strengths of single modules, a budget, and plain
    values and back."""

    method: ClassVar[str]
    found: ClassVar[tuple[str, ...]]  # the fields in whose place a budget comes
    budgets: ClassVar[tuple[str, ...]]  # what can be limited

    form: Form
    strength_for: Mapping[str, OwnStrength]
    budget: Mapping[str, float] | None

    def result_rank(self, r: int, k: int) -> int:
        """Rank of the result for an update of rank r at k directions, unless it is left as it is."""
        return Kind(self.method, self.form).rank(r, k)

    def _check_common(self) -> None:
        """Bring the common fields into their hashable form. Raises UsageError."""
        object.__setattr__(self, "strength_for", checked_patterns(self.strength_for))
        if self.budget is None:
            return
        object.__setattr__(self, "budget", self._limit(self.budget))
        for field in fields(self):  # type: ignore[arg-type]
            if field.name in self.found and getattr(self, field.name) != field.default:
                raise UsageError(f"{field.name} cannot be given beside a budget, which finds it")

    def _limit(self, budget: object) -> Frozen[float]:
        if not isinstance(budget, Mapping) or len(budget) != 1:
            raise UsageError(
                f"budget must be a mapping with one entry, as {{'change': 0.3}}, not {budget!r}"
            )
        ((kind, value),) = budget.items()
        if kind not in self.budgets:
            raise UsageError(
                f"a budget of {self.method} must be of {' or '.join(self.budgets)}, not {kind!r}"
            )
        limit = checked_strength(f"budget {kind}", value)
        if not 0 < limit < math.inf:
            raise UsageError(f"budget {kind} must be finite and above 0, not {limit!r}")
        return Frozen({kind: limit})

    def own_strengths(self, names: Sequence[str]) -> dict[str, OwnStrength]:
        """The strengths that `strength_for` gives to modules of these names; the last pattern counts.

        Raises CsuloraError for patterns that match none of them.
        """
        own, idle = by_module(Frozen(self.strength_for), tuple(names))
        if idle:
            example = f"; its modules have names like {names[0]}" if names else ""
            raise CsuloraError(f"no module matches strength_for {listed(idle)}{example}")
        return dict(own)

    def _common_words(self) -> str:
        """What `str` says of strengths of single modules."""
        parts = (
            f"; {pattern} dropped" if own == "drop" else f"; {pattern} at {own:g}"
            for pattern, own in self.strength_for.items()
        )
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The method and the fields as JSON values; an infinite strength is the string "inf".

        `strength_for` and `budget` are left out where there is none, and with a budget the strengths that
        it finds.
        """
        absent = self.found if self.budget is not None else ("budget",)
        if not self.strength_for:
            absent = (*absent, "strength_for")
        names = [f.name for f in fields(self) if f.name not in absent]  # type: ignore[arg-type]
        return {"method": self.method, **{name: _plain(getattr(self, name)) for name in names}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote; fields that are not there have their defaults.

        Raises UsageError for a name that is no field, for another method, and as the constructor does.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"settings must be a mapping, not {values!r}")
        given = {k: _from_plain(v) for k, v in values.items()}
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
    strength_for: strengths of single modules, in place of those of the partial blocks and the off block:
        a mapping from shell-style patterns, which match a module's whole name or the end of one at a dot,
        to a number or "drop". 0 leaves a module alone wholly, "drop" removes its update. Of several
        patterns that match, the last one counts.
    budget: what is to be kept to, {"change": x} (relative change of the adapter) or {"off": x} (energy of
        its off block afterwards over all energy before). One strength in place of the same three is found
        for each adapter.

    Raises UsageError for a negative or NaN strength, an unknown choice, or strengths beside a budget.
    """

    method: ClassVar[str] = "csulora"
    found: ClassVar[tuple[str, ...]] = _LAMBDAS[1:]
    budgets: ClassVar[tuple[str, ...]] = ("change", "off")

    lambda_aligned: float = 0.0
    lambda_left: float = 10.0
    lambda_right: float = 10.0
    lambda_off: float = 10.0
    granularity: Granularity = "direction"
    form: Form = "exact"
    strength_for: Mapping[str, OwnStrength] = Frozen()
    budget: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in _LAMBDAS:
            object.__setattr__(self, name, checked_strength(name, getattr(self, name)))
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("form", self.form, FORMS)
        self._check_common()

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """(lambda_aligned, lambda_left, lambda_right, lambda_off)."""
        return self.lambda_aligned, self.lambda_left, self.lambda_right, self.lambda_off

    @cached_property
    def is_identity(self) -> bool:
        """All strengths are 0: the correction returns the adapter itself."""
        return not any((*self.strengths, *self.strength_for.values(), self.budget))

    def __str__(self) -> str:
        names = _LAMBDAS if self.budget is None else _LAMBDAS[:1]
        strengths = ", ".join(f"{name[7:]} {getattr(self, name):g}" for name in names)
        how = f"strengths {strengths}"
        if self.budget is not None:
            how = f"a budget of {_words(self.budget)}, {strengths}"
        return f"csulora at {how}, granularity {self.granularity}{self._common_words()}"

    def with_strength(self, strength: float) -> Correction:
        """The same choices with one strength for both partial blocks and the off block, and no budget."""
        return replace(
            self, lambda_left=strength, lambda_right=strength, lambda_off=strength, budget=None
        )

    def for_module(self, own: OwnStrength | None) -> Correction:
        """What a module with this strength of its own (None: without) is corrected with.

        It names no patterns. All strengths are 0 for a module that is left alone or dropped.
        """
        plain = replace(self, strength_for=Frozen()) if self.strength_for else self
        if own is None:
            return plain
        if own == "drop" or own == 0:
            return replace(plain.with_strength(0), lambda_aligned=0)
        return plain.with_strength(own)


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
    strength_for: strengths of single modules, as in `Correction`.
    budget: {"change": x}, the relative change of the adapter that is to be kept to. The strength is found
        for each adapter.

    Raises UsageError for a strength or target out of range, an unknown choice, or a strength beside a
    budget.
    """

    method: ClassVar[str] = "realign"
    found: ClassVar[tuple[str, ...]] = ("strength",)
    budgets: ClassVar[tuple[str, ...]] = ("change",)

    strength: float = 3.0
    target: float | None = None
    edge: bool = True
    opposed: bool = False
    form: Form = "same"
    strength_for: Mapping[str, OwnStrength] = Frozen()
    budget: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", checked_strength("strength", self.strength))
        if self.target is not None:
            target = checked_strength("target", self.target)
            if math.isinf(target):
                raise UsageError("target must be finite")
            object.__setattr__(self, "target", target)
        for name in ("edge", "opposed"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        _one_of("form", self.form, FORMS)
        self._check_common()

    @property
    def gamma(self) -> float:
        """The target, or what stands for None."""
        if self.target is not None:
            return self.target
        return 1.0 if self.form == "same" else 0.5

    @cached_property
    def is_identity(self) -> bool:
        """All strengths are 0: the method returns the adapter itself."""
        return not any((self.strength, *self.strength_for.values(), self.budget))

    def __str__(self) -> str:
        edge = "" if self.edge else ", edge off"
        opposed = ", opposed only" * self.opposed
        how = f"strength {self.strength:g}"
        if self.budget is not None:
            how = f"a budget of {_words(self.budget)}"
        return f"realign at {how}, target {self.gamma:g}{edge}{opposed}{self._common_words()}"

    def with_strength(self, strength: float) -> Realignment:
        """The same choices with another strength, and no budget."""
        return replace(self, strength=strength, budget=None)

    def for_module(self, own: OwnStrength | None) -> Realignment:
        """What a module with this strength of its own (None: without) is realigned with.

        It names no patterns. The strength is 0 for a module that is left alone or dropped.
        """
        plain = replace(self, strength_for=Frozen()) if self.strength_for else self
        return plain if own is None else plain.with_strength(0 if own == "drop" else own)


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


def _words(budget: Mapping[str, float]) -> str:
    return " ".join(f"{kind} {limit:g}" for kind, limit in budget.items())


def _plain(value: Any) -> Any:
    """A field as a JSON value."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return "inf" if value == math.inf else value


def _from_plain(value: Any) -> Any:
    """What `_plain` made a JSON value of."""
    if isinstance(value, Mapping):
        return {key: math.inf if entry == "inf" else entry for key, entry in value.items()}
    return math.inf if value == "inf" else value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
