"""Random adapters and a subspace that fits them, to try a batch run on.

    python bench/make_adapters.py --count 1000 --out-dir adapters --subspace subspace.safetensors

Adapters lie in tens below team folders (adapters/team-000/lora-00000, ...). They differ in how much of
their update lies inside the subspace, and one in two hundred lies almost outside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import MODELS, basis

from csulora import ModuleSubspace, SafetySubspace
from csulora.subspace import Origin

PER_FOLDER = 10
OUTLIER_EVERY = 200


def shapes_of(model: str, layers: int | None) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear module, by name."""
    kinds, all_layers = MODELS[model]
    return {
        f"model.layers.{layer}.{kind}": shape
        for layer in range(layers or all_layers)
        for kind, shape in kinds.items()
    }


def make_subspace(shapes: dict[str, tuple[int, int]], k: int) -> SafetySubspace:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, (d_out, d_in) in shapes.items():
        rank = min(k, d_out, d_in)
        modules[name] = ModuleSubspace(
            U=basis(d_out, rank, generator),
            S=torch.linspace(2, 1, rank),
            V=basis(d_in, rank, generator),
            energy_share=0.15,
        )
    return SafetySubspace(modules, Origin("example-base", "example-aligned", "0" * 64, "1" * 64, 0))


def write_adapter(
    folder: Path, number: int, subspace: SafetySubspace, r: int, dtype: torch.dtype
) -> None:
    """One PEFT folder; its number decides every byte."""
    generator = torch.Generator().manual_seed(number + 1)
    inside = 0.02 if number % OUTLIER_EVERY == OUTLIER_EVERY - 1 else 0.6
    inside *= 0.75 + 0.5 * float(torch.rand((), generator=generator))
    tensors = {}
    for name, module in subspace.modules.items():
        (d_out, k), d_in = module.U.shape, module.V.shape[0]
        A = torch.randn(r, d_in, generator=generator) / d_in**0.5
        A += inside * torch.randn(r, k, generator=generator) / k**0.5 @ module.V.mT
        B = torch.randn(d_out, r, generator=generator) / d_out**0.5
        B += inside * module.U @ torch.randn(k, r, generator=generator) / k**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (0.1 * B).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example-aligned",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": sorted({name.rpartition(".")[2] for name in subspace.modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out-dir", type=Path, default=Path("adapters"))
    parser.add_argument("--subspace", type=Path, default=Path("subspace.safetensors"))
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--layers", type=int, help="only the first layers of the model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--subspace-rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    subspace = make_subspace(shapes_of(arguments.model, arguments.layers), arguments.subspace_rank)
    subspace.save(arguments.subspace)
    for number in range(arguments.count):
        folder = arguments.out_dir / f"team-{number // PER_FOLDER:03d}" / f"lora-{number:05d}"
        write_adapter(folder, number, subspace, arguments.rank, getattr(torch, arguments.dtype))
    print(f"{arguments.count} adapters in {arguments.out_dir}, subspace {arguments.subspace}")


if __name__ == "__main__":
    main()
