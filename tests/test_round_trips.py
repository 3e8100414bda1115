"""Settings, reports and adapters to plain values and back, and how they show in a prompt."""

import json
import math
from dataclasses import replace

import builders
import peft
import pytest
import torch
import transformers
from builders import CONFIG, WEIGHTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import csulora
from csulora import Correction, CsuloraError, LoraAdapter, Realignment, Report, UsageError
from csulora.settings import FORMS, GRANULARITIES, method_from_dict

strengths = st.one_of(st.floats(0, 1e300), st.just(math.inf), st.integers(0, 10**6))


def through_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


@given(st.tuples(*[strengths] * 4), st.sampled_from(GRANULARITIES), st.sampled_from(FORMS))
def test_a_correction_survives_json(four, granularity, form):
    correction = Correction(*four, granularity=granularity, form=form)
    assert Correction.from_dict(through_json(correction.to_dict())) == correction


@given(strengths, st.none() | st.floats(0, 1e300), *[st.booleans()] * 2, st.sampled_from(FORMS))
def test_a_realignment_survives_json(strength, target, edge, opposed, form):
    realignment = Realignment(strength, target, edge, opposed, form)
    values = through_json(realignment.to_dict())
    assert values["method"] == "realign"
    assert method_from_dict(values) == Realignment.from_dict(values) == realignment


def test_settings_of_either_method():
    assert method_from_dict({}) == Correction()
    assert method_from_dict({"method": "realign"}) == Realignment()
    assert Realignment().gamma == 1 and Realignment(form="exact").gamma == 0.5
    assert Realignment(target=0).gamma == 0
    for wrong, word in (
        ({"method": "realigned"}, "method must be one of csulora, realign"),
        ({"method": []}, "method must be one of"),
        ({"method": "realign", "lambda_off": 1}, "'lambda_off' is no setting"),
        ({"method": "realign", "strength": True}, "strength must be a number"),
        ({"method": "realign", "target": math.inf}, "target must be finite"),
        ({"method": "realign", "edge": "auto"}, "edge must be True or False"),
        ({"method": "realign", "opposed": None}, "opposed must be True or False"),
        ({"method": "realign", "form": "r"}, "form must be one of"),
        (None, "must be a mapping"),
    ):
        with pytest.raises(UsageError, match=word):
            method_from_dict(wrong)
    with pytest.raises(UsageError, match="not those of csulora"):
        Correction.from_dict(Realignment().to_dict())


def test_settings_from_elsewhere():
    assert Correction.from_dict({}) == Correction()
    assert str(Correction(lambda_off=-0.0).lambda_off) == "0.0"
    assert Correction.from_dict({"lambda_off": "inf"}).lambda_off == math.inf
    for wrong, word in (
        ({"lambda_of": 1}, "'lambda_of' is no setting"),
        ({"lambda_off": "1"}, "lambda_off must be a number"),
        ({"form": "exactly"}, "form must be one of exact, same"),
        ({"rank": "same"}, "'rank' is no setting"),
        ({1: 2}, "'1' is no setting"),
    ):
        with pytest.raises(UsageError, match=word):
            Correction.from_dict(wrong)


@pytest.fixture
def corrected(adapter, subspace):
    loaded = csulora.SafetySubspace.load(subspace)
    return csulora.correct(LoraAdapter.load(adapter), loaded, Correction(lambda_off=math.inf))


def test_a_report_survives_json_and_the_disk(corrected, out):
    new, report = corrected
    assert Report.from_dict(through_json(report.to_dict())) == report
    left_out = new.save(out, report=report)
    written = json.loads((out / builders.REPORT).read_text())
    output = {
        "sha256": builders.digest(out / WEIGHTS),
        "config_sha256": builders.digest(out / CONFIG),
    }
    assert written["output"] == output
    assert Report.from_dict(written) == replace(report, left_out=left_out, output=output)
    new.save(out.parent / "again", report=report.to_dict())
    assert builders.tree(out.parent / "again") == builders.tree(out)


def test_a_report_knows_the_correction_it_was_made_with(corrected):
    assert corrected[1].correction == Correction(lambda_off=math.inf)
    values = corrected[1].to_dict()
    values["settings"]["lambda_off"] = 99
    values["totals"]["relative_energy_before"]["off"] = 99
    again = Report.from_dict(corrected[1].to_dict())
    assert again == corrected[1] and again.settings is not corrected[1].settings


@pytest.mark.parametrize("value", [None, 5, "x", [], {}])
def test_what_is_no_mapping_is_refused(value):
    with pytest.raises(CsuloraError, match="not a report"):
        Report.from_dict(value)
    if value != {}:
        with pytest.raises(UsageError, match="must be a mapping"):
            Correction.from_dict(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(left_out=None),
        lambda values: values.update(settings=3),
        lambda values: values.update(warnings="abc"),
        lambda values: values["totals"].update(relative_energy_before={}),
        lambda values: values["totals"].update(energy_before="many"),
        lambda values: values.update(format="csulora_report/0"),
        lambda values: values.pop("totals"),
        lambda values: values["totals"].pop("energy_before"),
        lambda values: values.update(modules=[]),
        lambda values: values.update(surprise=1),
    ],
)
def test_what_is_no_report_is_refused(corrected, change):
    values = through_json(corrected[1].to_dict())
    change(values)
    with pytest.raises(CsuloraError, match="not a report"):
        Report.from_dict(values)


