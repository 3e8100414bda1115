"""Whether a change of the code changed a result: one sha256 for each output and report, by name.

    python bench/fingerprint.py > before.json           then change the code
    python bench/fingerprint.py --compare before.json   exit 1 and the names of the cases that differ

Run it at the root of a checkout: `csulora` comes from the current folder. Everything runs on the CPU,
in one thread, Triton under its interpreter. Hashes compare on one machine and one set of packages.
Left out: times, the journal, errors about existing outputs, which name a remedy, and the word for
`exact` and `same`, which is a result's form and once was called its rank.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.getcwd())
os.environ |= {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}  # the path is for Ray's workers
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import re
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

import csulora.cli
from csulora import CsuloraError, LoraAdapter, LoraModule, SafetySubspace
from csulora.subspace import ModuleSubspace, Origin
from csulora_kernels import GRANULARITIES

correct_batch = getattr(csulora, "correct_batch", None) or csulora.correction.correct_batch
F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
# (d_out, d_in, directions); the weight of `e` is stored as (d_in, d_out), in `d` nothing moved.
SIDES = {"a": (24, 16, 4), "b": (16, 24, 4), "c": (20, 20, 3), "d": (12, 18, 0), "e": (14, 22, 5)}
STRENGTHS = {"default": (), "different": (1, 2, 3, math.inf), "identity": (0, 0, 0, 0),
             "strong": (1e4, 1e4, 1e3, 10)}  # fmt: skip
OUTPUTS: Any = {"keep": {}, "bfloat16": {"dtype": B16}, "portable": {"portable": True},
                "portable float16": {"portable": True, "dtype": F16}}  # fmt: skip
EVERY = product(("exact", "same"), GRANULARITIES, STRENGTHS, OUTPUTS)
INTERPRETED = (  # seconds a module, so only some
    ("exact", "direction", "different", "keep", ("bfloat16", "patterns", "turned", "nan", "wide")),
    ("exact", "component", "identity", "bfloat16", ("mixed", "tiny both", "misfit")),
    ("same", "component", "default", "bfloat16", ("float16", "deficient")),
    ("same", "direction", "strong", "portable", ("float16", "deficient")),
)
COMMANDS = (  # one after the other into one folder
    "{} --rank same --portable --dtype float16",
    "{} --rank same --portable --dtype float16 --resume",
    "{} --rank same --portable --resume",
    "{} --pass-through --dtype bfloat16 --lambda-aligned 1e4 --subspace-rank 2 --overwrite",
    "{}/mixed --lambda-off inf --backend triton --overwrite",
)


def settings(form: str | None, granularity: str = "direction", name: str = "different") -> Any:
    word = "form" if hasattr(csulora.Correction(), "form") else "rank"
    options = {"granularity": granularity, word: form}
    return form and csulora.Correction(*STRENGTHS[name], **options)


def make_subspace() -> SafetySubspace:
    random, modules = torch.Generator().manual_seed(0), {}
    for name, (*sides, k) in SIDES.items():
        U, V = (torch.linalg.qr(torch.randn(d, k, generator=random))[0].contiguous() for d in sides)
        modules[name] = ModuleSubspace(U, torch.arange(k, 0, -1, dtype=F32), V, 0.5, name == "e")
    return SafetySubspace(modules, Origin("base", "aligned", "0" * 64, "1" * 64, 0))


def lora(names: str, r: int = 3, A: Any = F32, B: Any = F32, flip: bool = False,
         sizes: tuple[float, float] = (1, 1), **config: Any) -> LoraAdapter:  # fmt: skip
    """An adapter with its PEFT configuration; types and sizes of its A and B."""
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "fan_in_fan_out": flip} | config
    random, modules = torch.Generator().manual_seed(1), {}
    for name in names:
        d_out, d_in = SIDES[name][1::-1] if flip else SIDES[name][:2]
        rank = config.get("rank_pattern", {}).get(name, r)
        alpha = config.get("alpha_pattern", {}).get(name, 6)
        X = (sizes[0] * torch.randn(rank, d_in, generator=random)).to(A)
        Y = (sizes[1] * torch.randn(d_out, rank, generator=random)).to(B)
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[f"model.{name}"] = LoraModule(X, Y, alpha, scaling)
    return LoraAdapter(modules, config)


def others(adapter: Any) -> dict[str, torch.Tensor]:
    """Tensors that are passed through, under the field's present or former name."""
    return adapter.passed_through if hasattr(adapter, "passed_through") else adapter.extra


