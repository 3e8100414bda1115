"""One trained world as csulora sees it: adapter, subspace and D, and adapters merged into its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import csulora
from bench.safety.model import Weights
from bench.safety.stages import SCALE, Trained
from csulora import LoraAdapter, SafetySubspace

RANK = 64


@dataclass(frozen=True)
class Problem:
    """The adapter to correct, the subspace of its model pair, and D (d_out, d_in) by module."""

    adapter: LoraAdapter
    subspace: SafetySubspace
    D: Weights
    aligned: Weights

    @classmethod
    def of(cls, trained: Trained) -> Problem:
        A, B = trained.lora.A, trained.lora.B
        tensors = {f"base_model.model.{n}.lora_A.weight": A[n][0] for n in A}
        tensors |= {f"base_model.model.{n}.lora_B.weight": B[n][0] for n in B}
        rank = next(iter(A.values())).shape[1]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": SCALE * rank,
            "target_modules": sorted({n.rpartition(".")[2] for n in A}),
        }
        adapter = LoraAdapter.from_tensors(tensors, config)
        with tempfile.TemporaryDirectory() as folder:
            pair = [Path(folder, name) for name in ("base", "aligned")]
            for path, weights in zip(pair, (trained.base, trained.aligned), strict=True):
                path.mkdir()
                (path / "config.json").write_text('{"model_type": "llama"}')
                own = {n: X[0].contiguous() for n, X in weights.items()}
                save_file(own, path / "model.safetensors", {"format": "pt"})
            subspace = csulora.estimate(*pair, rank=RANK, modules=list(A), device="cpu")
        D = {n: (trained.aligned[f"{n}.weight"] - trained.base[f"{n}.weight"])[0] for n in A}
        return cls(adapter, subspace, D, trained.aligned)

    def merged(self, adapters: Sequence[LoraAdapter]) -> Weights:
        """The aligned weights with each adapter's update added, (adapters, d_out, d_in), in float32."""
        return {
            f"{name}.weight": torch.stack(
                [self.aligned[f"{name}.weight"][0] + update(a, name) for a in adapters]
            )
            for name in self.adapter.modules
        }

    def shared(self) -> Weights:
        """The aligned weights that no adapter changes."""
        changed = {f"{name}.weight" for name in self.adapter.modules}
        return {name: X for name, X in self.aligned.items() if name not in changed}

    def only(self, corrected: LoraAdapter, kinds: Collection[str]) -> LoraAdapter:
        """The correction of modules of these kinds alone, all others as they were."""
        modules = {
            name: corrected.modules[name] if name.rpartition(".")[2] in kinds else m
            for name, m in self.adapter.modules.items()
        }
        return replace(self.adapter, modules=modules)


def update(adapter: LoraAdapter, name: str) -> Tensor:
    """dW of one module."""
    m = adapter.modules[name]
    return m.scaling * m.B @ m.A
