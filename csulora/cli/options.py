"""What each command accepts. The commands themselves are imported only when they run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from csulora.errors import UsageError
from csulora.settings import Correction

Commands = Any  # argparse's own type for add_subparsers() is private


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        return importlib.import_module(f"csulora.cli.{name}").run(arguments)

    return run


def add_estimate(commands: Commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="estimate the safety-aligned subspace of a model pair",
        description="Estimate the safety-aligned subspace from the difference of two checkpoints.",
    )
    parser.add_argument("base", metavar="BASE", help="base checkpoint: a folder or a hub id")
    parser.add_argument("aligned", metavar="ALIGNED", help="its aligned version, likewise")
    parser.add_argument("--out", required=True, metavar="FILE", help="subspace file to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, default=64, help="directions per module (default: 64)")
    size.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="as many directions as hold this share of ||W_aligned - W_base||^2",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--modules",
        metavar="NAME,...",
        help="modules by name or ending, as in PEFT's target_modules (default: all linear ones)",
    )
    which.add_argument("--like", metavar="ADAPTER", help="the modules that this adapter updates")
    parser.add_argument("--seed", type=int, default=0, help="of the randomized SVD (default: 0)")
    _add_device(parser)
    _add_json(parser)
    parser.set_defaults(run=_command("estimate"))


def add_correct(commands: Commands) -> None:
    parser = commands.add_parser(
        "correct",
        help="correct one or many adapters",
        description="Correct PEFT LoRA adapters; each becomes a folder under --out-dir.",
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="ADAPTER",
        help="adapter folder, hub id, folder of adapters, or a quoted pattern such as 'adapters/**'",
    )
    parser.add_argument(
        "--adapters-from", metavar="FILE|-", help="read further adapters from a file, one a line"
    )
    _add_subspace(parser)
    parser.add_argument("--out-dir", required=True, metavar="DIR", help="where to write")
    _add_strengths(parser)
    parser.add_argument(
        "--rank",
        choices=("exact", "same"),
        default="exact",
        help="exact: rank 2r, nothing lost (default); same: a rank-r fit",
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="type of the written factors (default: each factor's own)",
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="write the form that PEFT, vLLM, SGLang and LoRAX read alike",
    )
    parser.add_argument(
        "--pass-through",
        action="store_true",
        help="copy tensors that are not a LoRA update on a linear weight instead of refusing",
    )
    parser.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto")
    _add_device(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="adapters corrected at once (default: one a core; with --device cuda one)",
    )
    parser.add_argument(
        "--batch-bytes",
        type=_bytes,
        default="1G",
        metavar="SIZE",
        help="memory for adapters that are read and not yet written, as 512M or 4G (default: 1G)",
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where to run (default: local)"
    )
    parser.add_argument(
        "--ray-address", metavar="A", help="of a running Ray cluster (default: one on this machine)"
    )
    parser.add_argument(
        "--probe", action="store_true", help="first measure how fast these files can be copied"
    )
    parser.add_argument(
        "--page", metavar="FILE.html|.png", help="write a page about the batch and its outliers"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    existing.add_argument("--resume", action="store_true", help="skip outputs that are finished")
    _add_json(parser)
    parser.set_defaults(run=_command("correct"))


def add_inspect(commands: Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show how an adapter lies relative to the subspace",
        description="Relative energies per module, and what strengths would do; writes no adapter.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or hub id")
    _add_subspace(parser)
    _add_strengths(parser)
    parser.add_argument(
        "--pass-through",
        action="store_true",
        help="leave out tensors that are not a LoRA update on a linear weight instead of refusing",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="heat maps, before and after")
    _add_device(parser)
    _add_json(parser)
    parser.set_defaults(run=_command("inspect"))


def add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="run everything on a small model that ships with the package",
        description="Estimate, correct, inspect and measure on a small shipped model; no network.",
    )
    parser.add_argument(
        "--out-dir", default="csulora-demo", metavar="DIR", help="default: csulora-demo"
    )
    parser.set_defaults(run=_command("demo"))


def correction_from(arguments: argparse.Namespace) -> Correction:
    """The Correction that the strength options describe; raises UsageError if they contradict."""
    partial, left, right = (
        arguments.lambda_partial,
        arguments.lambda_left,
        arguments.lambda_right,
    )
    if partial is not None and (left is not None or right is not None):
        raise UsageError("--lambda-partial stands for both --lambda-left and --lambda-right")
    default = Correction()
    both = default.lambda_left if partial is None else partial
    return Correction(
        lambda_aligned=arguments.lambda_aligned,
        lambda_left=both if left is None else left,
        lambda_right=both if right is None else right,
        lambda_off=arguments.lambda_off,
        granularity=arguments.granularity,
        rank=getattr(arguments, "rank", "exact"),
    )


def _add_strengths(parser: argparse.ArgumentParser) -> None:
    default = Correction()
    group = parser.add_argument_group(
        "strengths",
        "numbers from 0 (keep) to inf (remove); relative energy e gives 1 / (1 + lambda e)",
    )
    for name, meaning in (
        ("partial", "both partially aligned blocks (default: 10)"),
        ("left", "the block inside on the left, outside on the right"),
        ("right", "the block outside on the left, inside on the right"),
    ):
        group.add_argument(f"--lambda-{name}", type=float, metavar="X", help=meaning)
    group.add_argument(
        "--lambda-off",
        type=float,
        default=default.lambda_off,
        metavar="X",
        help="the off-subspace block (default: 10)",
    )
    group.add_argument(
        "--lambda-aligned",
        type=float,
        default=default.lambda_aligned,
        metavar="X",
        help="the fully aligned block (default: 0)",
    )
    group.add_argument(
        "--granularity",
        choices=("direction", "component"),
        default=default.granularity,
        help="attenuate each direction of a block (default) or the block as a whole",
    )


def _add_subspace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subspace", required=True, metavar="FILE", help="from csulora estimate")
    parser.add_argument(
        "--subspace-rank", type=int, metavar="k", help="use only the k leading directions"
    )


def _bytes(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1:].upper())
    number = float(text if factor is None else text[:-1])
    if not 1 <= number * (factor or 1) < 1 << 63:
        raise ValueError(text)
    return int(number * (factor or 1))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="results on stdout as JSON")
