"""The options that say which method, and how strongly; and the settings they amount to."""

from __future__ import annotations

import argparse
from typing import Any

from csulora.errors import UsageError
from csulora.settings import GRANULARITIES, METHODS, Correction, Method, Realignment

_LAMBDAS = (
    "lambda_partial",
    "lambda_left",
    "lambda_right",
    "lambda_off",
    "lambda_aligned",
    "granularity",
)
_REALIGNING = ("strength", "target", "edge", "opposed")
# What a budget finds; --lambda-aligned stays a choice.
_FOUND = ("lambda_partial", "lambda_left", "lambda_right", "lambda_off", "strength")


def add_method(parser: Any) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        default=Correction.method,
        help="csulora: keep the aligned block, attenuate the rest (default); realign: put back what "
        "alignment did to the inputs it acted on",
    )
    group = parser.add_argument_group(
        "strengths of csulora",
        "numbers from 0 (keep) to inf (remove); relative energy e gives 1 / (1 + lambda e)",
    )
    for name, meaning in (
        ("partial", "both partially aligned blocks (default: 10)"),
        ("left", "the block inside on the left, outside on the right (default: 10)"),
        ("right", "the block outside on the left, inside on the right (default: 10)"),
        ("off", "the off-subspace block (default: 10)"),
        ("aligned", "the fully aligned block (default: 0)"),
    ):
        group.add_argument(f"--lambda-{name}", type=float, metavar="X", help=meaning)
    group.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        help="attenuate each direction of a block (default) or the block as a whole",
    )
    default = Realignment()
    group = parser.add_argument_group("strength of realign")
    group.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="from 0 (keep) to inf (replace all that stands out of D's noise; "
        f"default: {default.strength:g})",
    )
    group.add_argument(
        "--target",
        type=float,
        metavar="GAMMA",
        help="how much of what alignment did is put in place of what is taken (default: 1 for form "
        "same, 0.5 for exact)",
    )
    group.add_argument(
        "--edge",
        choices=("auto", "off"),
        help="leave out the directions that noise of D's size would reach (default: auto)",
    )
    group.add_argument(
        "--opposed",
        action="store_const",
        const=True,
        help="only directions on which the update works against alignment",
    )
    group = parser.add_argument_group("strengths of single modules, and budgets")
    group.add_argument(
        "--strength-for",
        action="append",
        metavar="PATTERN=X",
        help="another strength for the modules whose name, or its end at a dot, fits a pattern such as "
        "q_proj, 'mlp.*' or 'layers.0.*': 0 leaves them alone, inf is the method's limit, drop removes "
        "their update; can be given again, the last that fits counts",
    )
    group.add_argument(
        "--budget",
        action="append",
        metavar="KIND=X",
        help="find the strength for each adapter: change=X, at most this relative change of the adapter; "
        "off=X (csulora), at most this share of its energy left in the off block",
    )


def correction_from(arguments: argparse.Namespace) -> Method:
    """The settings that the method's options describe.

    Raises UsageError if they contradict or belong to another method.
    """
    realign = arguments.method == Realignment.method
    for name in _LAMBDAS if realign else _REALIGNING:
        if getattr(arguments, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is no option of --method {arguments.method}")
    given = {
        "form": getattr(arguments, "form", None),
        "strength_for": _strength_for(arguments.strength_for),
        "budget": _budget(arguments),
    }
    if realign:
        given |= {name: getattr(arguments, name) for name in ("strength", "target", "opposed")}
        given["edge"] = None if arguments.edge is None else arguments.edge == "auto"
        return Realignment(**_stated(given))
    partial, left, right = (
        arguments.lambda_partial,
        arguments.lambda_left,
        arguments.lambda_right,
    )
    if partial is not None and (left is not None or right is not None):
        raise UsageError("--lambda-partial stands for both --lambda-left and --lambda-right")
    given |= {
        "lambda_aligned": arguments.lambda_aligned,
        "lambda_left": partial if left is None else left,
        "lambda_right": partial if right is None else right,
        "lambda_off": arguments.lambda_off,
        "granularity": arguments.granularity,
    }
    return Correction(**_stated(given))


def _strength_for(given: list[str] | None) -> dict[str, float | str]:
    """The patterns in the order in which they were last given."""
    found: dict[str, float | str] = {}
    for text in given or ():
        pattern, _, value = text.rpartition("=")
        if not pattern:
            raise UsageError(f"--strength-for {text}: PATTERN=VALUE is needed")
        found.pop(pattern, None)
        found[pattern] = value if value == "drop" else _number("--strength-for", text, value)
    return found


def _budget(arguments: argparse.Namespace) -> dict[str, float] | None:
    if arguments.budget is None:
        return None
    for name in _FOUND:
        if getattr(arguments, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} cannot be given with --budget, which finds the strength")
    if len(arguments.budget) > 1:
        raise UsageError("--budget can be given once: one strength keeps to one limit")
    kind, _, value = arguments.budget[0].partition("=")
    return {kind: _number("--budget", arguments.budget[0], value)}


def _number(option: str, text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{option} {text}: {value!r} is no number") from None


def _stated(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given; the settings know their defaults."""
    return {name: value for name, value in options.items() if value is not None}
