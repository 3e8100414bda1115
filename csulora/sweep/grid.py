"""What a sweep goes through: families (method, form, granularity, k), each a path of strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from csulora.errors import UsageError
from csulora.method.geometry import ladder
from csulora.settings import FORMS, GRANULARITIES, METHODS, Correction, Method, Realignment

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0, math.inf)
# The form `same` of CSULoRA is a fit, which costs as much for one strength as all others do for a k.
DEFAULT_FORMS = {"csulora": ("exact",), "realign": ("same", "exact")}


@dataclass(frozen=True)
class Family:
    """Settings that differ in their strength alone, at the k leading directions."""

    start: Method  # whatever its strength
    k: int

    @property
    def method(self) -> str:
        return self.start.method

    @property
    def granularity(self) -> str | None:
        """Of CSULoRA; realignment has none."""
        return self.start.granularity if isinstance(self.start, Correction) else None

    def at(self, strength: float) -> Method:
        """The settings at one strength, from 0 (the raw adapter) to infinity (the extreme)."""
        return self.start.with_strength(strength)

    def rank(self, rank: int) -> int:
        """Rank of the result for an adapter of that rank, of a module with at least k directions."""
        return self.start.result_rank(rank, self.k)

    def __str__(self) -> str:
        choices = (self.method, self.granularity, self.start.form, f"k {self.k}")
        return " ".join(choice for choice in choices if choice)


@dataclass(frozen=True)
class Setting:
    """One strength of a family."""

    family: Family
    strength: float

    @property
    def correction(self) -> Method:
        return self.family.at(self.strength)

    def to_dict(self) -> dict[str, Any]:
        """The settings as in a report, and k."""
        return {**self.correction.to_dict(), "k": self.family.k}

    def __str__(self) -> str:
        return f"{self.family} strength {self.strength:g}"

    def options(self) -> list[str]:
        """What `csulora correct` has to be told for these settings."""
        start, x = self.family.start, _option(self.strength)
        words = ["--method", start.method, "--form", start.form]
        if isinstance(start, Correction):
            words += ["--granularity", start.granularity]
            words += ["--lambda-partial", x, "--lambda-off", x]
        else:
            words += ["--strength", x]
        return [*words, "--subspace-rank", str(self.family.k)]


def families(
    largest: int,
    *,
    methods: Sequence[str] = tuple(METHODS),
    forms: Sequence[str] | None = None,
    granularities: Sequence[str] = ("direction",),
    ranks: Sequence[int] | None = None,
) -> list[Family]:
    """All families of these choices, method by method.

    largest: k of the subspace. forms: None is what each method does at little cost, `exact` of CSULoRA
    and both of realignment. ranks: None is 2, 4, 8, ... and `largest`.

    Raises UsageError for an unknown choice, one that is named twice, none, or a k out of range.
    """
    _check("method", methods, tuple(METHODS))
    _check("form", FORMS if forms is None else forms, FORMS)
    _check("granularity", granularities, GRANULARITIES)
    ks = ladder(largest) if ranks is None else list(ranks)
    _check("subspace rank", ks, range(1, largest + 1))
    found = []
    for method in methods:
        for form in DEFAULT_FORMS[method] if forms is None else forms:
            for start in _starts(method, form, granularities):
                found += [Family(start, k) for k in ks]
    return found


def checked_strengths(strengths: Sequence[float]) -> list[float]:
    """Strengths of a grid in ascending order. Raises UsageError for what is none, or 0: no change."""
    for value in strengths:
        Realignment(strength=value)
        if value == 0:
            raise UsageError("strength 0 is the raw adapter, which is always in a sweep")
    if not strengths or len(set(strengths)) < len(strengths):
        raise UsageError("strengths must be given, each once")
    return sorted(map(float, strengths))


def _starts(method: str, form: str, granularities: Sequence[str]) -> list[Method]:
    if method == Realignment.method:
        return [Realignment(form=form)]  # type: ignore[arg-type]
    return [Correction(granularity=name, form=form) for name in granularities]  # type: ignore[arg-type]


def _check(what: str, given: Sequence[Any], allowed: Sequence[Any]) -> None:
    if not given or len(set(given)) < len(given):
        raise UsageError(f"{what}: one or several have to be named, each once")
    for value in given:
        if value not in allowed:
            names = allowed if not isinstance(allowed, range) else [f"1 to {allowed[-1]}"]
            raise UsageError(f"{what} must be one of {', '.join(names)}, not {value!r}")


def _option(strength: float) -> str:
    """A number that is read back as the same one."""
    text = f"{strength:g}"
    return text if float(text) == strength else repr(strength)
