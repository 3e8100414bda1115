"""What the results say about methods: paired comparisons, what transfers, what tells beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from bench.safety.results import Results, skill_at_limit, spread, table, value

# Each against the second, at the limit of validation prompts; what differs is one choice.
PAIRS = (
    ("realign same k64, q, k left alone", "realign same k64"),
    ("realign exact k64, q, k left alone", "realign exact k64"),
    ("realign opposed same k64", "realign same k64"),
    ("realign opposed exact k64", "realign exact k64"),
    ("realign exact k64", "realign same k64"),
    ("realign same k64", "realign same k64, no edge"),
    ("realign same k2", "realign same k64"),
    ("realign same k16", "realign same k64"),
    ("realign same k64", "realign gamma 0 k64"),
    ("realign same k64", "realign random k64"),
    ("realign same k64, q, k left alone", "resta"),
    ("realign same k64, q, k left alone", "lox k8"),
    ("trial ratio same", "realign same k64"),
    ("trial global same", "realign same k64"),
    ("trial shield 3", "realign exact k64"),
    ("trial ratio same, q, k left alone", "realign same k64, q, k left alone"),
    ("trial ratio exact, q, k left alone", "realign exact k64, q, k left alone"),
)
TRANSFER = (
    "scaled",
    "resta",
    "lox k8",
    "realign same k64",
    "realign exact k64",
    "realign same k64, q, k left alone",
    "realign exact k64, q, k left alone",
    "trial ratio same",
)


def paired(every: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """Skill and benign answers of one family less those of another, run by run; mean, standard error."""

    def best(r: dict[str, Any], family: str, metric: str) -> float:
        found = r["frontier"][family]["best"]
        # Without an adapter benign answers are those of the aligned model.
        return value(r, found["test"] if found else r["ends"]["aligned"], metric)

    rows = []
    for first, second in pairs:
        skill = [skill_at_limit(r, first) - skill_at_limit(r, second) for r in every]
        benign = [best(r, first, "benign") - best(r, second, "benign") for r in every]
        wins, losses = sum(d > 2 for d in skill), sum(d < -2 for d in skill)
        counts = f"{wins} / {losses} of {len(every)}"
        rows.append([first, second, with_error(skill), counts, with_error(benign)])
    head = ["family", "against", "skill", "better / worse by over 2", "benign answers"]
    return table(head, rows)


def with_error(values: Sequence[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{fmean(values):+.1f} ± {error:.1f}"


def transfer(every: Sequence[dict[str, Any]], families: Sequence[str] = TRANSFER) -> str:
    """How far the setting at the limit spreads over runs, as a factor (of one standard deviation)."""
    rows = []
    for family in families:
        found = [(r, r["frontier"][family]["best"]) for r in every]
        best = [(r, b) for r, b in found if b and b["strength"] != "inf" and b["change"] > 0]
        if len(best) < 3:
            continue
        strengths = [math.log(b["strength"]) for _, b in best]
        changes = [math.log(b["change"]) for _, b in best]
        ratios = [math.log(r["predictors"]["norm_ratio"]) for r, _ in best]
        rows.append(
            [
                family,
                f"{sum(b is None for _, b in found)} of {len(every)}",
                f"{math.exp(fmean(strengths)):.2g}",
                f"x {math.exp(stdev(strengths)):.1f}",
                f"{math.exp(fmean(changes)):.2f}",
                f"x {math.exp(stdev(changes)):.1f}",
                f"{rank_correlation(ratios, strengths):+.2f}",
            ]
        )
    head = ["family", "never within the limit", "strength", "spread", "change", "spread"]
    head.append("strength with norm ratio")
    return table(head, rows)


Reader = Callable[[dict[str, Any]], float]


def predictors() -> dict[str, Reader]:
    """Columns of the table of predictors, by name."""

    def data(k: int, kind: str, what: str) -> Reader:
        return lambda r: 100 * r["predictors"]["data"][str(k)][kind][what]

    def kinds(key: str) -> Reader:
        return lambda r: fmean(v[key] for v in r["predictors"]["spectrum"].values())

    def place(k: int, key: str) -> Reader:
        return lambda r: r["predictors"]["geometry"][str(k)][key]

    def apart(k: int) -> Reader:
        return lambda r: data(k, "harmful", "input")(r) - data(k, "skill", "input")(r)

    return {
        "harmful read, k 8": data(8, "harmful", "input"),
        "skill read, k 8": data(8, "skill", "input"),
        "difference, k 2": apart(2),
        "difference, k 16": apart(16),
        "harmful answered, k 8": data(8, "harmful", "response"),
        "skill answered, k 8": data(8, "skill", "response"),
        "top 4": lambda r: 100 * kinds("top4")(r),
        "participation": kinds("participation"),
        "above edge": kinds("above_edge"),
        "read gain, k 8": place(8, "read_gain"),
        "overlap, k 64 (%)": lambda r: 100 * place(64, "overlap")(r),
        "norm ratio": lambda r: r["predictors"]["norm_ratio"],
        "ASR of attention modules alone": lambda r: value(
            r, r["ends"]["raw, self_attn modules alone"], "complied"
        ),
    }


def told_beforehand(results: Results, family: str) -> str:
    """Predictors beside the skill that a family keeps at the limit, and rank correlations with it."""
    columns = predictors()
    every = [r for rs in results.worlds.values() for r in rs]

    rows = []
    for name, rs in results.worlds.items():
        cells = [f"{fmean(map(read, rs)):.2g}" for read in columns.values()]
        rows.append([name, spread([skill_at_limit(r, family) for r in rs]), *cells])
    poisoned = [r for r in every if r["settings"]["poison"] > 0]
    kept = [skill_at_limit(r, family) for r in poisoned]
    last = [
        f"{rank_correlation([read(r) for r in poisoned], kept):+.2f}" for read in columns.values()
    ]
    return table(
        ["world", f"skill of {family}", *columns], [*rows, ["rank correlation", "", *last]]
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; 0 where one does not vary."""
    a, b = _ranks(x), _ranks(y)
    ma, mb = fmean(a), fmean(b)
    cross = sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
    size = math.sqrt(sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b))
    return cross / size if size else 0.0


def _ranks(x: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [sum(w < v for w in x) + (sum(w == v for w in x) - 1) / 2 for v in x]
