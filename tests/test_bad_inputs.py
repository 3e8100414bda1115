"""Bad and hostile input: one clear line, the right exit code, nothing written, nothing executed."""

import json
import math
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import (
    CONFIG,
    LAYERS,
    PREFIX,
    REPORT,
    WEIGHTS,
    checkpoint_pair,
    checkpoint_tensors,
    edit_json,
    edit_tensors,
    effective,
    lora_names,
    raw_entry,
    raw_safetensors,
    run,
    subspace_tensors,
    tree,
    write_adapter,
    write_checkpoint,
    write_json,
    write_subspace,
)
from safetensors.torch import load_file

Q, DOWN = LAYERS
A_NAME, B_NAME = lora_names(Q)


class Payload:
    """Unpickling this runs a command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def check_refusal(result, code, words, out, complaints=1):
    """One line that holds every word, nothing else unusual, nothing left on disk."""
    assert result.code == code, result.err
    assert len(result.complaints) == complaints, result.err
    for word in words:
        assert word in result.complaints[0], result.complaints[0]
    assert "Traceback" not in result.err
    # Names from files reach the terminal only as printable text, one line a message.
    assert all(line.startswith("csulora: ") for line in result.err.rstrip("\n").split("\n"))
    assert result.err.replace("\n", "").isprintable()
    assert not out.exists() or (out.is_dir() and not list(out.iterdir()))


# --- adapters -------------------------------------------------------------------------------------


def weights(data):
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def config(**changes):
    return lambda folder: edit_json(folder / CONFIG, **changes)


def config_text(text):
    return lambda folder: (folder / CONFIG).write_bytes(text)


def config_value(text, field="lora_alpha"):
    """Put a JSON literal that json.dumps would not write into the configuration."""

    def change(folder):
        edit_json(folder / CONFIG, **{field: "HERE"})
        path = folder / CONFIG
        path.write_text(path.read_text().replace('"HERE"', text))

    return change


def tensors(change):
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def put(name, value):
    return tensors(lambda found: found.__setitem__(name, value))


def poke(name, value):
    return tensors(lambda found: found[name].view(-1).__setitem__(3, value))


def truncate(folder, size):
    os.truncate(folder / WEIGHTS, size)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    payload = Payload(folder.parent.parent / "EXECUTED")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(payload))


def linked(name, target):
    def change(folder):
        outside = folder.parent.parent / "outside"
        outside.mkdir()
        if (folder / name).exists():
            (folder / name).rename(outside / target)
        else:
            (outside / target).write_text("secret")
        (folder / name).symlink_to(outside / target)

    return change


def fifo(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def names_clash(folder):
    write_adapter(folder, shapes={Q: (24, 16), "layers.0.self_attn.q_proj": (24, 16)})


ONE = torch.ones(1)
F32_PAIR = {A_NAME: raw_entry("F32", [4, 16], 0, 256), B_NAME: raw_entry("F32", [24, 4], 256, 640)}

BAD_ADAPTERS = {
    # safetensors
    "header-of-2^60-bytes": (weights(raw_safetensors(b"{}", claim=2**60)), [WEIGHTS]),
    "header-of-2^64-1-bytes": (weights(raw_safetensors(b"{}", claim=2**64 - 1)), [WEIGHTS]),
    "truncated-length": (partial(truncate, size=5), [WEIGHTS]),
    "truncated-header": (partial(truncate, size=40), [WEIGHTS]),
    "truncated-body": (lambda f: truncate(f, (f / WEIGHTS).stat().st_size - 1), [WEIGHTS]),
    "trailing-bytes": (lambda f: truncate(f, (f / WEIGHTS).stat().st_size + 8), [WEIGHTS]),
    "header-not-json": (weights(raw_safetensors(b"not json")), [WEIGHTS]),
    "header-not-utf8": (weights(raw_safetensors(b"\xff\xfe{}")), [WEIGHTS]),
    "header-a-list": (weights(raw_safetensors([1, 2])), [WEIGHTS]),
    "header-deeply-nested": (weights(raw_safetensors(b'{"a":' * 100_000)), [WEIGHTS]),
    "empty-file": (weights(b""), [WEIGHTS]),
    "no-tensors": (weights(raw_safetensors({})), [WEIGHTS, "no tensors"]),
    "offsets-outside": (
        weights(raw_safetensors({A_NAME: raw_entry("F32", [4, 16], 0, 1 << 40)}, b"0" * 64)),
        [WEIGHTS],
    ),
    "offsets-overlap": (
        weights(raw_safetensors(F32_PAIR | {"x": raw_entry("F32", [4], 0, 16)}, b"0" * 640)),
        [WEIGHTS],
    ),
    "offsets-reversed": (
        weights(raw_safetensors({A_NAME: raw_entry("F32", [4], 16, 0)}, b"0" * 16)),
        [WEIGHTS],
    ),
    "shape-overflows": (
        weights(raw_safetensors({A_NAME: raw_entry("F32", [2**62, 2**62], 0, 16)}, b"0" * 16)),
        [WEIGHTS],
    ),
    "shape-negative": (
        weights(raw_safetensors({A_NAME: raw_entry("F32", [-1, 4], 0, 16)}, b"0" * 16)),
        [WEIGHTS],
    ),
    "dtype-unknown": (
        weights(raw_safetensors({A_NAME: raw_entry("F31", [4], 0, 16)}, b"0" * 16)),
        [WEIGHTS],
    ),
    # other files than safetensors
    "pickle": (pickled, ["adapter_model.bin", "never read", "safe_serialization"]),
    "weights-missing": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "no such file"]),
    "weights-are-a-pickle": (weights(pickle.dumps({"a": 1})), [WEIGHTS]),
    "weights-a-folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), [WEIGHTS]),
    "weights-linked-outside": (linked(WEIGHTS, "other.safetensors"), [WEIGHTS, "outside"]),
    "config-linked-outside": (linked(CONFIG, "other.json"), [CONFIG, "outside"]),
    "file-linked-outside": (linked("notes.txt", "notes.txt"), ["notes.txt", "outside"]),
    "file-link-dangling": (lambda f: (f / "gone.txt").symlink_to("nowhere"), ["gone.txt"]),
    "file-a-fifo": (fifo("pipe"), ["pipe", "not a regular file"]),
    # configuration
    "config-missing": (lambda f: (f / CONFIG).unlink(), [CONFIG, "no such file"]),
    "config-not-json": (config_text(b"{'r': 8}"), [CONFIG, "JSON"]),
    "config-not-utf8": (config_text(b'{"r": "\xff"}'), [CONFIG, "JSON"]),
    "config-a-list": (config_text(b"[1]"), [CONFIG, "object"]),
    "config-deeply-nested": (config_text(b"[" * 100_000), [CONFIG, "JSON"]),
    "config-number-of-5000-digits": (config_value("1" + "0" * 5000), [CONFIG]),
    "config-number-of-400-digits": (config_value("1" + "0" * 400), [CONFIG]),
    "config-nan-elsewhere": (config_value("NaN", "lora_dropout"), [CONFIG, "NaN"]),
    "config-overflow-elsewhere": (config_value("1e999", "lora_dropout"), [CONFIG, "1e999"]),
    "config-lone-surrogate": (config_value('"\\ud800"', "base_model_name_or_path"), [CONFIG]),
    "not-lora": (config(peft_type="IA3"), [CONFIG, "IA3", "only LORA"]),
    "no-peft-type": (config(peft_type=None), [CONFIG, "peft_type"]),
    "r-0": (config(r=0), [CONFIG, "r is 0"]),
    "r-negative": (config(r=-1), [CONFIG, "r is -1"]),
    "r-1e9": (config(r=10**9), [WEIGHTS, DOWN, "1000000000"]),
    "r-float": (config_value("1e9", "r"), [CONFIG, "integer"]),
    "r-string": (config(r="8"), [CONFIG, "integer", "'8'"]),
    "r-true": (config(r=True), [CONFIG, "integer", "True"]),
    "r-missing": (config(r=None), [CONFIG, "r must be"]),
    "alpha-nan": (config_value("NaN"), [CONFIG, "NaN"]),
    "alpha-infinite": (config_value("1e999"), [CONFIG, "1e999"]),
    "alpha-string": (config(lora_alpha="16"), [CONFIG, "lora_alpha", "number"]),
    "alpha-beyond-energy": (config(lora_alpha=1e200), [DOWN, "energy"]),
    "rank-pattern-regex": (config(rank_pattern={"(q": 4}), [CONFIG, "rank_pattern", "(q"]),
    "rank-pattern-regex-overflow": (
        config(rank_pattern={"q{99999999999999999999}": 4}),
        [CONFIG, "rank_pattern"],
    ),
    "rank-pattern-regex-nested": (
        config(rank_pattern={"(" * 5000 + ")" * 5000: 4}),
        [CONFIG, "rank_pattern"],
    ),
    "rank-pattern-list": (config(rank_pattern=["q"]), [CONFIG, "rank_pattern", "object"]),
    "rank-pattern-zero": (config(rank_pattern={"q_proj": 0}), [CONFIG, "rank_pattern", "q_proj"]),
    "alpha-pattern-string": (config(alpha_pattern={"q_proj": "x"}), [CONFIG, "alpha_pattern"]),
    "target-parameters-number": (config(target_parameters=5), [CONFIG, "target_parameters"]),
    "init-pissa": (config(init_lora_weights="pissa_niter_4"), [CONFIG, "pissa_niter_4", "convert"]),
    "init-olora": (config(init_lora_weights="olora"), [CONFIG, "olora", "convert"]),
    "qalora": (config(use_qalora=True), [CONFIG, "use_qalora"]),
    "layer-replication": (config(layer_replication=[[0, 1]]), [CONFIG, "layer_replication"]),
    # factors
    "rank-not-that-of-config": (config(r=8), [WEIGHTS, DOWN, "rank 8"]),
    "lora-B-missing": (tensors(lambda t: t.pop(B_NAME)), [WEIGHTS, A_NAME, "lora_B"]),
    "lora-A-missing": (tensors(lambda t: t.pop(A_NAME)), [WEIGHTS, B_NAME, "lora_A"]),
    "ranks-differ": (put(B_NAME, torch.ones(24, 5)), [WEIGHTS, Q, "(24, 5)"]),
    "nan": (poke(A_NAME, math.nan), [WEIGHTS, A_NAME, "NaN"]),
    "inf": (poke(B_NAME, math.inf), [WEIGHTS, B_NAME, "Inf"]),
    "minus-inf-and-inf": (both(poke(A_NAME, math.inf), poke(A_NAME, -math.inf)), [WEIGHTS, A_NAME]),
    "shape-not-of-subspace": (put(B_NAME, torch.ones(23, 4)), ["subspace", Q, "23 x 16"]),
    "int8-factors": (put(A_NAME, torch.ones(4, 16, dtype=torch.int8)), [WEIGHTS, A_NAME, "int8"]),
    "fp8-factors": (
        put(A_NAME, torch.ones(4, 16).to(torch.float8_e4m3fn)),
        [WEIGHTS, A_NAME, "float8"],
    ),
    "float64-factors": (
        put(A_NAME, torch.ones(4, 16, dtype=torch.float64)),
        [WEIGHTS, A_NAME, "float64"],
    ),
    "empty-factors": (
        tensors(lambda t: t.update({A_NAME: torch.ones(4, 0), B_NAME: torch.ones(24, 4)})),
        [WEIGHTS, Q, "empty"],
    ),
    "no-lora-tensors": (tensors(lambda t: (t.clear(), t.update(x=ONE))), [WEIGHTS, "x"]),
    "unknown-module": (
        lambda f: write_adapter(f, shapes={"model.layers.9.self_attn.q_proj": (24, 16)}),
        ["subspace", "model.layers.9.self_attn.q_proj"],
    ),
    "two-modules-on-one-target": (names_clash, ["subspace", Q, "both fit"]),
    "newline-in-tensor-name": (
        put("evil\n\x1b[31mcsulora: failed: \u202ename", ONE),
        [WEIGHTS, "evil", "\\x1b[31m"],
    ),
    # LoRA variants and other trained tensors
    "dora": (put(f"{PREFIX}{Q}.lora_magnitude_vector", torch.ones(24)), [WEIGHTS, "magnitude"]),
    "dora-by-config": (config(use_dora=True), [WEIGHTS, A_NAME]),
    "modules-to-save": (put(f"{PREFIX}lm_head.weight", torch.ones(32, 16)), [WEIGHTS, "lm_head"]),
    "embedding": (
        tensors(
            lambda t: t.update(
                {
                    f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 32),
                    f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(16, 4),
                }
            )
        ),
        [WEIGHTS, "lora_embedding_A", "lora_embedding_B"],
    ),
    "lora-bias": (put(f"{PREFIX}{Q}.lora_B.bias", torch.ones(24)), [WEIGHTS, "lora_B.bias"]),
    "plain-bias": (put(f"{PREFIX}{Q}.base_layer.bias", torch.ones(24)), [WEIGHTS, "bias"]),
    "convolution": (
        lambda f: edit_tensors(
            f / WEIGHTS,
            lambda t: t.update(
                {
                    f"{PREFIX}conv.lora_A.weight": torch.ones(4, 3, 3, 3),
                    f"{PREFIX}conv.lora_B.weight": torch.ones(8, 4, 1, 1),
                }
            ),
        ),
        [WEIGHTS, "conv.lora_A.weight", "conv.lora_B.weight"],
    ),
    "experts": (
        both(
            config(target_parameters=["mlp.experts.gate_up_proj"]),
            tensors(
                lambda t: t.update(
                    {
                        f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": torch.ones(8, 16),
                        f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight": torch.ones(24, 8),
                    }
                )
            ),
        ),
        [WEIGHTS, "mlp.experts.lora_A.weight"],
    ),
    "experts-by-bare-name": (
        both(
            config(target_parameters=["gate_up_proj"]),
            tensors(
                lambda t: t.update(
                    {
                        f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": torch.ones(8, 16),
                        f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight": torch.ones(24, 8),
                    }
                )
            ),
        ),
        [WEIGHTS, "mlp.experts"],
    ),
    "trainable-tokens": (
        put(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 16)),
        [WEIGHTS, "trainable_tokens"],
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter(case, tmp_path, adapter, subspace, out, capsys):
    change, words = BAD_ADAPTERS[case]
    change(adapter)
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 1, [str(adapter), *words], out)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("case", ["nan", "unknown-module", "dora", "alpha-beyond-energy", "pickle"])
def test_inspect_refuses_alike(case, tmp_path, adapter, subspace, out, capsys):
    change, words = BAD_ADAPTERS[case]
    change(adapter)
    result = run(capsys, "inspect", adapter, "--subspace", subspace, "--json")
    check_refusal(result, 1, [str(adapter), *words], out)
    assert result.out == ""
    assert not (tmp_path / "EXECUTED").exists()


def test_the_pickle_payload_is_live(tmp_path):
    """The marker of the tests above would appear if anything unpickled the file."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "EXECUTED")))
    assert (tmp_path / "EXECUTED").exists()


