"""What of a PEFT model is refused by name, and that nothing of it has changed then."""

from types import SimpleNamespace

import checkpoint_models
import pytest
import torch

from csulora import CsuloraError, Realignment, estimate

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

from peft_models import (  # noqa: E402
    EXACT,
    SAME,
    aligned_model,
    assert_same_state,
    fill,
    logits,
    lora_layers,
    make,
    named,
    refused,
    state,
    step,
)

from csulora.integrations.peft import correct_model, writing  # noqa: E402

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is set .DoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "own biases": ({"lora_bias": True, "kind": "gpt2"}, "not a LoRA update .*lora_B.bias"),
    "all biases": ({"bias": "all", "kind": "gpt2"}, "bias is 'all', and .*bias"),
    "its biases": (
        {"bias": "lora_only", "kind": "gpt2"},
        "bias is 'lora_only', and .*base_layer.bias",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("correction", [SAME, EXACT], ids=named)
def test_what_is_more_than_plain_lora_is_refused_by_name(worlds, kind, correction):
    options, match = REFUSED[kind]
    options = dict(options)
    world = worlds[options.pop("kind", "llama")]
    refused(
        make(world, **options), world, f"(adapter 'default'|configuration): .*{match}", correction
    )


def test_dora_of_one_adapter_does_not_stop_the_other(llama):
    model = make(llama)
    model.add_adapter("dora", peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    refused(model, llama, "adapter 'dora': use_dora", name="dora")
    correct_model(model, llama.subspace, SAME, "default")


def test_modules_that_the_subspace_does_not_know_are_refused_by_name(llama):
    subspace = estimate(llama.base, llama.aligned, rank=6)
    for name in ("embed_tokens", "lm_head"):
        model = make(llama, target_modules=["q_proj", name])
        refused(model, SimpleNamespace(subspace=subspace), f"no unique match.*{name}")


def test_tied_factors_are_refused_by_name(worlds):
    torch.manual_seed(0)
    base = checkpoint_models.llama(**SIZES, intermediate_size=56, tie_word_embeddings=True)
    lora = peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True
    )
    model = fill(peft.get_peft_model(base, lora))
    refused(model, worlds["llama"], "embed_tokens and lm_head share a factor")


@pytest.mark.parametrize("parameters", [None, ["mlp.experts.gate_up_proj"]])
def test_experts_are_refused_where_they_are_targeted(llama, parameters):
    torch.manual_seed(0)
    base = checkpoint_models.mixtral(**SIZES)
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], target_parameters=parameters)
    model = fill(peft.get_peft_model(base, lora))
    if parameters:
        refused(model, llama, "target_parameters is set")
    else:
        correct_model(model, llama.subspace, SAME)


def test_a_convolution_is_refused_by_name(worlds):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    lora = peft.LoraConfig(r=2, target_modules=["0"])
    refused(peft.get_peft_model(model, lora), worlds["llama"], "0 is a Conv2d of LoRA on a Conv2d")


def test_attention_in_one_piece_is_refused_by_name(worlds):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

    model = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(CsuloraError, match="attention is a MultiheadAttention of LoRA"):
        correct_model(model, worlds["llama"].subspace)


@pytest.mark.parametrize("config", [peft.IA3Config, peft.LoHaConfig])
def test_other_tuners_are_refused(llama, config):
    options = {"feedforward_modules": []} if config is peft.IA3Config else {}
    lora = config(target_modules=["q_proj"], **options)
    model = peft.get_peft_model(aligned_model(llama), lora)
    refused(model, llama, "peft_type is '(IA3|LOHA)'")


def test_what_is_no_peft_model_is_refused(llama):
    refused(aligned_model(llama), llama, "PeftModel is needed, not a LlamaForCausalLM")
    wrapped = torch.nn.Sequential(make(llama))
    refused(wrapped, llama, "not a Sequential; of a model that was wrapped")
    mixed = peft.PeftMixedModel(
        aligned_model(llama), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="default"
    )
    refused(mixed, llama, "not a PeftMixedModel")


def test_several_active_adapters_and_unknown_ones_are_named(llama):
    model = make(llama)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, llama, "no adapter 'third'; there are default, other", name="third")
    model.base_model.set_adapter(["default", "other"])
    refused(model, llama, "2 adapters are active: default, other; give adapter_name")
    correct_model(model, llama.subspace, SAME, "default")


def test_a_merged_adapter_has_to_be_unmerged_first(llama):
    model = make(llama)
    before = logits(model)
    model.merge_adapter()
    refused(model, llama, "is merged into the base weights; call model.unmerge_adapter")
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before)
    correct_model(model, llama.subspace, SAME)
    corrected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), corrected, rtol=1e-4, atol=1e-5)


def test_a_scaling_that_the_configuration_does_not_give_is_refused(llama):
    model = make(llama)
    layer = lora_layers(model)[0]
    layer.set_scale("default", 0.5)
    refused(model, llama, "q_proj has the scaling 0.83.*configuration gives 1.66.*set_scale")
    layer.set_scale("default", 1)
    correct_model(model, llama.subspace, SAME)


def test_a_hot_swap_of_another_rank_is_noticed(llama, tmp_path):
    model = make(llama)
    make(llama, r=5).save_pretrained(tmp_path)
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    refused(model, llama, "has rank 5, but the model takes it for 3, as after a hot swap")


def test_factors_that_are_not_in_memory(llama):
    lora = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(aligned_model(llama), lora, low_cpu_mem_usage=True)
    with pytest.raises(
        CsuloraError, match=r"q_proj is no plain parameter in memory, as .*offloading"
    ):
        correct_model(model, llama.subspace)


# --- whole or not at all ----------------------------------------------------------------------------


def test_a_factor_that_is_not_finite(llama):
    model = make(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "1.mlp.down_proj.lora_B" in name:
                parameter[0, 0] = float("inf")  # NaN would not even be equal to itself
    refused(model, llama, "down_proj.lora_B.weight .*NaN")


def test_a_result_that_does_not_fit_float16(llama):
    model = make(llama, adapter_dtype=torch.float16)
    refused(model, llama, "does not fit torch.float16", Realignment(target=1e14, edge=False))


@pytest.mark.parametrize("correction", [SAME, EXACT], ids=named)
@pytest.mark.parametrize("calls", [0, 1, 9, 27])
def test_whatever_happens_while_writing_everything_goes_back(llama, monkeypatch, correction, calls):
    model = make(llama).train()
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    before, put = state(model), writing._put
    left = [calls]

    def stopped(X, new, grad):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        put(X, new, grad)

    monkeypatch.setattr(writing, "_put", stopped)
    with pytest.raises(KeyboardInterrupt):
        correct_model(model, llama.subspace, correction)
    assert_same_state(state(model), before)
    monkeypatch.undo()
    correct_model(model, llama.subspace, correction)


def test_a_failure_after_the_factors_puts_them_back_too(llama, monkeypatch):
    model = make(llama)
    before, tell = state(model), writing._tell
    left = [5]

    def stopped(*arguments):
        tell(*arguments)
        left[0] -= 1
        if not left[0]:
            raise MemoryError

    monkeypatch.setattr(writing, "_tell", stopped)
    with pytest.raises(MemoryError):
        correct_model(model, llama.subspace, EXACT)
    assert_same_state(state(model), before)
