"""Strengths of single modules by patterns of names: what may be given, and which modules it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from numbers import Real
from typing import Generic, Literal, TypeVar

from csulora.errors import UsageError

# Of one setting; a report from elsewhere may hold any.
MOST_PATTERNS = 2000
LONGEST_PATTERN = 500

OwnStrength = float | Literal["drop"]
_V = TypeVar("_V")


class Frozen(Mapping[str, _V], Generic[_V]):
    """A mapping that cannot change, so that it hashes; two are equal if they are in the same order."""

    def __init__(self, values: Mapping[str, _V] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, key: str) -> _V:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and [*self.items()] == [*other.items()]

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def checked_patterns(values: object) -> Frozen[OwnStrength]:
    """What `strength_for` may be, in its order. Raises UsageError for anything else."""
    if not isinstance(values, Mapping):
        raise UsageError(f"strength_for must be a mapping from patterns, not {values!r}")
    if len(values) > MOST_PATTERNS:
        raise UsageError(
            f"strength_for has {len(values)} patterns; at most {MOST_PATTERNS} are taken"
        )
    found: dict[str, OwnStrength] = {}
    for pattern, value in values.items():
        if not isinstance(pattern, str) or not 0 < len(pattern) <= LONGEST_PATTERN:
            raise UsageError(
                f"strength_for: a pattern has 1 to {LONGEST_PATTERN} characters, not {pattern!r}"
            )
        if isinstance(value, str) and value != "drop":
            raise UsageError(f"strength_for {pattern}: {value!r} is neither a number nor drop")
        found[pattern] = (
            "drop" if value == "drop" else checked_strength(f"strength_for {pattern}", value)
        )
    return Frozen(found)


def checked_strength(name: str, value: object) -> float:
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


@lru_cache(maxsize=16)
def by_module(
    strength_for: Frozen[OwnStrength], names: tuple[str, ...]
) -> tuple[dict[str, OwnStrength], tuple[str, ...]]:
    """The strengths of modules that have their own, and the patterns that match none.

    The adapters of a batch ask for the same over and over.
    """
    own: dict[str, OwnStrength] = {}
    idle = []
    ends = {name: frozenset(_ends(name)) for name in names}
    for pattern, strength in strength_for.items():
        if any(mark in pattern for mark in "*?["):
            hits = [name for name in names if matches(pattern, name)]
        else:
            hits = [name for name in names if pattern in ends[name]]
        own |= dict.fromkeys(hits, strength)
        if not hits:
            idle.append(pattern)
    return own, tuple(idle)


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern matches a module's whole name or the end of one at a dot.

    `*` stands for any characters, dots too, `?` for one, `[...]` for one of a set; case counts.
    """
    return any(fnmatchcase(end, pattern) for end in _ends(name))


def _ends(name: str) -> list[str]:
    """A name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
