"""Which side of a weight is its output where its shape does not tell; PEFT is the judge."""

import pytest
import torch
from checkpoint_models import llama
from torch import nn

from csulora import Correction, CsuloraError, LoraAdapter, Realignment, correct, estimate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_pairs import K, Pair, randomize, updates_of  # noqa: E402
from safetensors.torch import save_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from csulora.integrations.peft import correct_model, repair  # noqa: E402

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 16}
STRENGTHS = (0, 0, 100, 10)


class Layers(nn.Module):
    """A model of no known type."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.ModuleDict(layers)})

    def save_pretrained(self, folder):
        folder.mkdir()
        save_model(self, folder / "model.safetensors")


def linear():
    return nn.Linear(32, 32)


def conv1d(out=32):
    layer = Conv1D(out, 32)
    nn.init.normal_(layer.weight)
    return layer


def corrected(pair, adapter, subspace):
    new, _ = correct(LoraAdapter.load(adapter), subspace, Correction(*STRENGTHS))
    new.save(adapter.with_name("new"), overwrite=True)
    return pair.updates(adapter.with_name("new"))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


# --- weights of target_parameters, whose update lies as they are stored ------------------------------


@pytest.mark.parametrize("name", ["attn.c_proj", "c_fc", "wpe", "lm_head", "embed_tokens"])
def test_parameters_that_are_stored_turned_are_refused(tmp_path, name):
    of_gpt2 = name not in ("embed_tokens", "lm_head")
    model = gpt2() if of_gpt2 else llama()
    pair = Pair(tmp_path, model)
    folder = pair.adapter(target_parameters=[f"{name}.weight"], target_modules=[])
    for like in (None, folder):
        options = {"like": like} if like else {"modules": [name]}
        subspace = estimate(*pair.checkpoints, rank=K, **options)
        if name == "lm_head":
            pair.check(pair.updates(folder), corrected(pair, folder, subspace), STRENGTHS)
            continue
        for method in (Correction(), Realignment()):
            with pytest.raises(CsuloraError, match=f"{name}: target_parameters .* target_modules"):
                correct(LoraAdapter.load(folder), subspace, method)


def test_parameters_of_linear_layers_are_corrected(tmp_path):
    pair = Pair(tmp_path, llama())
    folder = pair.adapter(target_parameters=["q_proj.weight"], target_modules=["up_proj"])
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    before = pair.updates(folder)
    assert len(before) == 2
    pair.check(before, corrected(pair, folder, subspace), STRENGTHS)


# --- embeddings tied to heads -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_is_known_by_the_configuration(tmp_path, dtype):
    """Trained in bfloat16 the pair is no longer one, until PEFT has loaded and saved it."""
    embedding = "model.embed_tokens"
    pair = Pair(tmp_path, llama(tie_word_embeddings=True))
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    config = peft.LoraConfig(r=3, lora_alpha=5, **options)
    model = randomize(peft.get_peft_model(pair.model().to(dtype), config))
    tokens = torch.arange(12).reshape(1, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder, save_embedding_layers=False)
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    if dtype == torch.bfloat16:
        for method in (Correction(), Realignment()):
            with pytest.raises(CsuloraError, match=f"{embedding}: ensure_weight_tying .* lm_head "):
                correct(LoraAdapter.load(folder), subspace, method)
        loaded = peft.PeftModel.from_pretrained(pair.model(), folder)
        loaded.save_pretrained(folder, save_embedding_layers=False)
    with pytest.raises(CsuloraError, match=f"{embedding}: shares its factors"):
        correct(LoraAdapter.load(folder), subspace, Realignment())
    before = pair.updates(folder)
    turned_over = [f"{embedding}.weight"]
    assert before.keys() == {"lm_head.weight", *turned_over}
    pair.check(before, corrected(pair, folder, subspace), STRENGTHS, turned_over)


def test_what_peft_does_not_tie_is_corrected_by_itself(tmp_path):
    """It looks for two names in the configuration, and writes another one there."""
    pair = Pair(tmp_path, gpt2())
    folder = pair.adapter(target_modules=["wte", "lm_head"], ensure_weight_tying=True)
    subspace = estimate(*pair.checkpoints, rank=K, like=folder)
    before = pair.updates(folder)
    assert before.keys() == {"transformer.wte.weight"}
    pair.check(before, corrected(pair, folder, subspace), STRENGTHS)


# --- square weights of models of no known type -------------------------------------------------------


@pytest.mark.parametrize("names", [["b"], ["a", "b"]])
def test_a_square_weight_is_refused_where_fan_in_fan_out_alone_speaks(tmp_path, names):
    """PEFT sets it for the last module, whatever the others are."""
    pair = Pair(tmp_path, Layers(a=linear(), b=conv1d()))
    folder = pair.adapter(target_modules=names)
    adapter = LoraAdapter.load(folder)
    assert adapter.config["fan_in_fan_out"]
    message = "is square, and whether .* no oblong module of the same layers .*--like"
    with pytest.raises(CsuloraError, match=message):
        correct(adapter, estimate(*pair.checkpoints, rank=K))
    with pytest.raises(CsuloraError, match=message):
        estimate(*pair.checkpoints, rank=K, like=folder)


def test_an_oblong_module_of_the_same_layers_tells_and_another_adapter_may_have_it(tmp_path):
    pair = Pair(tmp_path, Layers(b=conv1d(), c=conv1d(48)))
    both, square = (
        pair.adapter(n, target_modules=m) for n, m in {"1": ["b", "c"], "2": ["b"]}.items()
    )
    like = estimate(*pair.checkpoints, rank=K, like=both)
    plain = estimate(*pair.checkpoints, rank=K)
    for folder, subspace in ((both, like), (both, plain), (square, like)):
        pair.check(pair.updates(folder), corrected(pair, folder, subspace), STRENGTHS)


def test_the_layers_of_a_model_in_memory_tell_what_its_configuration_does_not(tmp_path):
    """The last one is linear, so that PEFT leaves the flag false."""
    pair = Pair(tmp_path, Layers(a=conv1d(), b=linear()))
    model = peft.get_peft_model(pair.model(), peft.LoraConfig(r=3, target_modules=["a", "b"]))
    assert not model.peft_config["default"].fan_in_fan_out
    randomize(model)
    before = updates_of(model)
    with pytest.raises(CsuloraError, match="a: its weight is square"):
        correct_model(model, estimate(*pair.checkpoints, rank=K))
    with pytest.raises(CsuloraError, match=r"a\.weight is square"):
        repair(model, *pair.checkpoints, rank=K)
    assert all(torch.equal(before[n][0], dW) for n, (dW, _) in updates_of(model).items())


@pytest.mark.parametrize("names", [["attn.c_proj"], ["c_proj", "query", "intermediate.dense"]])
def test_each_part_of_a_model_has_its_own_kind_of_layers(tmp_path, names):
    """A GPT-2 decoder in a model of another type, beside an encoder with linear layers."""
    vision = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    text = transformers.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    pair = Pair(tmp_path, transformers.VisionEncoderDecoderModel(config))
    folder = pair.adapter(target_modules=names)
    for like in (None, folder):
        subspace = estimate(*pair.checkpoints, rank=K, like=like)
        pair.check(pair.updates(folder), corrected(pair, folder, subspace), STRENGTHS)
