"""What an evaluation command prints, and what is asked of it: a limit, and a metric to be large."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from csulora.errors import UsageError

Metrics = Mapping[str, float]
# Shares between 0 and 1; `utility`, and any further metric, may be of any size.
SHARES = ("refused", "complied", "broken", "over_refused")
KNOWN = (*SHARES, "utility")
_LIMIT = re.compile(r"\s*(\w[\w./-]*)\s*(<=|>=)\s*(\S+)\s*")
LONGEST_NAME = 100
MOST_METRICS = 1000


class MetricsError(ValueError):
    """The output of a command says nothing that can be used; the message is one readable line."""


@dataclass(frozen=True)
class Limit:
    """What one metric may be at most (`<=`) or has to be at least (`>=`)."""

    metric: str
    relation: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Of `NAME<=X` or `NAME>=X`. Raises UsageError for anything else."""
        found = _LIMIT.fullmatch(text)
        try:
            value = float(found[3]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or not math.isfinite(value):
            raise UsageError(f"a limit is NAME<=X or NAME>=X with a number X, not {text!r}")
        return cls(found[1], found[2], value)

    def excess(self, metrics: Metrics) -> float:
        """How far the metric is beyond the limit; 0 or less within it."""
        beyond = metrics[self.metric] - self.value
        return beyond if self.relation == "<=" else -beyond

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.value:g}"


@dataclass(frozen=True)
class Goal:
    """The largest value of `maximize` among what is within the limit."""

    limit: Limit
    maximize: str

    @property
    def needed(self) -> tuple[str, ...]:
        """The metrics that it asks for."""
        return self.limit.metric, self.maximize

    def within(self, metrics: Metrics) -> bool:
        return self.limit.excess(metrics) <= 0

    def rank(self, metrics: Metrics, change: float) -> tuple[float, ...]:
        """A key: the larger the better. Beyond the limit only the distance from it counts."""
        if not self.within(metrics):
            return 0.0, -self.limit.excess(metrics), -change
        return 1.0, metrics[self.maximize], -change


def read_metrics(text: str, needed: tuple[str, ...] = ()) -> dict[str, float]:
    """The numbers in the last JSON object of a text, in the order of names.

    What is no number is left out. Raises MetricsError where there is no object, a number is not finite,
    one of `SHARES` is none between 0 and 1, or one that is needed is missing.
    """
    found = _last_object(text)
    if found is None:
        raise MetricsError("printed no JSON object")
    metrics: dict[str, float] = {}
    for name in sorted(found):
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        metrics[name] = _checked(name, value)
    for name in needed:
        if name not in metrics:
            raise MetricsError(f"its JSON has no number {name!r}")
    if not metrics:
        raise MetricsError("its JSON has no numbers")
    if len(metrics) > MOST_METRICS or max(map(len, metrics)) > LONGEST_NAME:
        raise MetricsError("its JSON has too many metrics, or names that are too long")
    return metrics


def _checked(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MetricsError(f"{name} is {number}, no finite number")
    if name in SHARES and not 0 <= number <= 1:
        raise MetricsError(f"{name} is {number:g}, but has to be a share between 0 and 1")
    return number


def _last_object(text: str) -> dict[str, object] | None:
    """The last JSON object that is not part of another one; other text may stand around it."""
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found = value if isinstance(value, dict) else found
        except ValueError:
            end = at + 1
        except RecursionError:
            raise MetricsError("printed JSON that is too deep") from None
        at = text.find("{", end)
    return found