def test_tensors_in_are_the_file_in_and_tensors_out_the_file_out(adapter, subspace, out):
    """As a folder and in memory, an adapter is read, corrected and written alike."""
    loaded = csulora.SafetySubspace.load(subspace)
    tensors, config = load_file(adapter / WEIGHTS), json.loads((adapter / CONFIG).read_text())
    one, _ = csulora.correct(LoraAdapter.load(adapter), loaded)
    two, _ = csulora.correct(LoraAdapter.from_tensors(tensors, config), loaded)
    assert two.source is None and config == json.loads((adapter / CONFIG).read_text())
    one.save(out)
    written = load_file(out / WEIGHTS)
    found = two.tensors()
    assert found.keys() == written.keys()
    for name, X in written.items():  # the last bit of a product depends on where its operands lie
        torch.testing.assert_close(found[name], X, rtol=1e-5, atol=1e-6)
    assert two.written_config() == json.loads((out / CONFIG).read_text())
    assert two.nbytes == sum(X.nbytes for X in written.values())


def test_the_configuration_of_a_corrected_adapter_tells_its_ranks(corrected):
    new, _ = corrected
    assert {module.rank for module in new.modules.values()} == {8}
    assert (new.config["r"], new.config["lora_alpha"]) == (8, 16)
    assert new.written_config() == new.config
    new.written_config()["target_modules"].append("x")
    assert "x" not in new.config["target_modules"]
    # An adapter put together by hand may hold another one, but never writes it.
    other = LoraAdapter(new.modules, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    assert other.written_config() == {**other.config, "r": 8, "lora_alpha": 16} | {
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_a_peft_model_in_memory(subspace):
    """What PEFT hands out goes in; what comes out goes into PEFT, and the model computes with it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    names = ["q_proj", "down_proj", "embed_tokens"]
    settings = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, use_rslora=True)
    base = transformers.LlamaForCausalLM(config)
    weights = {name: X.clone() for name, X in base.state_dict().items()}
    model = peft.get_peft_model(base, settings)
    adapter = LoraAdapter.from_tensors(
        peft.get_peft_model_state_dict(model, save_embedding_layers=False),
        model.peft_config["default"].to_dict(),
    )
    assert adapter.config["target_modules"] == sorted(names)  # PEFT holds a set
    loaded = builders.random_subspace(adapter)
    new, _ = csulora.correct(adapter, loaded, Correction(form="same"))
    assert not peft.set_peft_model_state_dict(model, new.tensors()).unexpected_keys
    merged = model.merge_and_unload().state_dict()
    for name, module in new.modules.items():
        update = module.scaling * module.B @ module.A
        update = update.mT if module.embedding else update
        torch.testing.assert_close(merged[f"{name}.weight"], weights[f"{name}.weight"] + update)


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        ({}, {}, "holds no LoRA tensors"),
        ({"x": torch.ones(2)}, {}, "pass-through"),
        (None, {"r": 5}, "do not fit rank 5"),
        (None, {"peft_type": "IA3"}, "only LORA adapters"),
        (None, {"task_type": object()}, "is not a value of a configuration file"),
        (None, {"lora_alpha": math.nan}, "not a finite number"),
        ({"x": torch.ones(2, device="meta")}, {}, "x is not a dense tensor"),
        ({"x": torch.eye(2).to_sparse()}, {}, "x is not a dense tensor"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, {}, "x is torch.complex64"),
        ({"x": [1.0]}, {}, "x is not a dense tensor"),
    ],
)
def test_tensors_that_are_no_adapter(adapter, tensors, config, word):
    good = json.loads((adapter / CONFIG).read_text())
    tensors = load_file(adapter / WEIGHTS) if tensors is None else tensors
    with pytest.raises(CsuloraError, match=word):
        LoraAdapter.from_tensors(tensors, good | config)


def test_a_nan_among_the_tensors(adapter):
    tensors, config = load_file(adapter / WEIGHTS), json.loads((adapter / CONFIG).read_text())
    name = min(tensors)
    tensors[name][0, 0] = math.nan
    with pytest.raises(CsuloraError, match=f"tensor {name} holds NaN or Inf"):
        LoraAdapter.from_tensors(tensors, config)


def test_identify_is_the_source_that_load_finds(adapter):
    found = csulora.identify(adapter)
    assert found == LoraAdapter.load(adapter).source
    assert found.sha256 == builders.digest(adapter / WEIGHTS)
    assert found.to_dict() == {
        "name": adapter.name,
        "sha256": builders.digest(adapter / WEIGHTS),
        "config_sha256": builders.digest(adapter / CONFIG),
    }


def test_what_holds_tensors_shows_in_one_line_and_equals_itself_only(adapter, subspace):
    one, two = LoraAdapter.load(adapter), LoraAdapter.load(adapter)
    loaded = csulora.SafetySubspace.load(subspace)
    module, basis = one.modules[builders.LAYERS[0]], loaded.modules[builders.LAYERS[0]]
    assert [repr(value) for value in (one, module, loaded, basis)] == [
        "LoraAdapter(2 modules, rank 4, from lora)",
        "LoraModule(24 x 16, rank 4, alpha 8, float32)",
        "SafetySubspace(2 modules, rank 4, base to aligned)",
        "ModuleSubspace(24 x 16, rank 4, 50.0 % of the energy)",
    ]
    assert one == one and one != two and len({one, two, module, loaded, basis}) == 5