def make_adapters() -> dict[str, LoraAdapter]:
    some = {"rank_pattern": {"b": 2, "c": 5}, "alpha_pattern": {"a": 7.5, "c": 1}}
    made = {
        "plain": lora("abce"), "bfloat16": lora("ca", 5, B16, B16), "float16": lora("ba", 2, F16, F16),
        "mixed": lora("ab", 2, F16), "rslora": lora("ab", 4, use_rslora=True), "extra": lora("ab"),
        "patterns": lora("abc", **some), "both": lora("acb", 4, B16, use_rslora=True, **some),
        "turned": lora("ab", flip=True), "stored turned": lora("ae", fan_in_fan_out=True),
        "tiny": lora("abc", sizes=(1e-30, 1)), "tiny both": lora("ab", sizes=(1e-25, 1e-25)),
        "huge": lora("ab", sizes=(1, 1e25)), "zero": lora("ab", sizes=(1, 0)), "wide": lora("a", 130),
        "unmoved": lora("da"), "misfit": lora("e", flip=True), "deficient": lora("ab", 4),
        "elsewhere": lora("a"), "nan": lora("ab"),
    }  # fmt: skip
    made["nan"].modules["model.a"].A[0, 0] = math.nan
    made["deficient"].modules["model.a"].A[1] = made["deficient"].modules["model.a"].A[0]
    made["elsewhere"].modules["x"] = made["elsewhere"].modules.pop("model.a")
    others(made["extra"])["base_model.model.norm.weight"] = torch.ones(4)
    return made


def as_json(value: Any) -> Any:
    """A tensor, adapter, error or report; what was not copied shows only in the written report."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, LoraAdapter):
        rows = [(n, m.A, m.B, float(m.alpha), m.scaling) for n, m in value.modules.items()]
        return [rows, list(others(value).items())]
    if isinstance(value, Exception):
        return repr(value)
    return {key: entry for key, entry in value.to_dict().items() if key != "left_out"}


class Cases(dict[str, str]):
    place = Path(tempfile.gettempdir())

    def add(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """A value, or what a function of the library returns or raises."""
        assert name not in self, name
        if callable(value):
            try:
                value = value(*arguments, device="cpu", **options)
            except CsuloraError as error:
                value = error
        text = json.dumps(value, default=as_json).replace(str(self.place), "PLACE")
        value = json.loads(re.sub(r'\brank(\\?": \\?"| )(exact|same)\b', r"form\1\2", text))
        self[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def files(self, name: str, folder: Path) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.name != "csulora_journal.jsonl":
                self.add(f"{name}/{path.relative_to(folder)}", path.read_bytes().decode("latin-1"))

    def outcome(self, name: str, adapter: str, status: str, kind: Any, error: Any) -> None:
        error = None if kind in ("exists", "changed") else error
        self.add(f"{name}/outcome/{Path(adapter).name}", (status, kind, error))

    def command(self, name: str, *arguments: object) -> Any:
        """The JSON that a command prints; its exit code is a case."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = csulora.cli.main([*map(str, arguments), "--device", "cpu", "--json"])
        self.add(f"{name}/exit", code)
        return json.loads(out.getvalue())


