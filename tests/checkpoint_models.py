"""Small models of several kinds, and pairs of checkpoints of them as transformers has them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 31,
}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options))


def mixtral(**options):
    sizes = LLAMA | {"num_local_experts": 2} | options
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def neox():
    sizes = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def mamba():
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 31}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


def t5():
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 31,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def shift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def write_pair(folder, model, **options):
    torch.manual_seed(0)
    for name in ("base", "aligned"):
        shift(model)
        model.save_pretrained(folder / name, **options)
    return folder / "base", folder / "aligned"


def read(model, folder):
    """A model's weights as transformers reads them, and what it missed."""
    found, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return found, info["missing_keys"]
