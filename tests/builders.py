"""Small checkpoints, adapters and subspaces on disk, written without the code under test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csulora import LoraAdapter, ModuleSubspace, Origin, SafetySubspace
from csulora.cli import main

HERE = Path(__file__).parent
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SHAPES = {LAYERS[0]: (24, 16), LAYERS[1]: (16, 24)}
NORM = "model.layers.0.input_layernorm.weight"
PREFIX = "base_model.model."
WEIGHTS, CONFIG, REPORT = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "csulora_report.json",
)
JOURNAL = "csulora_journal.jsonl"
FORMAT = "csulora_subspace/1"


def lora_names(module: str) -> tuple[str, str]:
    """The names of a module's two factors in an adapter file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object in a file; None removes a key."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: entry for key, entry in value.items() if entry is not None})


def write_guard(path: Path, settings: Mapping[str, object] | None = None, **values: object) -> Path:
    """A configuration of the guard, with a table of settings if there are any; None leaves a key out."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None]
    if settings is not None:
        lines += ["[settings]", *(f"{k} = {json.dumps(v)}" for k, v in settings.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after `change` has altered its tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: X.contiguous() for name, X in tensors.items()}, path, {"format": "pt"})


def raw_safetensors(header: object, body: bytes = b"", *, claim: int | None = None) -> bytes:
    """A file in the layout of safetensors with any header text and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claim is None else claim).to_bytes(8, "little") + text + body


def raw_entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    """(n, k) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    """(m, n) whose singular values are values(1, 2, ...)."""
    count = min(m, n)
    index = torch.arange(1, count + 1, dtype=torch.float64)
    return ((orthonormal(m, count, 1) * values(index)) @ orthonormal(n, count, 2).mT).float()


def checkpoint_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(32, 16, generator=generator)
    tensors[NORM] = torch.ones(16)
    return {name: X.to(dtype) for name, X in tensors.items()}


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    sharded: bool = False,
    model_type: str = "llama",
) -> Path:
    """A checkpoint folder: one file, or two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": model_type})
    if not sharded:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def checkpoint_pair(
    root: Path, *, dtype: torch.dtype = torch.float32, sharded: bool = False
) -> tuple[Path, Path]:
    """Folders of a base and an aligned checkpoint that differ in every linear weight."""
    base, moved = checkpoint_tensors(0, dtype), checkpoint_tensors(1, dtype)
    aligned = {name: base[name] + 0.1 * moved[name] for name in base}
    return (
        write_checkpoint(root / "base", base, sharded=sharded),
        write_checkpoint(root / "aligned", aligned, sharded=sharded),
    )


def write_adapter(
    folder: Path,
    *,
    shapes: dict[str, tuple[int, int]] | None = None,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: object,
) -> Path:
    """A PEFT adapter folder with a model card beside the two defining files."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_out, d_in) in (SHAPES if shapes is None else shapes).items():
        A, B = lora_names(module)
        tensors[A] = torch.randn(rank, d_in, generator=generator).to(dtype)
        tensors[B] = 0.1 * torch.randn(d_out, rank, generator=generator).to(dtype)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    plain = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/aligned",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "bias": "none",
    }
    write_json(folder / CONFIG, plain | config)
    (folder / "README.md").write_text("a model card\n", encoding="utf-8")
    return folder


def subspace_tensors(
    shapes: dict[str, tuple[int, int]] | None = None, *, rank: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, sides in (SHAPES if shapes is None else shapes).items():
        for letter, size in zip("UV", sides, strict=True):
            tensors[f"{module}.{letter}"] = torch.linalg.qr(
                torch.randn(size, rank, generator=generator)
            )[0].contiguous()
        tensors[f"{module}.S"] = torch.arange(rank, 0, -1, dtype=torch.float32)
    return tensors


def write_subspace(path: Path, tensors: dict[str, Tensor] | None = None, **changes: str) -> Path:
    """A subspace file, by the format's description."""
    tensors = subspace_tensors() if tensors is None else tensors
    metadata = {
        "csulora_format": FORMAT,
        "base": "base",
        "aligned": "aligned",
        "base_digest": "0" * 64,
        "aligned_digest": "1" * 64,
        "seed": "0",
        "energy_share": json.dumps({name.rpartition(".")[0]: 0.5 for name in tensors}),
        "fan_in_fan_out": "[]",
    }
    save_file(tensors, path, metadata | changes)
    return path


def random_subspace(adapter: LoraAdapter, rank: int = 4) -> SafetySubspace:
    """In memory, of the modules of an adapter, from torch's own generator."""
    modules = {
        name: ModuleSubspace(
            torch.linalg.qr(torch.randn(module.B.shape[0], rank))[0],
            torch.ones(rank),
            torch.linalg.qr(torch.randn(module.A.shape[1], rank))[0],
            0.5,
            module.embedding,  # whose bases are given in the orientation of B A
        )
        for name, module in adapter.modules.items()
    }
    return SafetySubspace(modules, Origin("base", "aligned", "", "", 0))


def effective(folder: Path) -> dict[str, Tensor]:
    """The update of each module of an adapter folder, by PEFT's rule for uniform configurations."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    modules = {n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}
    return {
        name.removeprefix(PREFIX): (config["lora_alpha"] / config["r"])
        * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name in sorted(modules)
    }


def names(folder: Path) -> list[str]:
    """What is directly in a folder, hidden entries too."""
    return sorted(entry.name for entry in folder.iterdir())


def change_weights(adapter: Path) -> None:
    edit_tensors(adapter / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path, hidden ones too, but no journal (it holds times)."""
    return {
        str((Path(place) / file).relative_to(folder)): (Path(place) / file).read_bytes()
        for place, _, files in os.walk(folder)
        for file in files
        if file != JOURNAL
    }


def outputs(folder: Path) -> list[str]:
    """What lies in an output folder beside the journal, hidden entries too."""
    return sorted(path.name for path in folder.iterdir() if path.name != JOURNAL)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines that say what failed."""
        starts = ("csulora: error:", "csulora: failed:")
        return [line for line in self.err.split("\n") if line.startswith(starts)]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.split("\n") if line.startswith("csulora: warning:")]


def run(capsys, *arguments: object) -> Result:
    """One command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse, on a malformed call
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def run_correct(capsys, *arguments: object) -> Result:
    """`csulora correct` in this process."""
    return run(capsys, "correct", *arguments)


def outcomes(result: Result) -> dict[str, tuple[str, str | None]]:
    """(status, kind) of each adapter that `csulora correct --json` told of, by its name."""
    return {
        os.path.basename(entry["adapter"]): (entry["status"], entry.get("kind"))
        for entry in json.loads(result.out)["adapters"]
    }


def journal_lines(out: Path) -> list[dict]:
    lines = (out / JOURNAL).read_bytes().splitlines()
    return [json.loads(line) for line in lines if line.startswith(b"{")]
