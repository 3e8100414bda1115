"""What each command accepts. The commands themselves are imported only when they run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from csulora.cli.method_options import add_method
from csulora.cli.serving_options import add_check, add_guard, add_keys
from csulora.cli.sweep_options import add_evaluation, add_grid
from csulora.settings import BACKENDS, ENGINES, FORMS

Commands = Any  # argparse's own types for parsers and groups of options are private
Group = Any

DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_estimate(commands: Commands) -> None:
    parser = _command(
        commands,
        "estimate",
        help="estimate the safety-aligned subspace of a model pair",
        description="Estimate the safety-aligned subspace from the difference of two checkpoints.",
        examples="""
  csulora estimate meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct --out subspace.safetensors
  csulora estimate base/ aligned/ --out subspace.safetensors --rank 32 --modules q_proj,v_proj
  csulora estimate base/ aligned/ --out subspace.safetensors --like my-adapter""",
    )
    parser.add_argument("base", metavar="BASE", help="base checkpoint: a folder or a hub id")
    parser.add_argument("aligned", metavar="ALIGNED", help="its aligned version, likewise")
    parser.add_argument("--out", required=True, metavar="FILE", help="subspace file to write")
    group = parser.add_argument_group("what is estimated")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=int, default=64, metavar="k", help="directions per module (default: 64)"
    )
    size.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="as many directions as hold this share of ||W_aligned - W_base||^2",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--modules",
        metavar="NAME,...",
        help="modules by name or ending, as in PEFT's target_modules (default: all linear ones)",
    )
    which.add_argument("--like", metavar="ADAPTER", help="the modules that this adapter updates")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the randomized SVD (default: 0)"
    )
    group = parser.add_argument_group("where it runs")
    _add_backend(group)
    _add_device(group)
    _add_json(parser.add_argument_group("what is shown"))


def add_correct(commands: Commands) -> None:
    parser = _command(
        commands,
        "correct",
        help="correct one or many adapters",
        description="Correct PEFT LoRA adapters; each becomes a folder under --out-dir.",
        examples="""
  csulora correct my-adapter --subspace subspace.safetensors --out-dir corrected
  csulora correct my-adapter --subspace subspace.safetensors --out-dir corrected --form same --portable
  csulora correct 'adapters/**' --subspace subspace.safetensors --out-dir corrected --resume --probe""",
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="ADAPTER",
        help="adapter folder, hub id, folder of adapters, or a quoted pattern such as 'adapters/**'",
    )
    _add_subspace(parser)
    parser.add_argument("--out-dir", required=True, metavar="DIR", help="where to write")
    add_method(parser)
    _add_form(parser.add_argument_group("form of the result"))
    _add_refusals(parser.add_argument_group("what is refused"))
    _add_batch(parser.add_argument_group("many adapters"))
    _add_running(parser.add_argument_group("where it runs"))
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--probe", action="store_true", help="first measure how fast these files can be copied"
    )
    group.add_argument(
        "--page", metavar="FILE.html|.png", help="write a page about the batch and its outliers"
    )
    _add_json(group)


def add_inspect(commands: Commands) -> None:
    parser = _command(
        commands,
        "inspect",
        help="show how an adapter lies relative to the subspace",
        description="Relative energies per module, and what strengths would do; writes no adapter.",
        examples="""
  csulora inspect my-adapter --subspace subspace.safetensors
  csulora inspect my-adapter --subspace subspace.safetensors --lambda-off 100 --plot shares.png""",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or hub id")
    _add_subspace(parser)
    add_method(parser)
    group = parser.add_argument_group("where it runs")
    _add_device(group)
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--pass-through",
        action="store_true",
        help="leave out tensors that are not a LoRA update on a linear weight or embedding instead of "
        "refusing",
    )
    group.add_argument("--plot", metavar="FILE.png", help="heat maps, before and after")
    _add_json(group)


def add_sweep(commands: Commands) -> None:
    parser = _command(
        commands,
        "sweep",
        help="compare settings, and find the best one by an evaluation of yours",
        description="Energies of many settings at once; with --eval the best of them by what your "
        "command measures, beside the controls.",
        examples="""
  csulora sweep my-adapter --subspace s.safetensors --out-dir swept
  csulora sweep my-adapter --subspace s.safetensors --out-dir swept --eval 'python measure.py {adapter}'
  csulora sweep my-adapter --subspace s.safetensors --out-dir swept --methods realign --ranks 16,64""",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or hub id")
    parser.add_argument("--subspace", required=True, metavar="FILE", help="from csulora estimate")
    parser.add_argument(
        "--out-dir", required=True, metavar="DIR", help="where everything is written"
    )
    add_grid(parser.add_argument_group("what is swept"))
    add_evaluation(parser.add_argument_group("evaluation"))
    _add_device(parser.add_argument_group("where it runs"))
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--pass-through",
        action="store_true",
        help="leave tensors that are not a LoRA update on a linear weight or embedding as they are "
        "instead of refusing",
    )
    _add_json(group)


def add_verify(commands: Commands) -> None:
    parser = _command(
        commands,
        "verify",
        help="say whether outputs are still what was written",
        description="Compare outputs with their reports and, where given, with source and subspace.",
        examples="""
  csulora verify corrected
  csulora verify corrected/my-adapter --source my-adapter --subspace subspace.safetensors""",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="an output, or a folder that holds some"
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="the adapter it was made of, or the folder that holds those of all, laid out alike",
    )
    parser.add_argument("--subspace", metavar="FILE", help="the subspace it was made with")
    group = parser.add_argument_group("where it runs")
    _add_backend(group)
    _add_device(group)
    _add_json(parser.add_argument_group("what is shown"))


def add_sign(commands: Commands) -> None:
    parser = _command(
        commands,
        "sign",
        help="sign outputs, for a guard that serves only what a key of yours signed",
        description="Sign outputs of csulora with an Ed25519 key; each gets csulora_signature.json.",
        examples="""
  csulora sign --new-key ops
  csulora sign corrected --key ops.pem""",
    )
    add_keys(parser)
    _add_json(parser.add_argument_group("what is shown"))


def add_serve_check(commands: Commands) -> None:
    parser = _command(
        commands,
        "serve-check",
        help="say what a server would refuse, or whether a running one is guarded",
        description="Decide about adapter folders as a guarded server would, and throw the results away; "
        "or ask a running server with --url whether it is guarded.",
        examples="""
  csulora serve-check --config csulora.toml --max-lora-rank 64
  csulora serve-check my-adapter --config csulora.toml --stack sglang
  csulora serve-check --url http://localhost:8000 --api-key-env VLLM_API_KEY""",
    )
    add_check(parser)
    _add_json(parser.add_argument_group("what is shown"))


