"""Models of transformers that are small enough for any test, and pairs of checkpoints of them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

# The linear layers in the blocks of each kind.
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def build(kind):
    """A model with random weights, the same in every call."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=16
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return transformers.LlamaForCausalLM(config)


def save_pair(kind, folder, **options):
    """Checkpoints `base`, saved with these options, and `aligned`, with noise on every matrix."""
    model = build(kind)
    model.save_pretrained(folder / "base", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")


def load_aligned(kind, folder, dtype=torch.float32):
    """The model of `save_pair` that adapters are trained on."""
    cls = {"llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel}[kind]
    return cls.from_pretrained(folder / "aligned", dtype=dtype)
