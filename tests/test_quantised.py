"""Quantised checkpoints: which are read, and which are refused by name."""

import builders
import pytest
import torch
from builders import edit_json, edit_tensors, run
from checkpoint_models import SINGLE, Q, llama, write_pair

from csulora import estimate

pytest.importorskip("transformers")


def of_bits(dtype, *shape):
    return torch.ones(shape).to(dtype)


# What each method stores for a weight of 16 x 16, with quantization_config and what names the method.
QUANTISED = {
    "gptq": (
        {
            "qweight": of_bits(torch.int32, 2, 16),
            "qzeros": of_bits(torch.int32, 1, 2),
            "scales": of_bits(torch.float16, 1, 16),
            "g_idx": of_bits(torch.int32, 16),
        },
        {"quant_method": "gptq", "bits": 4},
        "gptq",
    ),
    "awq": (
        {
            "qweight": of_bits(torch.int32, 16, 2),
            "qzeros": of_bits(torch.int32, 1, 2),
            "scales": of_bits(torch.float16, 1, 16),
        },
        {"quant_method": "awq", "bits": 4},
        "awq",
    ),
    "bitsandbytes, 4 bits": (
        {
            "weight": of_bits(torch.uint8, 128, 1),
            "weight.absmax": of_bits(torch.float32, 4),
            "weight.quant_map": of_bits(torch.float32, 16),
            "weight.quant_state.bitsandbytes__nf4": of_bits(torch.uint8, 80),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        "bitsandbytes 4-bit",
    ),
    "bitsandbytes, 8 bits": (
        {"weight": of_bits(torch.int8, 16, 16), "SCB": of_bits(torch.float32, 16)},
        {"load_in_8bit": True},
        "bitsandbytes",
    ),
    "fp8": (
        {
            "weight": of_bits(torch.float8_e4m3fn, 16, 16),
            "weight_scale_inv": of_bits(torch.float32, 1, 1),
        },
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8",
    ),
    "compressed-tensors, packed": (
        {
            "weight_packed": of_bits(torch.int32, 16, 2),
            "weight_scale": of_bits(torch.bfloat16, 16, 1),
            "weight_shape": of_bits(torch.int64, 2),
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "compressed-tensors, int8": (
        {
            "weight": of_bits(torch.int8, 16, 16),
            "weight_scale": of_bits(torch.bfloat16, 16, 1),
        },
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "compressed-tensors",
    ),
}


def quantise(folder, tensors, config, module=Q):
    def change(stored):
        del stored[f"{module}.weight"]
        stored.update({f"{module}.{name}": X for name, X in tensors.items()})

    edit_tensors(folder / SINGLE, change)
    edit_json(folder / "config.json", quantization_config=config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("plain"), llama())


def copied(pair, folder):
    for path in pair:
        (folder / path.name).mkdir(parents=True)
        for name in (SINGLE, "config.json"):
            (folder / path.name / name).write_bytes((path / name).read_bytes())
    return folder / "base", folder / "aligned"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_called_so(kind, named, plain, tmp_path, capsys):
    tensors, config, method = QUANTISED[kind]
    like = builders.write_adapter(tmp_path / "lora", shapes={Q: (16, 16)})
    for side in (0, 1):
        pair = copied(plain, tmp_path / str(side))
        quantise(pair[side], tensors, config if named else None)
        for selection in ((), ("--modules", "q_proj"), ("--like", like)):
            result = run(capsys, "estimate", *pair, "--out", tmp_path / "s.safetensors", *selection)
            assert result.code == 2 and len(result.complaints) == 1
            said = result.complaints[0]
            for word in (str(pair[side]), f"{Q}.", "quantised (", "unquantized", "dequantize"):
                assert word in said
            assert not named or f"quantised ({method}" in said
            assert "--like" not in said and "--modules" not in said
        # what is not quantised can be had
        assert len(estimate(*pair, rank=1, modules=["down_proj"]).modules) == 1


@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_quantised_under_names_of_its_own(place, plain, tmp_path, capsys):
    """A method that csulora does not know by its tensors is known by config.json."""
    pair = copied(plain, tmp_path / "pair")
    for folder in pair:
        quantise(folder, {"codes": of_bits(torch.int16, 4, 4)}, None)
        said = {"quant_method": "aqlm"}
        nested = {"quantization_config": said} if place == "text_config" else said
        edit_json(folder / "config.json", **{place: nested})
    like = builders.write_adapter(tmp_path / "lora", shapes={Q: (16, 16)})
    for selection in (("--modules", "q_proj"), ("--like", like)):
        result = run(capsys, "estimate", *pair, "--out", tmp_path / "s.safetensors", *selection)
        assert result.code == 2 and "quantised (aqlm)" in result.complaints[0]


@pytest.mark.parametrize("option", ["--like", "--modules"])
def test_no_error_recommends_what_was_just_done(option, plain, tmp_path, capsys):
    like = builders.write_adapter(tmp_path / "lora", shapes={"model.layers.7.x": (16, 16)})
    value = like if option == "--like" else "model.layers.7.x"
    result = run(capsys, "estimate", *plain, "--out", tmp_path / "s.safetensors", option, value)
    assert result.code == 2 and "model.layers.7.x" in result.complaints[0]
    assert "--like" not in result.err and "--modules" not in result.err