def add_prewarm(commands: Commands) -> None:
    parser = _command(
        commands,
        "prewarm",
        help="correct adapters into the cache of a guarded server",
        description="Fill the cache of a guarded server: adapters of its folders, or those named.",
        examples="""
  csulora prewarm --config csulora.toml --max-lora-rank 64
  csulora prewarm my-adapter --config csulora.toml""",
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="ADAPTER",
        help="adapter folder, or folder or pattern of some",
    )
    add_guard(parser)
    _add_jobs(parser)
    _add_json(parser.add_argument_group("what is shown"))


def add_demo(commands: Commands) -> None:
    parser = _command(
        commands,
        "demo",
        help="run everything on a small model that ships with the package",
        description="Estimate, correct, inspect and measure on a small shipped model; no network.",
        examples="""
  csulora demo
  csulora demo --out-dir figures""",
    )
    parser.add_argument(
        "--out-dir",
        default="csulora-demo",
        metavar="DIR",
        help="where figures and numbers are written (default: csulora-demo)",
    )


def _command(commands: Commands, name: str, *, examples: str, **texts: str) -> Any:
    """A parser whose arguments go to `run` of the command's own module."""
    parser = commands.add_parser(
        name,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **texts,
    )
    parser.set_defaults(run=_runner(name))
    return parser


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        return importlib.import_module(f"csulora.cli.{name.replace('-', '_')}").run(arguments)

    return run


def _add_form(group: Group) -> None:
    group.add_argument(
        "--form",
        choices=FORMS,
        help="exact: nothing lost, rank 2r (default of csulora) or r + k; same: rank r, for csulora a "
        "fit, for realign with B as it is (its default)",
    )
    # The option's former name.
    group.add_argument(
        "--rank",
        dest="form",
        choices=FORMS,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="type of the written factors (default: each factor's own)",
    )
    group.add_argument(
        "--portable",
        action="store_true",
        help="write the form that PEFT, vLLM, SGLang and LoRAX read alike",
    )


def _add_refusals(group: Group) -> None:
    group.add_argument(
        "--pass-through",
        action="store_true",
        help="copy tensors that are not a LoRA update on a linear weight or embedding instead of "
        "refusing",
    )
    group.add_argument(
        "--again", action="store_true", help="correct outputs of csulora once more, too"
    )
    group.add_argument(
        "--strict-base",
        action="store_true",
        help="refuse adapters that name neither model of the subspace, instead of a warning",
    )


def _add_batch(group: Group) -> None:
    group.add_argument(
        "--adapters-from", metavar="FILE|-", help="read further adapters from a file, one a line"
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    existing.add_argument("--resume", action="store_true", help="skip outputs that are finished")


def _add_running(group: Group) -> None:
    _add_backend(group)
    _add_device(group)
    _add_jobs(group, "; with --device cuda one")
    group.add_argument(
        "--batch-bytes",
        type=_size,
        default="1G",
        metavar="SIZE",
        help="memory for adapters that are read and not yet written, as 512M or 4G (default: 1G)",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="threads of this process (local, default) or workers of a Ray cluster (ray)",
    )
    group.add_argument(
        "--ray-address",
        metavar="A",
        help="of a running Ray cluster (default: one on this machine)",
    )


def _add_subspace(parser: Any) -> None:
    parser.add_argument("--subspace", required=True, metavar="FILE", help="from csulora estimate")
    parser.add_argument(
        "--subspace-rank", type=int, metavar="k", help="use only the k leading directions"
    )


def _size(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1:].upper())
    try:
        number = float(text if factor is None else text[:-1]) * (factor or 1)
    except ValueError:
        number = 0
    if not 1 <= number < 1 << 63:
        raise argparse.ArgumentTypeError(
            f"a number of bytes is wanted, as 512M or 4G, not {text!r}"
        )
    return int(number)


def _add_backend(group: Group) -> None:
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="triton works or says why not (default: auto, Triton on CUDA and torch elsewhere)",
    )


def _add_device(group: Group) -> None:
    group.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda (default: auto)"
    )


def _add_jobs(group: Group, exception: str = "") -> None:
    text = f"adapters corrected at once (default: one a core{exception})"
    group.add_argument("--jobs", type=int, metavar="N", help=text)


def _add_json(group: Group) -> None:
    group.add_argument("--json", action="store_true", help="results on stdout as JSON")
