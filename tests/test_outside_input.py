"""What other programs and users hand over: their subspace files, lists, patterns, parameters, plots."""

import json
import math

import builders
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
from csulora.files.names import natural
from csulora.plots import _percent, plot_shares

SQUARE, WIDE = "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"


def bases(shapes, k=3):
    generator = torch.Generator().manual_seed(5)
    return {
        name: tuple(torch.linalg.qr(torch.randn(d, k, generator=generator))[0] for d in shape)
        for name, shape in shapes.items()
    }


def write_foreign(path, pairs):
    """A subspace file with the tensors of the format and no metadata but the format's name."""
    tensors = {}
    for name, (U, V) in pairs.items():
        tensors |= {f"{name}.U": U, f"{name}.S": torch.ones(U.shape[1]), f"{name}.V": V}
    save_file(
        {n: X.contiguous() for n, X in tensors.items()}, path, {"csulora_format": builders.FORMAT}
    )
    return path


def shares(folder, module, U, V):
    dW = builders.effective(folder)[module]
    return (oracle.energies(dW, U, V) / dW.square().sum()).tolist()


@pytest.mark.parametrize("flipped_file", [False, True])
def test_u_is_on_the_output_side_also_of_square_conv1d_weights(tmp_path, flipped_file):
    """Unless the other modules show that the file was made in ignorance of the orientation."""
    shapes = {SQUARE: (16, 16), WIDE: (24, 16)}
    adapter = builders.write_adapter(tmp_path / "lora", shapes=shapes, fan_in_fan_out=True)
    pairs = bases(shapes)
    stored = {n: (V, U) if flipped_file else (U, V) for n, (U, V) in pairs.items()}
    file = write_foreign(tmp_path / "s.safetensors", stored)
    subspace = csulora.SafetySubspace.load(file)
    report = csulora.decompose(csulora.LoraAdapter.load(adapter), subspace)
    for name, (U, V) in pairs.items():
        found = list(report.modules[name].relative_energy_before.values())
        assert found == pytest.approx(shares(adapter, name, U, V), rel=1e-4)


def test_fan_in_fan_out_of_linear_layers_is_ignored_as_peft_does(tmp_path):
    shapes = {"h.0.q_proj": (16, 16), "h.0.fc": (24, 16)}
    adapter = builders.write_adapter(tmp_path / "lora", shapes=shapes, fan_in_fan_out=True)
    pairs = bases(shapes)
    subspace = csulora.SafetySubspace.load(write_foreign(tmp_path / "s.safetensors", pairs))
    report = csulora.decompose(csulora.LoraAdapter.load(adapter), subspace)
    found = list(report.modules["h.0.q_proj"].relative_energy_before.values())
    assert found == pytest.approx(shares(adapter, "h.0.q_proj", *pairs["h.0.q_proj"]), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{builders.LAYERS[0]}.U"].fill_(math.nan), ["q_proj.U", "NaN"]),
        (lambda t: t.update(other=torch.ones(2)), ["other"]),
    ],
)
def test_a_broken_subspace_is_one_clear_line(tmp_path, adapter, out, capsys, change, words):
    tensors = builders.subspace_tensors()
    change(tensors)
    file = builders.write_subspace(tmp_path / "bad.safetensors", tensors)
    result = builders.run(capsys, "correct", adapter, "--subspace", file, "--out-dir", out)
    assert result.code == 2 and len(result.complaints) == 1, result.err
    assert all(word in result.complaints[0] for word in ("bad.safetensors", *words))


def test_energy_share_must_be_a_number(tmp_path, adapter, out, capsys):
    file = builders.write_subspace(tmp_path / "bad.safetensors", energy_share='{"a": NaN}')
    result = builders.run(capsys, "correct", adapter, "--subspace", file, "--out-dir", out)
    assert result.code == 2 and "NaN" in result.err and "bad.safetensors" in result.err


@pytest.mark.parametrize("end", ["\0", "\n", "\r\n"])
def test_lists_may_end_names_with_nul_and_start_with_a_mark(tmp_path, subspace, out, capsys, end):
    folders = [
        builders.write_adapter(tmp_path / "in" / name, seed=i) for i, name in enumerate("ab")
    ]
    listing = tmp_path / "list"
    listing.write_bytes(b"\xef\xbb\xbf" + "".join(f"{f}{end}" for f in folders).encode())
    arguments = ("--adapters-from", listing, "--subspace", subspace, "--out-dir", out)
    result = builders.run(capsys, "correct", *arguments)
    assert (result.code, result.complaints) == (0, []), result.err
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"a", "b"}


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_cannot_be_a_name_is_refused(name, subspace, out):
    with pytest.raises(csulora.UsageError, match="cannot be the name"):
        csulora.correct_many([name], csulora.SafetySubspace.load(subspace), out)
    assert not out.exists()