def test_adapter_is_a_file(adapter, subspace, out, capsys):
    result = run(capsys, "correct", adapter / WEIGHTS, "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 1, [WEIGHTS, "expected an adapter folder"], out)


def test_adapter_does_not_exist(tmp_path, subspace, out, capsys):
    result = run(capsys, "correct", tmp_path / "no", "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 1, [str(tmp_path / "no"), "no such folder"], out)
    result = run(capsys, "correct", "no-such/adapter", "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 1, ["no-such/adapter", "hub"], out)


def test_ambiguous_suffix(tmp_path, adapter, out, capsys):
    shapes = {f"{tower}.{Q}": (24, 16) for tower in ("text", "vision")}
    path = write_subspace(tmp_path / "two.safetensors", subspace_tensors(shapes))
    write_adapter(adapter, shapes={Q: (24, 16)})
    result = run(capsys, "correct", adapter, "--subspace", path, "--out-dir", out)
    check_refusal(result, 1, [str(path), Q, f"text.{Q}", f"vision.{Q}"], out)


# What PEFT trains besides B A: copied byte for byte if asked to, listed, and the rest corrected.
PASSED_THROUGH = {
    "dora": 3,  # the magnitude and both factors it belongs to
    "dora-by-config": 4,
    "modules-to-save": 1,
    "embedding": 2,
    "lora-bias": 1,
    "plain-bias": 1,
    "convolution": 2,
    "experts": 2,
    "experts-by-bare-name": 2,
    "trainable-tokens": 1,
}


@pytest.mark.parametrize("case", PASSED_THROUGH)
def test_pass_through(case, adapter, subspace, out, capsys):
    BAD_ADAPTERS[case][0](adapter)
    arguments = ("--subspace", subspace, "--out-dir", out, "--pass-through")
    result = run(capsys, "correct", adapter, *arguments)
    assert (result.code, result.complaints) == (0, []), result.err
    assert any("copied uncorrected" in line for line in result.warnings)
    before, after = load_file(adapter / WEIGHTS), load_file(out / "lora" / WEIGHTS)
    report = json.loads((out / "lora" / REPORT).read_text())
    names = report["passed_through"]
    assert len(names) == PASSED_THROUGH[case]
    for name in names:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    corrected = {
        f"{PREFIX}{module}.lora_{side}.weight" for module in report["modules"] for side in "AB"
    }
    assert corrected | set(names) == set(before) == set(after)
    for module in report["modules"]:
        assert after[lora_names(module)[0]].shape[0] == 8  # exact: twice the rank


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.bool, torch.float8_e5m2])
def test_pass_through_of_any_type(dtype, adapter, subspace, out, capsys):
    put("other", torch.ones(3, 5).to(dtype))(adapter)
    arguments = ("--subspace", subspace, "--out-dir", out, "--pass-through")
    result = run(capsys, "correct", adapter, *arguments)
    assert result.code == 0, result.err
    before, after = load_file(adapter / WEIGHTS), load_file(out / "lora" / WEIGHTS)
    assert after["other"].dtype == dtype
    assert torch.equal(after["other"].view(torch.uint8), before["other"].view(torch.uint8))


def test_portable_cannot_pass_through(adapter, subspace, out, capsys):
    BAD_ADAPTERS["plain-bias"][0](adapter)
    arguments = ("--subspace", subspace, "--out-dir", out, "--pass-through", "--portable")
    check_refusal(run(capsys, "correct", adapter, *arguments), 1, ["portable", "bias"], out)


@pytest.mark.parametrize("exponent", [60, 100])
def test_hidden_scale_is_seen_through(exponent, adapter, subspace, out, capsys):
    """Factors so small that their squares vanish in float32, made up for by alpha: the same update."""
    run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    expected = effective(out / "lora")
    hidden = write_adapter(adapter.parent / "hidden", lora_alpha=8 * 2.0**exponent)
    edit_tensors(hidden / WEIGHTS, lambda t: t[B_NAME].mul_(2.0**-exponent))
    edit_tensors(hidden / WEIGHTS, lambda t: t[lora_names(DOWN)[1]].mul_(2.0**-exponent))
    result = run(capsys, "correct", hidden, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0, result.err
    for name, update in effective(out / "hidden").items():
        assert torch.linalg.norm(update - expected[name]) <= 1e-5 * torch.linalg.norm(update)


def test_nested_and_other_weights_are_not_copied(adapter, subspace, out, capsys):
    (adapter / "checkpoint-1").mkdir()
    nested = (f"checkpoint-1/{WEIGHTS}", "adapter_model.bin", "adapter_model.pt")
    for name in nested:
        (adapter / name).write_bytes((adapter / WEIGHTS).read_bytes())
    (adapter / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (adapter / "latest").symlink_to("checkpoint-1")
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0, result.err
    assert sorted(tree(out / "lora")) == sorted(
        [CONFIG, WEIGHTS, REPORT, "README.md", "checkpoint-1/trainer_state.json"]
    )
    left_out = json.loads((out / "lora" / REPORT).read_text())["left_out"]
    assert left_out == sorted([*nested, "latest"])
    assert any("not copied" in line and nested[0] in line for line in result.warnings)


# --- subspaces ------------------------------------------------------------------------------------


def subspace_with(change):
    def write(path):
        found = subspace_tensors()
        change(found)
        write_subspace(path, found)

    return write


def skew(found):
    found[f"{Q}.U"][:, 1] += 0.01 * found[f"{Q}.U"][:, 0]


BAD_SUBSPACES = {
    "not-there": (Path.unlink, ["no such file"]),
    "an-adapter": (
        lambda p: p.write_bytes(raw_safetensors({"x": raw_entry("F32", [1], 0, 4)}, b"0000")),
        ["not a subspace file", "csulora estimate"],
    ),
    "other-version": (
        lambda p: write_subspace(p, csulora_format="csulora_subspace/2"),
        ["csulora_subspace/2"],
    ),
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 4), ["safetensors"]),
    "header-of-2^60-bytes": (lambda p: p.write_bytes(raw_safetensors(b"{}", claim=2**60)), []),
    "a-folder": (lambda p: (p.unlink(), p.mkdir()), []),
    "metadata-seed": (lambda p: write_subspace(p, seed="x"), ["metadata"]),
    "metadata-share": (lambda p: write_subspace(p, energy_share="[1"), ["metadata"]),
    "metadata-share-list": (lambda p: write_subspace(p, energy_share="[1]"), ["metadata"]),
    "no-modules": (lambda p: write_subspace(p, {}), ["no modules"]),
    "V-missing": (subspace_with(lambda t: t.pop(f"{Q}.V")), [f"{Q}.V", "missing"]),
    "U-not-orthonormal": (subspace_with(skew), [f"{Q}.U", "orthonormal"]),
    "U-bfloat16": (
        subspace_with(lambda t: t.update({f"{Q}.U": t[f"{Q}.U"].bfloat16()})),
        [f"{Q}.U", "bfloat16", "float32"],
    ),
    "U-and-S-differ": (
        subspace_with(lambda t: t.update({f"{Q}.S": torch.ones(3)})),
        [f"{Q}.U", f"{Q}.S"],
    ),
    "U-wider-than-high": (
        subspace_with(lambda t: t.update({f"{Q}.U": torch.eye(3, 4)})),
        [f"{Q}.U"],
    ),
    "S-not-a-vector": (subspace_with(lambda t: t.update({f"{Q}.S": torch.ones(2, 2)})), [f"{Q}.S"]),
    "S-not-descending": (
        subspace_with(lambda t: t.update({f"{Q}.S": torch.arange(4.0)})),
        [f"{Q}.S", "descending"],
    ),
    "U-nan": (subspace_with(lambda t: t[f"{Q}.U"].__setitem__((0, 0), math.nan)), [f"{Q}.U"]),
    "V-inf": (subspace_with(lambda t: t[f"{Q}.V"].__setitem__((0, 0), math.inf)), [f"{Q}.V"]),
    "S-nan": (subspace_with(lambda t: t[f"{Q}.S"].__setitem__(0, math.nan)), [f"{Q}.S"]),
    "S-inf": (subspace_with(lambda t: t[f"{Q}.S"].__setitem__(0, math.inf)), [f"{Q}.S"]),
}


@pytest.mark.parametrize("command", ["correct", "inspect"])
@pytest.mark.parametrize("case", BAD_SUBSPACES)
def test_bad_subspace(case, command, adapter, subspace, out, capsys):
    change, words = BAD_SUBSPACES[case]
    change(subspace)
    rest = ("--out-dir", out) if command == "correct" else ()
    result = run(capsys, command, adapter, "--subspace", subspace, *rest)
    check_refusal(result, 2, [str(subspace), *words], out)


# --- checkpoints ----------------------------------------------------------------------------------

SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


def index(change):
    """Alter the weight_map of the aligned checkpoint, written in shards."""

    def write(root):
        checkpoint_pair(root, sharded=True)
        path = root / "aligned" / INDEX
        value = json.loads(path.read_text())
        change(value)
        write_json(path, value)

    return write


def entry(name):
    return index(lambda value: value["weight_map"].__setitem__(f"{Q}.weight", name))


def outside_link(root):
    checkpoint_pair(root, sharded=True)
    shard = root / "aligned" / SHARD
    shard.rename(root / "elsewhere.safetensors")
    shard.symlink_to(root / "elsewhere.safetensors")


def weight(which, change):
    def write(root):
        base, aligned = checkpoint_tensors(0), checkpoint_tensors(1)
        change(base if which == "base" else aligned)
        write_checkpoint(root / "base", base)
        write_checkpoint(root / "aligned", aligned)

    return write


def set_weight(which, value):
    return weight(which, lambda found: found[f"{Q}.weight"].__setitem__((2, 3), value))


def cast(which, dtype):
    return weight(
        which, lambda found: found.update({f"{Q}.weight": found[f"{Q}.weight"].to(dtype)})
    )


def only_pickle(root):
    checkpoint_pair(root)
    (root / "base" / "model.safetensors").unlink()
    (root / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(root / "EXECUTED")))


