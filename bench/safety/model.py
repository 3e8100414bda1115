"""A stack of small Llamas of one shape that are trained and run at once, each with its own weights.

Weights are a dict of tensors by the names of transformers' LlamaForCausalLM, with the model (E) as a
leading dimension. A stack costs on a GPU little more than one model, and one model is a stack of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
LAYERS, HEAD_SIZE, EPS, THETA = 4, 32, 1e-6, 10000.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = ATTENTION + MLP


@dataclass(frozen=True)
class Lora:
    """Factors by module name, A (E, r, d_in) and B (E, d_out, r); dW = scaling B A."""

    A: Weights
    B: Weights
    scaling: float


def module_names(layers: int = LAYERS) -> list[str]:
    """The linear weights of every layer, without `.weight`."""
    return [
        f"model.layers.{i}.{'self_attn' if kind in ATTENTION else 'mlp'}.{kind}"
        for i in range(layers)
        for kind in TARGETS
    ]


def shapes(width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one model's tensors: half as many key and value heads as heads, MLPs twice as wide."""
    half, double = width // 2, 2 * width
    sides = {
        "q_proj": (width, width),
        "k_proj": (half, width),
        "v_proj": (half, width),
        "o_proj": (width, width),
        "gate_proj": (double, width),
        "up_proj": (double, width),
        "down_proj": (width, double),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for name in module_names():
        found[f"{name}.weight"] = sides[name.rpartition(".")[2]]
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (width,)
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def initial(width: int, vocabulary: int, seeds: list[int]) -> Weights:
    """Normal weights of deviation 0.02 and norms of 1, as transformers starts them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {
        name: torch.stack(
            [
                torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=g)
                for g in generators
            ]
        )
        for name, shape in shapes(width, vocabulary).items()
    }


def hidden(
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    lora: Lora | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The last hidden states (E, n, T, width) of tokens (E, n, T), padded on the right.

    Causal attention needs no mask for what follows an answer. Weights with a leading dimension of 1 are
    shared by all models. inputs: filled with what each linear module reads, (E, n T, d_in).
    """
    E, n, T = tokens.shape
    table = weights["model.embed_tokens.weight"]
    if table.shape[0] == 1:
        x = functional.embedding(tokens, table[0])
    else:
        offset = torch.arange(E, device=tokens.device)[:, None, None] * table.shape[1]
        x = functional.embedding(tokens + offset, table.flatten(0, 1))
    width = table.shape[-1]
    x = x.reshape(E, n * T, width)
    cos, sin = _rotary(T, x.device)

    def linear(name: str, y: Tensor) -> Tensor:
        if inputs is not None:
            inputs[name] = y
        out = torch.matmul(y, weights[f"{name}.weight"].mT)
        if lora is not None and name in lora.A:
            out = out + lora.scaling * ((y @ lora.A[name].mT) @ lora.B[name].mT)
        return out

    def heads(y: Tensor) -> Tensor:
        return y.view(E * n, T, -1, HEAD_SIZE).transpose(1, 2)

    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        y = _norm(x, weights[f"{layer}.input_layernorm.weight"])
        q, k, v = (heads(linear(f"{layer}.self_attn.{p}_proj", y)) for p in "qkv")
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(E, n * T, width)
        x = x + linear(f"{layer}.self_attn.o_proj", y)
        y = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"])
        y = functional.silu(linear(f"{layer}.mlp.gate_proj", y)) * linear(f"{layer}.mlp.up_proj", y)
        x = x + linear(f"{layer}.mlp.down_proj", y)
    return _norm(x, weights["model.norm.weight"]).view(E, n, T, width)


def logits(weights: Mapping[str, Tensor], tokens: Tensor, lora: Lora | None = None) -> Tensor:
    """(E, n, T, vocabulary)."""
    x = hidden(weights, tokens, lora)
    return torch.matmul(x, weights["lm_head.weight"].mT[:, None])


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=EPS) * scale[:, None]


def _rotary(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, HEAD_SIZE, 2, dtype=torch.float32) / HEAD_SIZE
    angles = torch.outer(torch.arange(length).float(), 1 / THETA**half)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(device), both.sin().to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def lora_start(
    width: int, vocabulary: int, rank: int, kinds: list[tuple[str, ...]], seeds: list[int]
) -> tuple[Weights, Weights, dict[str, Tensor]]:
    """A and B as PEFT starts them (A uniform, B zero), and which models train each module (E, 1, 1)."""
    generators = [torch.Generator().manual_seed(seed + 1_000_003) for seed in seeds]
    sizes = shapes(width, vocabulary)
    A, B, used = {}, {}, {}
    for name in module_names():
        d_out, d_in = sizes[f"{name}.weight"]
        bound = 1 / math.sqrt(d_in)
        A[name] = torch.stack(
            [(2 * torch.rand(rank, d_in, generator=g) - 1) * bound for g in generators]
        )
        B[name] = torch.zeros(len(seeds), d_out, rank)
        kind = name.rpartition(".")[2]
        used[name] = torch.tensor([float(kind in wanted) for wanted in kinds])[:, None, None]
    return A, B, used
