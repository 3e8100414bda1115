"""Module shapes of real models, and random adapters and bases of those shapes."""

from __future__ import annotations

import torch

from csulora import LoraAdapter, LoraModule, ModuleSubspace, SafetySubspace
from csulora.subspace import Origin

# (d_out, d_in) of the seven linear modules of one layer.
LLAMA_3_1_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LLAMA_3_1_8B_LAYERS = 32
LLAMA_2_7B = {
    **{f"self_attn.{kind}_proj": (4096, 4096) for kind in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
LLAMA_3_2_1B = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
# Small enough that a thousand adapters are a few hundred megabytes.
TINY = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (128, 256)}
# By name: the linear modules of one layer, and the number of layers.
MODELS = {
    "llama-3.1-8b": (LLAMA_3_1_8B, LLAMA_3_1_8B_LAYERS),
    "llama-2-7b": (LLAMA_2_7B, 32),
    "llama-3.2-1b": (LLAMA_3_2_1B, 16),
    "tiny": (TINY, 4),
}


def basis(d: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous()


def make(layers: int, r: int, k: int, dtype: torch.dtype) -> tuple[LoraAdapter, SafetySubspace]:
    """A random adapter and subspace of `layers` layers of Llama-3.1-8B."""
    generator = torch.Generator().manual_seed(0)
    modules, bases = {}, {}
    for layer in range(layers):
        for kind, (d_out, d_in) in LLAMA_3_1_8B.items():
            name = f"model.layers.{layer}.{kind}"
            modules[name] = LoraModule(
                A=torch.randn(r, d_in, generator=generator).to(dtype),
                B=(0.01 * torch.randn(d_out, r, generator=generator)).to(dtype),
                alpha=2 * r,
                scaling=2.0,
            )
            bases[name] = ModuleSubspace(
                U=basis(d_out, k, generator),
                S=torch.linspace(2, 1, k),
                V=basis(d_in, k, generator),
                energy_share=0.15,
            )
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r}
    origin = Origin("base", "aligned", "0" * 64, "0" * 64, 0)
    subspace = SafetySubspace(bases, origin)
    subspace.__dict__["sha256"] = "0" * 64  # hashing it is not part of a correction
    return LoraAdapter(modules, config), subspace
