"""Adapters that PEFT reads in ways of their own, such as experts that it stacks; PEFT is the judge."""

import pytest
import torch
from builders import edit_json
from checkpoint_models import llama, mixtral
from safetensors.torch import load_file, save_file

from csulora import Correction, CsuloraError, LoraAdapter, Realignment, correct, estimate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_pairs import K, Pair  # noqa: E402

PREFIX = "base_model.model."


def one_by_one(folder):
    """An adapter of Mixtral as transformers 4 had the model, each expert with modules of its own."""
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.q_proj": (16, 16)}
    for i in range(3):
        expert = f"{layer}block_sparse_moe.experts.{i}."
        shapes |= {f"{expert}w1": (24, 16), f"{expert}w3": (24, 16), f"{expert}w2": (16, 24)}
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, (d_out, d_in) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(3, d_in, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(d_out, 3, generator=generator)
    peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "w1", "w2", "w3"]).save_pretrained(
        folder
    )
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


UNEVEN = [
    Correction(strength_for={"w2": 0}),
    Correction(strength_for={"experts.0.*": 0}),
    Realignment(edge=False, form="exact", strength_for={"w1": 0}),
]


@pytest.mark.parametrize("correction", [Correction(), *UNEVEN], ids=str)
def test_experts_one_by_one_that_peft_cannot_stack_are_warned_of(tmp_path, correction):
    pair = Pair(tmp_path, mixtral(num_local_experts=3))
    folder = one_by_one(tmp_path / "adapter")
    assert len(pair.updates(folder)) == 3
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    adapter = LoraAdapter.load(folder)
    new, report = correct(adapter, subspace, correction)
    new.save(tmp_path / "new")
    warned = [text for text in report.warnings if "use the portable form" in text]
    assert bool(warned) == (correction in UNEVEN)
    if warned:
        with pytest.raises((RuntimeError, ValueError)):
            pair.updates(tmp_path / "new")
    else:
        assert len(pair.updates(tmp_path / "new")) == 3
    portable, report = correct(adapter, subspace, correction, portable=True)
    assert not any("use the portable form" in text for text in report.warnings)
    portable.save(tmp_path / "portable")
    assert len(pair.updates(tmp_path / "portable")) == 3


def test_mica_leaves_the_base_weights_as_they_are(tmp_path):
    """Its factors start from those of the base, which loading does not change."""
    pair = Pair(tmp_path, llama())
    folder = pair.adapter(target_modules=["q_proj"], init_lora_weights="mica")
    assert LoraAdapter.load(folder).config["init_lora_weights"] == "mica"
    loaded = peft.PeftModel.from_pretrained(pair.model(), folder)
    stored = pair.model().state_dict()
    for name, W in loaded.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(W, stored[name.replace("base_layer.", "")])
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    new, _ = correct(LoraAdapter.load(folder), subspace)
    new.save(tmp_path / "new")
    pair.check(pair.updates(folder), pair.updates(tmp_path / "new"))


def test_experts_in_one_pair_are_known_whatever_their_other_parameters_have_for_a_rank(tmp_path):
    """The 3 x 2 rows of one are as many as the rank of the other."""
    pair = Pair(tmp_path, mixtral(num_local_experts=3))
    folder = pair.adapter(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 6},
    )
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    adapter = LoraAdapter.load(folder, pass_through=True)
    assert len(adapter.modules) == 1
    correct(adapter, subspace)[0].save(tmp_path / "new")
    before, after = pair.updates(folder), pair.updates(tmp_path / "new")
    experts = [name for name in before if "experts" in name]
    assert len(experts) == 2
    for name in experts:
        torch.testing.assert_close(after.pop(name)[0], before.pop(name)[0])
    pair.check(before, after)


def test_a_tied_head_of_another_name_is_said_to_be_and_corrected_once_it_is_stored(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=31,
    )
    pair = Pair(tmp_path, transformers.BertForMaskedLM(config))
    folder = pair.adapter(target_modules=["query", "decoder"])
    with pytest.raises(CsuloraError, match=r"predictions\.decoder is not stored, .*a clone"):
        estimate(*pair.checkpoints, rank=K, like=folder)
    for checkpoint in pair.checkpoints:
        file = checkpoint / "model.safetensors"
        tensors = load_file(file)
        W = tensors["bert.embeddings.word_embeddings.weight"]
        save_file(tensors | {"cls.predictions.decoder.weight": W.clone()}, file, {"format": "pt"})
        edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    correct(LoraAdapter.load(folder), subspace)[0].save(tmp_path / "new")
    pair.check(pair.updates(folder), pair.updates(tmp_path / "new"))


@pytest.mark.parametrize("portable", [False, True])
def test_velora_is_corrected_and_loads_as_plain_lora(tmp_path, portable):
    """It changes how gradients are computed, and nothing of the update."""
    pair = Pair(tmp_path, llama())
    velora = peft.tuners.lora.config.VeloraConfig()
    folder = pair.adapter(target_modules=["q_proj"], velora_config=velora)
    assert any("velora" in name for name in load_file(folder / "adapter_model.safetensors"))
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    new, _ = correct(LoraAdapter.load(folder), subspace, portable=portable)
    new.save(tmp_path / "new")
    pair.check(pair.updates(folder), pair.updates(tmp_path / "new"))


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["self_attn.q_proj", "up_proj"], ".*q_proj", r".*\.(q|up)_proj"]
)
def test_modules_that_peft_leaves_out_are_told_of(tmp_path, targets):
    """The file holds two, and servers apply both."""
    pair = Pair(tmp_path, llama())
    folder = pair.adapter(target_modules=["q_proj", "up_proj"])
    edit_json(folder / "adapter_config.json", target_modules=targets)
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    new, report = correct(LoraAdapter.load(folder), subspace, portable=True)
    new.save(tmp_path / "new")
    before = pair.updates(folder)
    pair.check(before, pair.updates(tmp_path / "new"))
    warned = [text for text in report.warnings if "target_modules names 1 of 2" in text]
    assert len(before) == (1 if warned else 2)
    assert bool(warned) == (targets in (["q_proj"], ".*q_proj"))
