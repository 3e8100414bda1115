"""Tensor names that PEFT does not write: what acts as the update of a linear weight is never copied."""

import json
import warnings
from itertools import product

import builders
import oracle
import pytest
import torch
from builders import CONFIG, LAYERS, PREFIX, WEIGHTS, edit_json, edit_tensors, lora_names
from safetensors.torch import load_file

from csulora import Correction, CsuloraError, LoraAdapter, SafetySubspace, correct, decompose

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

Q, DOWN = LAYERS
A_NAME, B_NAME = lora_names(Q)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=12,
            vocab_size=32,
        )
    )


def merged(folder):
    """What PEFT adds to the weights of a model, and whether it missed tensors or ranks did not fit."""
    base = llama().state_dict()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(llama(), folder)
    missed = any("missing adapter keys" in str(warning.message) for warning in told)
    after = model.merge_and_unload().state_dict()
    return {
        name: (after[f"{name}.weight"] - base[f"{name}.weight"]).double() for name in LAYERS
    }, missed


def renamed(change):
    """Rewrite an adapter's file under other names."""
    return lambda folder: edit_tensors(
        folder / WEIGHTS,
        lambda t: [t.__setitem__(change(name), t.pop(name)) for name in list(t)],
    )


def put(name, value):
    return lambda folder: edit_tensors(folder / WEIGHTS, lambda t: t.__setitem__(name, value))


def dropped(name):
    return lambda folder: edit_tensors(folder / WEIGHTS, lambda t: t.pop(name))


def with_adapter(name):
    return lambda key: key.replace(".weight", f".{name}.weight")


UNPREFIXED = renamed(lambda key: key.removeprefix(PREFIX))
# Names in the file, and whether PEFT finds them there by itself.
OTHER_NAMES = {
    "as PEFT writes them": (renamed(lambda key: key), True),
    "adapter called default": (renamed(with_adapter("default")), True),
    "one pair called default": (
        renamed(lambda key: with_adapter("default")(key) if Q in key else key),
        True,
    ),
    "adapter called otherwise": (renamed(with_adapter("tuned")), False),
    "no prefix": (UNPREFIXED, False),
    "no prefix, called default": (
        renamed(lambda key: with_adapter("default")(key).removeprefix(PREFIX)),
        False,
    ),
}


@pytest.mark.parametrize("pass_through", [False, True])
@pytest.mark.parametrize("case", OTHER_NAMES)
def test_other_names_of_factors_are_corrected_and_written_as_peft_does(
    case, pass_through, adapter, subspace, tmp_path
):
    change, found_by_peft = OTHER_NAMES[case]
    source = builders.effective(adapter)
    change(adapter)
    before, missed = merged(adapter)
    assert missed != found_by_peft
    loaded = SafetySubspace.load(subspace)
    new, report = correct(LoraAdapter.load(adapter, pass_through=pass_through), loaded)
    new.save(tmp_path / "new")
    assert report.passed_through == [] and set(report.modules) == set(LAYERS)
    names = {name for module in LAYERS for name in lora_names(module)}
    assert set(load_file(tmp_path / "new" / WEIGHTS)) == names
    after, missed = merged(tmp_path / "new")
    assert not missed
    for name, dW in source.items():
        basis = loaded.modules[name]
        wanted = oracle.correct(dW, basis.U, basis.V, (0, 10, 10, 10), "direction")
        assert float((after[name] - wanted).norm()) <= 1e-5 * float(dW.norm())
        assert float((before[name] - dW * found_by_peft).norm()) <= 1e-5 * float(dW.norm())


