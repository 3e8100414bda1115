"""An adapter corrected in a PEFT model gives what PEFT makes of the corrected folder, and nothing else
changes."""

import copy

import builders
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES

from csulora import LoraAdapter, Realignment, correct

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_models import (  # noqa: E402
    EXACT,
    KINDS,
    METHODS,
    SAME,
    TOKENS,
    fill,
    loaded,
    logits,
    lora_layers,
    make,
    named,
    state,
    step,
    through_folder,
)

from csulora.integrations.peft import correct_model  # noqa: E402

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