def pickle_in_index(root):
    entry("pytorch_model.bin")(root)
    (root / "aligned" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(root / "EXECUTED")))


def equal(root):
    for name in ("base", "aligned"):
        write_checkpoint(root / name, checkpoint_tensors(0))


def config_list(root):
    checkpoint_pair(root)
    write_json(root / "base" / "config.json", [1])


BAD_CHECKPOINTS = {
    "index-parent": (entry("../elsewhere.safetensors"), [INDEX, "../elsewhere", "outside"]),
    "index-parent-inside": (entry(f"sub/../{SHARD}"), [INDEX, "outside"]),
    "index-absolute": (entry("/etc/passwd"), [INDEX, "/etc/passwd", "outside"]),
    "index-windows": (entry("..\\elsewhere.safetensors"), [INDEX, "outside"]),
    "index-empty-name": (entry(""), [INDEX]),
    "index-dot": (entry("."), [INDEX]),
    "index-nul": (entry("a\0b"), [INDEX]),
    "index-link-outside": (outside_link, [INDEX, SHARD, "links outside"]),
    "index-missing-file": (entry("gone.safetensors"), ["gone.safetensors", "no such file"]),
    "index-missing-tensor": (
        index(lambda value: value["weight_map"].__setitem__("not.there.weight", SHARD)),
        [SHARD, "not.there.weight"],
    ),
    "index-a-pickle": (pickle_in_index, ["pytorch_model.bin", "never read"]),
    "index-entry-a-number": (entry(7), [INDEX, Q]),
    "index-map-a-list": (index(lambda value: value.update(weight_map=["x"])), [INDEX]),
    "index-map-empty": (index(lambda value: value.update(weight_map={})), [INDEX]),
    "index-map-missing": (index(lambda value: value.clear()), [INDEX, "weight_map"]),
    "only-a-pickle": (only_pickle, ["base", "pytorch_model.bin", "safe_serialization"]),
    "no-weights": (
        lambda root: (checkpoint_pair(root), (root / "base" / "model.safetensors").unlink()),
        ["base", "model.safetensors"],
    ),
    "config-a-list": (config_list, ["config.json", "object"]),
    "truncated": (
        lambda root: (
            checkpoint_pair(root),
            os.truncate(root / "aligned" / "model.safetensors", 900),
        ),
        ["aligned", "model.safetensors"],
    ),
    "a-file": (
        lambda root: (
            (checkpoint_pair(root), (root / "base").rename(root / "b"))
            and (root / "base").write_text("")
        ),
        ["base", "folder"],
    ),
    "base-nan": (set_weight("base", math.nan), ["base", f"{Q}.weight", "NaN"]),
    "base-inf": (set_weight("base", math.inf), ["base", f"{Q}.weight", "Inf"]),
    "aligned-nan": (set_weight("aligned", math.nan), ["aligned", f"{Q}.weight", "NaN"]),
    "aligned-inf": (set_weight("aligned", -math.inf), ["aligned", f"{Q}.weight", "Inf"]),
    "difference-overflows": (set_weight("aligned", 3e38), ["aligned", f"{Q}.weight"]),
    "int8": (cast("base", torch.int8), ["base", f"{Q}.weight", "I8", "unquantized"]),
    "fp8": (cast("aligned", torch.float8_e4m3fn), ["aligned", f"{Q}.weight", "F8_E4M3"]),
    "equal": (equal, ["aligned", "equal"]),
    "tensor-missing": (
        weight("aligned", lambda found: found.pop(f"{Q}.weight")),
        ["aligned", f"{Q}.weight", "missing"],
    ),
    "shapes-differ": (
        weight("aligned", lambda found: found.update({f"{Q}.weight": torch.ones(16, 24)})),
        ["aligned", f"{Q}.weight", "(16, 24)"],
    ),
    "no-linear-weights": (
        lambda root: [write_checkpoint(root / name, {"x": ONE}) for name in ("base", "aligned")],
        ["base", "no linear weights"],
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(case, tmp_path, out, capsys):
    change, words = BAD_CHECKPOINTS[case]
    change(tmp_path)
    arguments = ("estimate", tmp_path / "base", tmp_path / "aligned", "--out")
    result = run(capsys, *arguments, out / "s.safetensors")
    check_refusal(result, 2, [str(tmp_path), *words], out)
    assert result.out == ""
    assert not (tmp_path / "EXECUTED").exists()


def test_hostile_names_in_a_checkpoint(tmp_path, out, capsys):
    """A name with a newline and a terminal escape is data: it passes, and is shown as text."""
    name = "evil\n\x1b[31m.q_proj"
    for folder, seed in (("base", 0), ("aligned", 1)):
        generator = torch.Generator().manual_seed(seed)
        write_checkpoint(
            tmp_path / folder, {f"{name}.weight": torch.randn(8, 8, generator=generator)}
        )
    pair = tmp_path / "base", tmp_path / "aligned"
    subspace = out / "s.safetensors"
    result = run(capsys, "estimate", *pair, "--out", subspace, "--rank", 2)
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    adapter = write_adapter(tmp_path / "lo\nra", shapes={name: (8, 8)})
    for arguments in (("correct", adapter, "--out-dir", out), ("inspect", adapter)):
        result = run(capsys, *arguments, "--subspace", subspace)
        assert result.code == 0
        assert "\x1b" not in result.out + result.err
        assert all(line.startswith("csulora: ") for line in result.err.splitlines())


# --- hub caches -----------------------------------------------------------------------------------


def into_hub_cache(folder, cache):
    """The layout of a hub cache: a snapshot of links into a blob store; its snapshot folder."""
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = cache / "blobs" / f"{number:064x}"
        path.rename(blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("below", ["", "nested/adapter"])
def test_hub_cache_layout(below, tmp_path, out, capsys):
    base, aligned = (
        into_hub_cache(folder, tmp_path / f"models--{folder.name}")
        for folder in checkpoint_pair(tmp_path / "plain", sharded=True)
    )
    subspace = out / "s.safetensors"
    assert run(capsys, "estimate", base, aligned, "--out", subspace, "--rank", 4).code == 0
    write_adapter(tmp_path / "plain-lora" / below)
    adapter = into_hub_cache(tmp_path / "plain-lora", tmp_path / "models--lora") / below
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0, result.err
    assert not any((out / adapter.name / name).is_symlink() for name in (WEIGHTS, "README.md"))


# --- the call itself ------------------------------------------------------------------------------

BAD_CALLS = {
    "subspace-rank-0": (["--subspace-rank", "0"], ["subspace rank", "1 and 4"]),
    "subspace-rank-too-large": (["--subspace-rank", "5"], ["subspace rank", "1 and 4"]),
    "subspace-rank-negative": (["--subspace-rank", "-2"], ["subspace rank"]),
    "partial-and-left": (["--lambda-partial", "1", "--lambda-left", "1"], ["--lambda-partial"]),
    "partial-and-right": (["--lambda-partial", "1", "--lambda-right", "2"], ["--lambda-partial"]),
    "negative-off": (["--lambda-off", "-1"], ["lambda_off", "-1"]),
    "negative-aligned": (["--lambda-aligned=-0.5"], ["lambda_aligned"]),
    "nan-left": (["--lambda-left", "nan"], ["lambda_left", "nan"]),
    "minus-inf-right": (["--lambda-right=-inf"], ["lambda_right"]),
    "jobs-0": (["--jobs", "0"], ["jobs"]),
    "device-unknown": (["--device", "abacus"], ["device", "abacus"]),
    "device-meta": (["--device", "meta"], ["device", "meta"]),
    "list-missing": (["--adapters-from", "/no/such/list"], ["/no/such/list"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case, adapter, subspace, out, capsys):
    arguments, words = BAD_CALLS[case]
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out, *arguments)
    check_refusal(result, 2, words, out)
    assert result.out == ""


def test_bad_device_even_if_no_adapter_loads(tmp_path, subspace, out, capsys):
    arguments = ("--subspace", subspace, "--out-dir", out, "--device", "abacus")
    check_refusal(run(capsys, "correct", tmp_path / "no", *arguments), 2, ["abacus"], out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", "half"],
        ["--dtype", "int8"],
        ["--granularity", "row"],
        ["--lambda-off", "much"],
        ["--jobs", "two"],
        ["--overwrite", "--resume"],
        ["--no-such-option"],
    ],
)
def test_malformed_arguments(arguments, adapter, subspace, out, capsys):
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out, *arguments)
    assert result.code == 2
    assert arguments[0] in result.err
    assert "Traceback" not in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], ["rank", "0"]),
        (["--energy", "0"], ["energy"]),
        (["--energy", "1.5"], ["energy", "1.5"]),
        (["--energy", "nan"], ["energy", "nan"]),
        (["--modules", "q_proj,nothing"], ["base", "nothing"]),
        (["--modules", ""], ["base", "''"]),
        (["--like", "/no/such/adapter"], ["/no/such/adapter"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_estimate_call(arguments, words, pair, out, capsys):
    result = run(capsys, "estimate", *pair, "--out", out / "s.safetensors", *arguments)
    check_refusal(result, 2, words, out)


def test_estimate_never_replaces_what_is_not_a_subspace(pair, capsys):
    before = tree(pair[1])
    result = run(capsys, "estimate", *pair, "--out", pair[1] / "model.safetensors")
    assert result.code == 2
    assert "model.safetensors" in result.complaints[0]
    assert tree(pair[1]) == before


def test_estimate_out_is_a_folder(pair, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    result = run(capsys, "estimate", *pair, "--out", tmp_path / "folder")
    check_refusal(result, 2, ["folder"], tmp_path / "folder")


def test_output_place_below_a_file(pair, adapter, subspace, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    result = run(capsys, "estimate", *pair, "--out", tmp_path / "file" / "s.safetensors")
    check_refusal(result, 2, [str(tmp_path / "file")], tmp_path / "out")
    place = tmp_path / "file" / "out"
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", place)
    check_refusal(result, 2, [str(tmp_path / "file")], tmp_path / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_no_adapters(subspace, out, capsys):
    result = run(capsys, "correct", "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 2, ["no adapters"], out)


def test_two_adapters_with_one_name(tmp_path, subspace, out, capsys):
    pair = [write_adapter(tmp_path / place / "lora") for place in ("a", "b")]
    result = run(capsys, "correct", *pair, "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 2, [str(out / "lora"), "rename"], out)


def test_out_dir_is_a_file(adapter, subspace, out, capsys):
    out.write_text("x")
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert str(out) in result.complaints[0]
    assert out.read_text() == "x"


def test_output_exists(adapter, subspace, out, capsys):
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert run(capsys, *arguments).code == 0
    before = tree(out)
    result = run(capsys, *arguments, "--lambda-off", 3)
    assert (result.code, len(result.complaints)) == (1, 1)
    assert str(out / "lora") in result.complaints[0]
    assert "--overwrite" in result.complaints[0]
    assert tree(out) == before


@pytest.mark.parametrize("option", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize("place", ["same", "linked", "around", "within"])
def test_output_must_not_touch_a_source(place, option, tmp_path, subspace, capsys):
    """Replacing an output folder must never replace or swallow an adapter it was made from."""
    source = write_adapter(tmp_path / "x" / "lora" / "lora")
    (tmp_path / "link").symlink_to(tmp_path / "x" / "lora")
    out = {
        "same": source.parent,
        "linked": tmp_path / "link",
        "around": source.parent.parent,
        "within": source,
    }[place]
    before = tree(tmp_path)
    options = [option] if option else []
    result = run(capsys, "correct", source, "--subspace", subspace, "--out-dir", out, *options)
    assert (result.code, len(result.complaints)) == (2, 1), result.err
    assert str(source) in result.complaints[0]
    assert tree(tmp_path) == before


def test_output_must_not_touch_another_source(tmp_path, subspace, capsys):
    first = write_adapter(tmp_path / "b" / "x")
    second = write_adapter(tmp_path / "elsewhere" / "b")
    before = tree(tmp_path)
    arguments = ("--subspace", subspace, "--out-dir", tmp_path, "--overwrite")
    result = run(capsys, "correct", first, second, *arguments)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert tree(tmp_path) == before


# --- through a process ----------------------------------------------------------------------------


PROCESS_CASES = {
    "header-of-2^60-bytes": (BAD_ADAPTERS["header-of-2^60-bytes"][0], 1),
    "pickle": (pickled, 1),
    "no-subspace": (lambda folder: (folder.parent.parent / "subspace.safetensors").unlink(), 2),
    # Opening a pipe would wait for ever, which only a process can be timed out of.
    "weights-a-fifo": (fifo(WEIGHTS), 1),
    "config-a-fifo": (fifo(CONFIG), 1),
}


@pytest.mark.parametrize("case", PROCESS_CASES)
def test_in_a_process(case, tmp_path, adapter, subspace, out):
    change, code = PROCESS_CASES[case]
    change(adapter)
    command = [sys.executable, "-m", "csulora.cli", "correct", adapter]
    done = subprocess.run(
        [*map(str, command), "--subspace", str(subspace), "--out-dir", str(out)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.count("csulora: failed") + done.stderr.count("csulora: error") == 1
    assert not out.exists() or not list(out.iterdir())
    assert not (tmp_path / "EXECUTED").exists()