EMPTY = torch.ones(0)
REFUSED = {
    "empty": (put(A_NAME, EMPTY), [A_NAME, "empty", "ZeRO-3"]),
    "both empty": (
        lambda folder: (put(A_NAME, EMPTY)(folder), put(B_NAME, EMPTY)(folder)),
        ["empty", "ZeRO-3"],
    ),
    "empty matrix": (put(B_NAME, torch.ones(0, 4)), [B_NAME, "empty", "ZeRO-3"]),
    "flat": (put(A_NAME, torch.ones(64)), [A_NAME, "1 dimension"]),
    "a number": (put(B_NAME, torch.tensor(1.0)), [B_NAME, "0 dimension"]),
    "a matrix and a convolution": (put(A_NAME, torch.ones(4, 16, 1, 1)), [B_NAME, "2 dimension"]),
    "no B": (dropped(B_NAME), [A_NAME, "has no lora_B"]),
    "no A": (dropped(A_NAME), [B_NAME, "has no lora_A"]),
    "twice": (
        put(with_adapter("default")(A_NAME), torch.ones(4, 16)),
        [A_NAME, with_adapter("default")(A_NAME), "same factor"],
    ),
    "twice, without prefix": (
        put(A_NAME.removeprefix(PREFIX), torch.ones(4, 16)),
        [A_NAME, "same factor"],
    ),
    "two adapters": (
        renamed(lambda key: with_adapter("one" if Q in key else "two")(key)),
        ["2 adapters", "one, two"],
    ),
    "other prefix": (renamed(lambda key: f"module.{key}"), ["module.base_model", PREFIX]),
    "half a prefix": (
        renamed(lambda key: key.replace(f"{PREFIX}model.", "base_model.")),
        ["base_model.layers", PREFIX],
    ),
    "no weight": (
        renamed(lambda key: key.removesuffix(".weight")),
        ["lora_A", "not named as PEFT"],
    ),
    "glued": (renamed(lambda key: key.replace("lora_A.", "lora_A_")), ["not named as PEFT"]),
    "no module": (put("lora_A.weight", torch.ones(4, 16)), ["lora_A.weight", "not named as PEFT"]),
    "empty part": (put(f"{PREFIX}a..lora_A.weight", torch.ones(4, 16)), ["does not name a module"]),
    "long name": (
        put(f"{PREFIX}{'a.' * 600}b.lora_A.weight", torch.ones(4, 16)),
        ["does not name a module"],
    ),
    "bias of A": (put(f"{PREFIX}{Q}.lora_A.bias", torch.ones(4)), ["lora_A.bias"]),
    "magnitude without use_dora": (
        put(f"{PREFIX}{Q}.lora_magnitude_vector", torch.ones(24)),
        ["lora_magnitude_vector", "use_dora"],
    ),
    "wrapped without target_parameters": (
        renamed(lambda key: key.replace("q_proj", "q_proj.base_layer")),
        ["q_proj.base_layer", "target_parameters"],
    ),
    "wrapped, of one rank": (
        lambda folder: (
            renamed(lambda key: key.replace("q_proj", "q_proj.base_layer"))(folder),
            edit_json(folder / CONFIG, target_parameters=["anything"]),
        ),
        ["q_proj.base_layer", "target_parameters"],
    ),
    "DoRA alone": (
        lambda folder: edit_json(folder / CONFIG, use_dora=True),
        ["no module could be corrected"],
    ),
    "convolutions alone": (
        lambda folder: edit_tensors(
            folder / WEIGHTS,
            lambda t: t.update({name: X[..., None] for name, X in t.items()}),
        ),
        ["no module could be corrected"],
    ),
    "nothing of LoRA": (
        lambda folder: edit_tensors(
            folder / WEIGHTS, lambda t: (t.clear(), t.update(x=torch.ones(2)))
        ),
        ["no module could be corrected"],
    ),
}


@pytest.mark.parametrize("form", [[], ["--form", "same"]], ids=["exact", "same"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_corrected_is_not_copied_either(case, form, adapter, subspace, out, capsys):
    change, words = REFUSED[case]
    change(adapter)
    arguments = ("--subspace", subspace, "--out-dir", out, "--pass-through", *form)
    result = builders.run(capsys, "correct", adapter, *arguments)
    assert result.code == 1 and len(result.complaints) == 1, result.err
    assert all(word in result.complaints[0] for word in (str(adapter), *words)), result.err
    assert not (out / "lora").exists()


def test_a_target_parameter_does_not_make_an_expert_of_a_linear_layer(adapter, subspace):
    """PEFT finds no such parameter, and applies the pair to the linear weight."""
    for parameters in (["q_proj.other"], ["other"], [f"{Q}.weight"]):
        edit_json(adapter / CONFIG, target_parameters=parameters)
        loaded = LoraAdapter.load(adapter, pass_through=True)
        assert set(loaded.modules) == set(LAYERS) and not loaded.passed_through
    edit_json(adapter / CONFIG, target_parameters=["other"], alpha_pattern={"other": 3})
    correct(LoraAdapter.load(adapter), SafetySubspace.load(subspace), portable=True)


def test_what_is_not_corrected_can_still_be_looked_at(adapter, subspace):
    edit_json(adapter / CONFIG, use_dora=True)
    report = decompose(LoraAdapter.load(adapter, pass_through=True), SafetySubspace.load(subspace))
    assert any("no module could be corrected" in warning for warning in report.warnings)


BIASES = {
    f"{PREFIX}{Q}.base_layer.bias": ("all", False),
    f"{PREFIX}{Q}.lora_B.bias": ("none", True),
}


@pytest.mark.parametrize(
    ("form", "tensor"),
    [*product(["exact", "same", "untouched"], [None, *BIASES]), ("portable", None)],
)
def test_the_configuration_tells_of_the_biases_that_are_there(
    tensor, form, adapter, subspace, tmp_path
):
    edit_json(adapter / CONFIG, bias="all", lora_bias=True)
    if tensor:
        put(tensor, torch.ones(24))(adapter)
    loaded = LoraAdapter.load(adapter, pass_through=True)
    portable = form == "portable"
    settings = {"same": Correction(form="same"), "untouched": Correction(0, 0, 0, 0)}
    new, _ = correct(loaded, SafetySubspace.load(subspace), settings.get(form), portable=portable)
    new.save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert (config["bias"], config["lora_bias"]) == BIASES.get(tensor, ("none", False))


def test_a_configuration_that_does_not_mention_biases_stays_silent(adapter, subspace):
    edit_json(adapter / CONFIG, bias=None)
    new, _ = correct(LoraAdapter.load(adapter), SafetySubspace.load(subspace))
    assert not {"bias", "lora_bias"} & new.written_config().keys()


def test_tensors_of_a_model_that_peft_did_not_wrap():
    """transformers' add_adapter leaves no prefix on the names that PEFT hands out."""
    model = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config)
    tensors = peft.get_peft_model_state_dict(model)
    assert not any(name.startswith(PREFIX) for name in tensors)
    adapter = LoraAdapter.from_tensors(tensors, config.to_dict())
    assert list(adapter.modules) == [Q]
    with pytest.raises(CsuloraError, match="has no lora_B"):
        LoraAdapter.from_tensors({A_NAME: torch.ones(2, 16)}, config.to_dict())
