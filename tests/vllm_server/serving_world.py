"""A tiny model with a subspace and adapters of many kinds, and what PEFT makes of each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import csulora
from csulora import estimate

DEMO = Path(csulora.__file__).parent / "demo" / "assets"
VOCABULARY = 223  # of the demo's tokenizer
PROMPTS = ([5, 17, 42, 9], [101, 3, 77, 150, 12, 64], [33] * 3 + [120, 8])
TOKENS = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict] = {
    "plain": {"r": 4, "target_modules": ATTENTION},
    "odd": {"r": 5, "lora_alpha": 10, "target_modules": LINEAR},
    "single": {"r": 1, "lora_alpha": 4, "target_modules": ATTENTION},
    "wide": {"r": 16, "target_modules": LINEAR},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ATTENTION},
    "ranks": {"r": 4, "rank_pattern": {"down_proj": 7, "q_proj": 3}, "target_modules": LINEAR},
    "alphas": {"r": 4, "alpha_pattern": {"v_proj": 1, "o_proj": 16}, "target_modules": ATTENTION},
    "layer": {"r": 6, "layers_to_transform": [1], "target_modules": LINEAR},
    "patterns": {
        "r": 3,
        "rank_pattern": {"layers.0.self_attn.q_proj": 9},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
        "use_rslora": True,
        "target_modules": ATTENTION,
    },
    "bfloat16": {"r": 8, "target_modules": LINEAR},
}


def build_model(folder: Path) -> Path:
    """Checkpoints `base` and `aligned`, the model that is served, and the subspace between them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on a CPU takes no smaller one
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.15,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).float()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                # A displacement of low rank beside noise, as alignment leaves one.
                d_out, d_in = parameter.shape
                parameter += 0.4 * torch.randn(d_out, 4) @ torch.randn(4, d_in) / d_in**0.5
                parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "aligned" / name, folder / "aligned")
    estimate(folder / "base", folder / "aligned", rank=8).save(folder / "subspace.safetensors")
    return folder


def build_adapter(world: Path, folder: Path, kind: str = "plain", *, seed: int = 0) -> Path:
    """An adapter of one kind for the served model, written by PEFT."""
    torch.manual_seed(seed + 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "aligned")
    options = {"lora_alpha": 16, "task_type": "CAUSAL_LM"} | KINDS[kind]
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.15)
    adapted.save_pretrained(folder)
    if kind == "bfloat16":
        edit_weights(folder, lambda X: X.to(torch.bfloat16))
    return folder


def edit_weights(folder: Path, change) -> None:
    """Replace each tensor of an adapter folder by change(tensor)."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: change(X).contiguous() for name, X in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


@cache
def _served_model(world: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(world / "aligned").float().eval()


def tokens_of(world: Path, adapter: Path | None, prompts: Sequence = PROMPTS) -> list[list[int]]:
    """What PEFT generates greedily for each prompt, `TOKENS` at most; None: the model alone."""
    model = _served_model(world)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    try:
        return [_greedy(model, prompt) for prompt in prompts]
    finally:
        if adapter is not None:
            model.unload()


@torch.no_grad()
def _greedy(model, prompt: Sequence[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(TOKENS):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "a tie, which another order of sums may break"
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def corrected(world: Path, adapter: Path, target: Path, correction=None, **options) -> Path:
    """What `csulora.correct_folder` makes of an adapter, in the portable form if nothing else is said."""
    subspace = csulora.SafetySubspace.load(world / "subspace.safetensors")
    options = {"portable": True} | options
    csulora.correct_folder(adapter, subspace, target, correction, **options)
    return target


def decisions(audit: Path, decision: str) -> list[dict]:
    """The lines of an audit log with one decision."""
    lines = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["decision"] == decision]