def test_spaces_between_module_names_do_not_count(pair, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    result = builders.run(capsys, "estimate", *pair, "--out", out, "--modules", "q_proj, down_proj")
    assert result.code == 0, result.err
    assert len(csulora.SafetySubspace.load(out).modules) == 2


@pytest.mark.parametrize(
    "key", ["([a-z0-9_.]+)+!", "(a|aa)+", "((a|b))*x", "(.*a){12}", ".*.*.*.*.*x", "(a*)*"]
)
def test_a_pattern_that_could_match_for_ever_fails_its_adapter_alone(
    key, adapter, subspace, out, capsys
):
    good = builders.write_adapter(adapter.parent / "good")
    builders.edit_json(adapter / builders.CONFIG, rank_pattern={key: 4})
    arguments = ("--subspace", subspace, "--out-dir", out)
    result = builders.run(capsys, "correct", adapter, good, *arguments)
    assert result.code == 1 and len(result.complaints) == 1
    assert "rank_pattern" in result.complaints[0] and key in result.complaints[0]
    assert (out / "good").is_dir() and not (out / "lora").exists()


def test_portable_scaling_out_of_range_writes_nothing(adapter, subspace, out, capsys):
    builders.edit_json(adapter / builders.CONFIG, lora_alpha=1e40)
    arguments = ("--subspace", subspace, "--out-dir", out, "--portable")
    result = builders.run(capsys, "correct", adapter, *arguments)
    assert result.code == 1 and "lora_B" in result.err
    assert not (out / "lora").exists()


def test_portable_mentions_no_biases(adapter, subspace, out, capsys):
    builders.edit_json(adapter / builders.CONFIG, bias="all", lora_bias=True)
    arguments = ("--subspace", subspace, "--out-dir", out, "--portable")
    assert builders.run(capsys, "correct", adapter, *arguments).code == 0
    config = json.loads((out / "lora" / builders.CONFIG).read_text())
    assert (config["bias"], config["lora_bias"]) == ("none", False)


def test_factors_may_be_parameters(adapter, subspace):
    loaded = csulora.LoraAdapter.load(adapter)
    modules = {
        name: csulora.LoraModule(
            torch.nn.Parameter(m.A), torch.nn.Parameter(m.B), m.alpha, m.scaling
        )
        for name, m in loaded.modules.items()
    }
    learnt = csulora.LoraAdapter(modules, loaded.config)
    file = csulora.SafetySubspace.load(subspace)
    expected, _ = csulora.correct(loaded, file)
    found, _ = csulora.correct(learnt, file)
    for name, module in found.modules.items():
        assert torch.equal(module.B @ module.A, expected.modules[name].B @ expected.modules[name].A)
        assert not module.A.requires_grad


@pytest.mark.parametrize("value", [np.float32(3), np.int64(3), np.float64("inf"), 3])
def test_strengths_may_be_any_real_number(value):
    assert csulora.Correction(lambda_off=value).lambda_off == float(value)


@pytest.mark.parametrize("value", [10**400, True, "3", None, np.float32("nan"), -1])
def test_other_strengths_are_refused(value):
    with pytest.raises(csulora.UsageError, match="lambda_off"):
        csulora.Correction(lambda_off=value)


def test_portable_needs_a_module(subspace):
    empty = csulora.LoraAdapter({}, {"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    with pytest.raises(csulora.CsuloraError, match="at least one module"):
        csulora.correct(empty, csulora.SafetySubspace.load(subspace), portable=True)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (3.65e-7, "<.01"), (0.0001, "0.01"), (0.0567, "5.67"), (0.123, "12.3"), (1, "100")],
)
def test_cells_of_the_plot_say_what_is_there(share, text):
    assert _percent(share) == text


def test_a_plot_replaces_no_file_of_another_kind(adapter, subspace, tmp_path, capsys):
    before = subspace.read_bytes()
    result = builders.run(capsys, "inspect", adapter, "--subspace", subspace, "--plot", subspace)
    assert result.code != 0 and "PNG" in result.err
    assert subspace.read_bytes() == before
    picture = tmp_path / "shares.png"
    for _ in range(2):  # its own kind it does replace
        report = csulora.decompose(
            csulora.LoraAdapter.load(adapter), csulora.SafetySubspace.load(subspace)
        )
        plot_shares(report, picture)
    assert picture.stat().st_size > 1000


def test_a_plot_of_names_that_look_like_formulas(tmp_path):
    """matplotlib sets what stands between two dollars as mathematics, and fails where it is none."""
    names = ("layers.$0^$.a$_^$", "layers.$1^$.b$_^$", "layers.2.a.$_^$", "layers.2.b.$_^$")
    folder = builders.write_adapter(tmp_path / "$_^$", shapes=dict.fromkeys(names, (6, 5)))
    loaded = csulora.LoraAdapter.load(folder)
    report = csulora.decompose(loaded, builders.random_subspace(loaded))
    plot_shares(report, tmp_path / "shares.png")


def test_layers_count_in_their_natural_order():
    names = ["layers.10.q", "layers.2.q", "layers.2.k"]
    assert sorted(names, key=natural) == ["layers.2.k", "layers.2.q", "layers.10.q"]


def test_corrected_tensors_of_a_foreign_subspace(tmp_path, adapter, out, capsys):
    """A file by the format's description alone is as good as one of ours."""
    pairs = bases(builders.SHAPES)
    file = write_foreign(tmp_path / "s.safetensors", pairs)
    result = builders.run(capsys, "correct", adapter, "--subspace", file, "--out-dir", out)
    assert result.code == 0, result.err
    for name, dW in builders.effective(adapter).items():
        wanted = oracle.correct(dW, *pairs[name], (0, 10, 10, 10), "direction")
        found = builders.effective(out / "lora")[name]
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    assert load_file(out / "lora" / builders.WEIGHTS)