def in_memory(cases: Cases, adapters: dict[str, LoraAdapter], subspace: SafetySubspace) -> None:
    runs = [("torch", *choices, tuple(adapters)) for choices in EVERY]
    for backend, *how, output, names in runs + [("triton", *choices) for choices in INTERPRETED]:
        options = {"backend": backend, "device": "cpu", **OUTPUTS[output]}
        some = [adapters[name] for name in names]
        found = correct_batch(some, subspace, settings(*how), **options)
        for name, result in zip(names, found, strict=True):
            cases.add("/".join((backend, *how, output, name)), result)
    for form, name in product((None, "exact", "same"), adapters):
        arguments = adapters[name], subspace, settings(form)
        cases.add(f"decompose/{form or 'default'}/{name}", csulora.decompose, *arguments)
        cases.add(f"correct/{form or 'default'}/{name}", csulora.correct, *arguments)
    for name in ("zero", "huge"):
        arguments = adapters[name], subspace
        cases.add(f"correct/triton/{name}", csulora.correct, *arguments, backend="triton")


def on_disk(cases: Cases, adapters: dict[str, LoraAdapter], ray: bool) -> None:
    place, tree, file = cases.place, cases.place / "in", cases.place / "subspace.safetensors"
    bad = dict.fromkeys(("bad/truncated", "bad/another method"), adapters["plain"])
    for name, adapter in (adapters | bad).items():
        adapter.save(tree / name)
        adapter.save(tree / name / "checkpoint")  # other weights, which are not copied
    os.truncate(tree / "bad/truncated/adapter_model.safetensors", 1000)
    config = tree / "bad/another method/adapter_config.json"
    config.write_text(config.read_text().replace("LORA", "IA3"))
    make_subspace().save(file)
    cases.files("input", place)
    subspace = SafetySubspace.load(file)
    for form, (name, adapter) in product(("exact", "same"), adapters.items()):
        with contextlib.suppress(CsuloraError):
            new, report = csulora.correct(adapter, subspace, settings(form), device="cpu")
            new.save(place / "saved" / form / name, report=report.to_dict())
    cases.files("saved", place / "saved")
    runs: Any = [("batch", "exact", {}), ("batch", "exact", {})]
    runs += [("batch", form, {"existing": "resume"}) for form in ("exact", "same")]
    runs += [("jobs", "same", {"pass_through": True, "jobs": 2})]
    runs += [("ray", "same", {"pass_through": True, "engine": "ray"})] * ray
    for i, (name, form, options) in enumerate(runs):
        how, out, name = settings(form), place / name, f"{name}/{i}"
        for one in csulora.correct_many([tree], subspace, out, how, device="cpu", **options):
            cases.outcome(name, one.adapter, one.status, one.kind, one.error)
        cases.files(name, out)
    for line in COMMANDS:
        name, out = line.format("command"), place / "command"
        options = ("--subspace", file, "--jobs", 1, "--out-dir", out, *line.format(tree).split())
        for one in cases.command(name, "correct", *options)["adapters"]:
            cases.outcome(name, *map(one.get, ("adapter", "status", "kind", "error")))
        cases.files(name, out)
    for name in ("plain", "both", "turned", "deficient"):
        options = ("--subspace", file, "--lambda-aligned", 2)
        found = cases.command(f"inspect/{name}", "inspect", tree / name, *options)
        cases.add(f"inspect/{name}", {k: found[k] for k in found.keys() - {"left_out", "format"}})


def main() -> int:
    parser = argparse.ArgumentParser(description="One sha256 for each output and report.")
    parser.add_argument("--compare", metavar="FILE", help="what an earlier run printed")
    parser.add_argument("--no-ray", action="store_true", help="leave out the cases named ray/...")
    arguments = parser.parse_args()
    print(f"results of {csulora.__file__}", file=sys.stderr)
    torch.set_num_threads(1)
    cases, adapters = Cases(), make_adapters()
    ray = not arguments.no_ray and importlib.util.find_spec("ray") is not None
    with tempfile.TemporaryDirectory() as place:
        cases.place = Path(place).resolve()
        on_disk(cases, adapters, ray)
    in_memory(cases, adapters, make_subspace())
    if arguments.compare is None:
        print(json.dumps(cases, indent=1))
        return 0
    before = json.loads(Path(arguments.compare).read_text())
    names = [n for n in before if ray or not n.startswith("ray/")]
    differing = [name for name in names if before[name] != cases.get(name)]
    new = len(cases.keys() - before.keys())
    print(*differing, f"{len(differing)} of {len(names)} cases differ, {new} are new", sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
