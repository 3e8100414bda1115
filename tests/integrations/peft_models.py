"""PEFT models with an adapter, what they give, and everything of them that a correction could change."""

import copy

import peft
import pytest
import torch
from tiny_models import LINEAR, load_aligned

from csulora import Correction, CsuloraError, Realignment, correct_folder
from csulora.integrations.peft import correct_model

SAME, EXACT = Correction(form="same"), Correction()
# D of these models is noise, so that its edge would leave nothing to do.
METHODS = [SAME, EXACT, Realignment(edge=False), Realignment(edge=False, form="exact")]


def named(method):
    return f"{method.method}-{method.form}"


TOKENS = torch.arange(24).reshape(2, 12) % 61
PATTERNS = {
    "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 1},
    "alpha_pattern": {"model.layers.0.self_attn.v_proj": 11, "mlp.up_proj": 2},
}
KINDS = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "odd": {"r": 7, "lora_alpha": 3},
    "rsLoRA": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns, rsLoRA": PATTERNS | {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no biases to train": {"bias": "all"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {
        "target_modules": ["embed_tokens", "q_proj"],
        "rank_pattern": {"embed_tokens": 2},
    },
    "gpt2": {"kind": "gpt2"},
    "gpt2, embedding": {"kind": "gpt2", "target_modules": ["wte", "c_fc"]},
    "base in bfloat16": {"dtype": torch.bfloat16},
    "all in bfloat16": {"dtype": torch.bfloat16, "autocast": False},
    "adapter in float16": {"adapter_dtype": torch.float16, "autocast": False},
}


def aligned_model(world, dtype=torch.float32):
    return load_aligned(world.kind, world.aligned.parent, dtype)


def fill(model, name="default", seed=1):
    """Random values for the factors that PEFT starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}" in path and ("lora_B" in path or "lora_embedding_A" in path):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make(world, *, autocast=True, dtype=torch.float32, adapter_dtype=None, **options):
    """A PEFT model in evaluation mode with a filled adapter `default`."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR[world.kind]} | options
    model = peft.get_peft_model(
        aligned_model(world, dtype), peft.LoraConfig(**options), autocast_adapter_dtype=autocast
    )
    fill(model)
    if adapter_dtype is not None:
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data = parameter.data.to(adapter_dtype)
    return model.eval()


def logits(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        return model(TOKENS).logits


def loaded(world, folder, *, autocast=True, dtype=torch.float32):
    model = aligned_model(world, dtype)
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=autocast).eval()


def through_folder(world, model, correction, folder):
    """Where the folder is that PEFT saves, corrected as a folder."""
    model.save_pretrained(folder / "raw", save_embedding_layers=False)
    correct_folder(folder / "raw", world.subspace, folder / "corrected", correction)
    return folder / "corrected"


def state(model):
    """Everything that a correction could change, by value and identity."""
    parameters = {
        name: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone(), p.grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    layers = {
        name: copy.deepcopy(
            [layer.r, layer.lora_alpha, layer.scaling, str(layer.lora_A), str(layer.lora_B)]
        )
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    configs = {name: (id(c), c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()}
    return parameters, layers, configs


def assert_same_state(found, wanted):
    assert found[0].keys() == wanted[0].keys()
    for name, (*identity, value, grad) in wanted[0].items():
        assert found[0][name][:3] == tuple(identity), name
        assert torch.equal(found[0][name][3], value), name
        assert found[0][name][4] is grad, name
    assert found[1:] == wanted[1:]


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def step(model, optimizer):
    loss = model(TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def refused(model, world, match, correction=SAME, name=None, **options):
    before = state(model)
    with pytest.raises(CsuloraError, match=match) as raised:
        correct_model(model, world.subspace, correction, name, **options)
    assert "\n" not in str(raised.value)
    assert_same_state(state(model), before)
