"""The options of `csulora sweep` alone: what is swept, and by what it is measured."""

from __future__ import annotations

from typing import Any

from csulora.settings import METHODS


def add_grid(group: Any) -> None:
    """Which settings are compared; each a list with commas."""
    group.add_argument(
        "--methods",
        type=_words,
        default=tuple(METHODS),
        metavar="NAME,...",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    group.add_argument(
        "--forms",
        type=_words,
        metavar="FORM,...",
        help="exact, same (default: exact of csulora, both of realign)",
    )
    group.add_argument(
        "--granularities",
        type=_words,
        default=("direction",),
        metavar="NAME,...",
        help="direction, component: of csulora (default: direction)",
    )
    group.add_argument(
        "--ranks",
        type=whole_numbers,
        metavar="k,...",
        help="numbers of leading directions (default: 2, 4, 8, ... and all)",
    )
    group.add_argument(
        "--strengths",
        type=numbers,
        metavar="X,...",
        help="strengths (default: 0.3 to 1000 and inf); with an evaluation the first ones of each "
        "family (default: a third, two thirds and all of its largest change)",
    )


def add_evaluation(group: Any) -> None:
    """The commands and what is asked of their metrics; None is what was not given."""
    group.add_argument(
        "--eval",
        metavar="COMMAND",
        help="run, without a shell, on the folder of each variant in place of {adapter}; the last JSON "
        "object that it prints holds the metrics: refused, complied, broken, over_refused, utility, more",
    )
    group.add_argument(
        "--select", metavar="COMMAND", help="instead of --eval: the one that chooses settings"
    )
    group.add_argument(
        "--report",
        metavar="COMMAND",
        help="with --select: the one whose figures are told, of the chosen settings and controls",
    )
    group.add_argument(
        "--limit",
        metavar="METRIC<=X",
        help="what a setting has to keep to; or METRIC>=X (default: complied<=0.1)",
    )
    group.add_argument(
        "--maximize", metavar="METRIC", help="what is to be large within it (default: utility)"
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="at most so many evaluations a family after the first ones (default: 6)",
    )
    group.add_argument("--jobs", type=int, metavar="N", help="evaluations at once (default: 1)")
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="after which an evaluation has failed"
    )
    group.add_argument(
        "--without",
        type=_words,
        metavar="CONTROL,...",
        help="leave out controls: raw, no-adapter, down-scaling, random-subspace, add-back, pruning",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="evaluate anew, instead of going on with the evaluations that --out-dir keeps",
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, _words(text)))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, _words(text)))
