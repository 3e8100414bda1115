"""An adapter corrected in a PEFT model gives what PEFT makes of the corrected folder, and nothing else
changes."""

import copy
from types import SimpleNamespace

import builders
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import LINEAR, load_aligned, save_pair
from tolerances import TOLERANCES

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    Realignment,
    correct,
    correct_folder,
    estimate,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

from csulora.integrations.peft import correct_model, repair, writing  # noqa: E402

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


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By kind: `base` and `aligned`, folders of checkpoints, and the `subspace` of all their weights."""
    found = {}
    for kind in LINEAR:
        folder = tmp_path_factory.mktemp(kind)
        save_pair(kind, folder)
        everything = [*LINEAR[kind], *(["embed_tokens", "lm_head"] if kind == "llama" else ["wte"])]
        subspace = estimate(folder / "base", folder / "aligned", rank=6, modules=everything)
        found[kind] = SimpleNamespace(
            kind=kind, base=folder / "base", aligned=folder / "aligned", subspace=subspace
        )
    return found


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


@pytest.fixture
def llama(worlds):
    return worlds["llama"]


# --- what the model gives afterwards ----------------------------------------------------------------


@pytest.mark.parametrize("correction", METHODS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_corrected_folder_and_those_of_the_saved_model(
    worlds, tmp_path, kind, correction
):
    options = dict(KINDS[kind])
    world = worlds[options.pop("kind", "llama")]
    model = make(world, **options)
    types = {key: options[key] for key in ("dtype", "autocast") if key in options}
    if "adapter_dtype" in options:
        types.pop("autocast")  # its factors have that type in memory, which no way of loading gives
    raw = logits(model)
    folder = through_folder(world, model, correction, tmp_path)
    wanted = logits(loaded(world, folder, **types))
    report = correct_model(model, world.subspace, correction)
    tolerance = {"rtol": 0, "atol": 1e-6} if "dtype" not in types else {"rtol": 0, "atol": 1e-2}
    if "adapter_dtype" in options:
        tolerance["atol"] = 2e-2 * float((wanted - raw).abs().max())
    torch.testing.assert_close(logits(model), wanted, **tolerance)
    assert float((wanted - raw).abs().max()) > 0.01
    assert report.totals.modules == len(LoraAdapter.load(folder).modules)
    config, stated = model.peft_config["default"], peft.LoraConfig.from_pretrained(folder)
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"):
        assert getattr(config, field) == getattr(stated, field), field
    for layer in lora_layers(model):
        factors = layer.lora_A if "default" in layer.lora_A else layer.lora_embedding_A
        factor = getattr(factors["default"], "weight", factors["default"])
        assert layer.r["default"] == len(factor)
        root = layer.r["default"] ** 0.5 if config.use_rslora else layer.r["default"]
        assert layer.scaling["default"] == pytest.approx(layer.lora_alpha["default"] / root)
    check_saved(world, model, tmp_path / "saved", **types)


def check_saved(world, model, folder, **types):
    """Saved by PEFT it is the same when loaded, and has no mark of where its weights come from."""
    model.save_pretrained(folder, save_embedding_layers=False)
    new = loaded(world, folder, **types)
    for name, parameter in model.named_parameters():  # some types only come by hand
        if "lora_" in name:
            new.get_parameter(name).data = new.get_parameter(name).data.to(parameter.dtype)
    assert torch.equal(logits(new), logits(model))
    assert not LoraAdapter.load(folder).made


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(9, 12), torch.nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@given(
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    alphas=st.tuples(st.integers(1, 40), st.floats(0.1, 9)),
    use_rslora=st.booleans(),
    correction=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_update_of_each_layer_is_that_of_the_folder_by_peft(
    tmp_path_factory, ranks, alphas, use_rslora, correction, dtype, seed
):
    torch.manual_seed(seed)
    folder = tmp_path_factory.mktemp("toy")
    config = peft.LoraConfig(
        r=ranks[0],
        lora_alpha=alphas[0],
        rank_pattern={"second": ranks[1]},
        alpha_pattern={"second": alphas[1]},
        use_rslora=use_rslora,
        target_modules=["first", "second"],
    )
    toy = Toy().to(dtype)
    model = fill(
        peft.get_peft_model(copy.deepcopy(toy), config, autocast_adapter_dtype=False), seed=seed
    )
    model.save_pretrained(folder / "raw")
    raw = LoraAdapter.load(folder / "raw")
    subspace = builders.random_subspace(raw)
    correct(raw, subspace, correction)[0].save(folder / "new")
    wanted = peft.PeftModel.from_pretrained(toy, folder / "new", autocast_adapter_dtype=False)
    correct_model(model, subspace, correction)
    for found, other in zip(lora_layers(model), lora_layers(wanted), strict=True):
        dW, truth = (x.get_delta_weight("default").detach() for x in (found, other))
        assert float((dW - truth).norm()) <= TOLERANCES[dtype] * float(truth.norm())


# --- what stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SAME, Realignment(edge=False)], ids=named)
def test_an_unchanged_rank_keeps_memory_and_the_optimizer_goes_on(llama, method):
    model = make(llama).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    before = state(model)[0]
    moments = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    report = correct_model(model, llama.subspace, method)
    after = state(model)[0]
    changed = {name for name in after if not torch.equal(after[name][3], before[name][3])}
    assert changed and all("lora_" in name for name in changed)
    assert {n: x[:3] for n, x in after.items()} == {n: x[:3] for n, x in before.items()}
    assert not any("make it anew" in warning for warning in report.warnings)
    for parameter, kept in optimizer.state.items():
        assert torch.equal(kept["exp_avg"], moments[id(parameter)])
        assert kept["exp_avg"].shape == parameter.shape
    first = step(model, optimizer)
    assert step(model, optimizer) < first  # what it steps on is what the model computes with


def step(model, optimizer):
    loss = model(TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("rank", [1, 3])
def test_more_rank_needs_another_optimizer_and_says_so(llama, rank):
    model = make(llama, r=rank).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    step(model, optimizer)
    report = correct_model(model, llama.subspace, EXACT)
    assert "make it anew" in report.warnings[-1]
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]
    assert all(p.grad is None for p in trained)
    with pytest.raises(RuntimeError):  # never a step with moments of other weights
        step(model, optimizer)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    first = step(model, optimizer)
    assert step(model, optimizer) < first
    correct_model(model, llama.subspace, SAME)  # and it can be corrected and trained on


def test_a_backward_that_was_begun_before_is_refused_by_torch(llama):
    model = make(llama).train()
    loss = model(TOKENS, labels=TOKENS).loss
    correct_model(model, llama.subspace, SAME)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("correction", [SAME, EXACT], ids=named)
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_"])
def test_flags_and_types_of_each_factor_stay(llama, correction, frozen):
    model = make(llama)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
        if "lora_A" in name:
            parameter.data = parameter.data.bfloat16()
    before = {n: (p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()}
    report = correct_model(model, llama.subspace, correction)
    assert before == {n: (p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()}
    anew = any("make it anew" in warning for warning in report.warnings)
    assert anew == (correction is EXACT and frozen != "lora_")


@pytest.mark.parametrize("correction", [SAME, EXACT], ids=named)
def test_other_adapters_stay_bit_for_bit(llama, tmp_path, correction):
    """Even one that was given the same configuration object."""
    model = make(llama, rank_pattern={"q_proj": 4})
    model.add_adapter("other", model.peft_config["default"])
    fill(model, "other", seed=2)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    before, others = state(model), [*logits_of(model, "other")]
    wanted = logits_of(model, "default")
    report = correct_model(model, llama.subspace, correction, "default")
    after = state(model)
    for name, (*identity, value, _) in before[0].items():
        if ".default" not in name:
            assert after[0][name][:3] == tuple(identity)
            assert torch.equal(after[0][name][3], value)
    for name, fields in before[1].items():
        for field, kept in zip(after[1][name][:3], fields[:3], strict=True):
            assert field["other"] == kept["other"]
    assert after[2]["other"] == before[2]["other"]
    assert torch.equal(torch.stack([*logits_of(model, "other")]), torch.stack(others))
    assert not torch.equal(logits_of(model, "default"), wanted)
    assert report.totals.relative_change > 0.1


def logits_of(model, name):
    model.set_adapter(name)
    return logits(model)


def test_the_active_adapter_is_corrected(llama):
    model = make(llama)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fill(model, "other")
    model.set_adapter("other")
    before = state(model)[0]
    correct_model(model, llama.subspace, SAME)
    after = state(model)[0]
    changed = {name for name in after if not torch.equal(after[name][3], before[name][3])}
    assert changed and all(".other." in name and "q_proj" in name for name in changed)


def test_within_inference_mode_and_trained_afterwards(llama):
    model = make(llama)
    with torch.inference_mode():
        correct_model(model, llama.subspace, EXACT)
    model.train()
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))


def test_a_compiled_model(llama):
    model = make(llama)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    correct_model(compiled, llama.subspace, EXACT)
    correct_model(plain, llama.subspace, EXACT)
    torch.testing.assert_close(logits(compiled), logits(plain))
    assert not torch.allclose(logits(compiled), before)


# --- what is refused --------------------------------------------------------------------------------


def refused(model, world, match, correction=SAME, name=None, **options):
    before = state(model)
    with pytest.raises(CsuloraError, match=match) as raised:
        correct_model(model, world.subspace, correction, name, **options)
    assert "\n" not in str(raised.value)
    assert_same_state(state(model), before)


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
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        tie_word_embeddings=True,
    )
    lora = peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True
    )
    model = fill(peft.get_peft_model(transformers.LlamaForCausalLM(config), lora))
    refused(model, worlds["llama"], "embed_tokens and lm_head share a factor")


@pytest.mark.parametrize("parameters", [None, ["mlp.experts.gate_up_proj"]])
def test_experts_are_refused_where_they_are_targeted(llama, parameters):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        num_local_experts=2,
    )
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], target_parameters=parameters)
    model = fill(peft.get_peft_model(transformers.MixtralForCausalLM(config), lora))
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


# --- models that were prepared for hot swaps --------------------------------------------------------


def prepared(model, rank, *, told=False):
    config = model.peft_config if told else None
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=rank, config=config)
    return model


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("correction", METHODS, ids=named)
@pytest.mark.parametrize("kind", ["plain", "rsLoRA", "patterns", "odd", "patterns, rsLoRA"])
def test_a_prepared_model_stays_in_its_padding(llama, tmp_path, kind, correction, told):
    plain = make(llama, **KINDS[kind])
    model = prepared(copy.deepcopy(plain), 16, told=told)
    before = {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    scalings = [id(layer.scaling["default"]) for layer in lora_layers(model)]
    folder = through_folder(llama, plain, correction, tmp_path)
    wanted = logits(loaded(llama, folder))
    correct_model(model, llama.subspace, correction)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    assert before == {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    assert scalings == [id(layer.scaling["default"]) for layer in lora_layers(model)]
    assert {layer.r["default"] for layer in lora_layers(model)} == {16}
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(llama, tmp_path / "saved")), wanted, rtol=0, atol=2e-6)


def test_a_prepared_model_has_to_have_room(llama):
    refused(prepared(make(llama), 5), llama, "rank 6, .*swaps of rank 5 at most; .*'same'", EXACT)
    refused(prepared(make(llama), None), llama, "swaps of rank 3 at most", EXACT)
    model = prepared(make(llama), 6)
    correct_model(model, llama.subspace, EXACT)


def test_a_prepared_model_is_not_compiled_anew(llama):
    model = prepared(make(llama), 16)
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    correct_model(compiled, llama.subspace, EXACT)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = logits(compiled)
    assert torch.equal(found, logits(model)) and not torch.allclose(found, before)


def test_embeddings_are_not_padded_in_a_prepared_model(llama):
    model = make(llama, target_modules=["embed_tokens", "q_proj"])
    plain, model = copy.deepcopy(model), prepared(model, 16)
    refused(model, llama, "corrected model.embed_tokens has rank 6, .* of rank 3 at most", EXACT)
    for each in (plain, model):
        correct_model(each, llama.subspace, SAME)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("told", [False, True])
def test_adapters_go_on_being_swapped_into_a_corrected_prepared_model(llama, tmp_path, told):
    """The correction of what was swapped in takes its scaling and rank, not those of before."""
    first = make(llama)
    second = fill(make(llama, r=5, lora_alpha=32), seed=7)
    for name, model in (("first", first), ("second", second)):
        through_folder(llama, model, EXACT, tmp_path / name)
    model = prepared(make(llama), 16, told=told)
    correct_model(model, llama.subspace, EXACT)
    hotswap.hotswap_adapter(model, tmp_path / "second" / "corrected", "default", torch_device="cpu")
    wanted = logits(loaded(llama, tmp_path / "second" / "corrected"))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    hotswap.hotswap_adapter(model, tmp_path / "second" / "raw", "default", torch_device="cpu")
    correct_model(model, llama.subspace, EXACT)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(llama, tmp_path / "saved")), wanted, rtol=0, atol=2e-6)


# --- once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [SAME, EXACT], ids=named)
def test_a_second_correction_has_to_be_asked_for(llama, correction):
    model = make(llama).train()
    correct_model(model, llama.subspace, correction)
    refused(model, llama, "'default': was corrected by csulora already", correction)
    report = correct_model(model, llama.subspace, SAME, again=True)
    assert "the adapter had been corrected before" in report.warnings
    refused(copy.deepcopy(model), llama, "already")
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    report = correct_model(model, llama.subspace, SAME)  # trained since
    assert "the adapter had been corrected before" not in report.warnings


# --- from two checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "patterns", "gpt2", "embedding"])
def test_repair_estimates_and_corrects(worlds, tmp_path, kind):
    options = dict(KINDS[kind])
    world = worlds[options.pop("kind", "llama")]
    model = make(world, **options)
    model.save_pretrained(tmp_path / "raw", save_embedding_layers=False)
    subspace = estimate(world.base, world.aligned, rank=4, like=tmp_path / "raw")
    correct_folder(tmp_path / "raw", subspace, tmp_path / "new", SAME)
    report = repair(model, world.base, world.aligned, SAME, rank=4)
    assert report.subspace["sha256"] == subspace.sha256
    wanted = logits(loaded(world, tmp_path / "new"))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    with pytest.raises(CsuloraError, match="already"):
        repair(model, "nowhere", "nowhere")
    assert repair(model, world.base, world.aligned, rank=4, again=True).warnings


def test_repair_refuses_before_it_reads_checkpoints(llama):
    model = make(llama, use_dora=True)
    before = state(model)
    with pytest.raises(CsuloraError, match="use_dora"):
        repair(model, "nowhere", "nowhere")
    with pytest.raises(CsuloraError, match="nowhere"):
        repair(make(llama), "nowhere", "nowhere")
    assert_same_state(state(model), before)
