"""Bad and hostile adapters: one clear line, the right exit code, nothing written, nothing executed."""

import json
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from builders import (
    CONFIG,
    PREFIX,
    REPORT,
    WEIGHTS,
    edit_tensors,
    effective,
    lora_names,
    raw_entry,
    raw_safetensors,
    run,
    subspace_tensors,
    tree,
    write_adapter,
    write_subspace,
)
from safetensors.torch import load_file
from spoilers import (
    A_NAME,
    B_NAME,
    DOWN,
    EMBED,
    F32_PAIR,
    ONE,
    Payload,
    Q,
    both,
    check_refusal,
    config,
    config_text,
    config_value,
    embedding,
    fifo,
    linked,
    names_clash,
    pickled,
    poke,
    put,
    tensors,
    truncate,
    weights,
)

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
    "sharded": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model-00001-of-00002.safetensors"),
        ["adapter_model-00001-of-00002.safetensors", "in 1 file(s)", "max_shard_size"],
    ),
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
    "config-nested-500-deep": (
        config_value("[" * 500 + "]" * 500, "auto_mapping"),
        [CONFIG, "levels deep"],
    ),
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
    "multihead-attention": (
        tensors(
            lambda t: t.update(
                {A_NAME.replace("q_proj", "x.base_layer.out_proj"): t[A_NAME].clone()}
            )
        ),
        [WEIGHTS, "x.base_layer.out_proj", "MultiheadAttention"],
    ),
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
    "embedding-unknown": (embedding(), ["subspace", "model.embed_tokens", "--like"]),
    "embedding-without-A": (
        embedding(lora_embedding_A=None),
        [WEIGHTS, f"{EMBED}.lora_embedding_B has no lora_embedding_A"],
    ),
    "embedding-without-B": (
        embedding(lora_embedding_B=None),
        [WEIGHTS, f"{EMBED}.lora_embedding_A has no lora_embedding_B"],
    ),
    "embedding-of-another-rank": (
        embedding(lora_embedding_B=torch.ones(16, 5)),
        [WEIGHTS, EMBED, "lora_embedding_B (16, 5)", "rank 4"],
    ),
    "embedding-of-integers": (
        embedding(lora_embedding_A=torch.ones(4, 32, dtype=torch.int32)),
        [WEIGHTS, f"{EMBED}.lora_embedding_A is torch.int32"],
    ),
    "embedding-nan": (
        embedding(lora_embedding_A=torch.full((4, 32), math.nan)),
        [WEIGHTS, f"{EMBED}.lora_embedding_A holds NaN"],
    ),
    "embedding-empty": (embedding(lora_embedding_A=torch.ones(4, 0)), [WEIGHTS, EMBED, "empty"]),
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
    "dora-on-embedding": (
        embedding(lora_magnitude_vector=torch.ones(16)),
        [WEIGHTS, f"{EMBED}.lora_magnitude_vector", "use_dora"],
    ),
    "embedding-of-three-dimensions": (
        embedding(lora_embedding_A=torch.ones(4, 32, 1)),
        [WEIGHTS, f"{EMBED}.lora_embedding_A has 3 dimension"],
    ),
    "embedding-and-linear": (
        embedding(**{"lora_A.weight": torch.ones(4, 32), "lora_B.weight": torch.ones(16, 4)}),
        [WEIGHTS, "model.embed_tokens has factors of a linear weight and an embedding"],
    ),
    "whole-embedding": (
        put(f"{EMBED}.base_layer.weight", torch.ones(32, 16)),
        [WEIGHTS, f"{EMBED}.base_layer.weight"],
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
    "modules-to-save": 1,
    "whole-embedding": 1,
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
    (adapter / "old").mkdir()
    (adapter / "checkpoint-1").mkdir()  # of a trainer that kept no configuration in it
    nested = (
        *(f"old/{WEIGHTS}", "adapter_model.bin", "adapter_model.pt", "adapter_model_old.npz"),
        *("pytorch_lora_weights.safetensors", "adapter_model-00001-of-00002.safetensors"),
        *("adapter_model.safetensors.index.json", "Lora.GGUF", "old/adapters.npz"),
    )
    for name in (*nested, f"checkpoint-1/{WEIGHTS}"):
        (adapter / name).write_bytes((adapter / WEIGHTS).read_bytes())
    (adapter / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (adapter / "old" / "notes.txt").write_text("")
    (adapter / "latest").symlink_to("checkpoint-1")
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0, result.err
    assert sorted(tree(out / "lora")) == sorted(
        [CONFIG, WEIGHTS, REPORT, "README.md", "old/notes.txt"]
    )
    left_out = json.loads((out / "lora" / REPORT).read_text())["left_out"]
    assert left_out == sorted([*nested, "checkpoint-1", "latest"])
    assert any("not copied" in line and "Lora.GGUF" in line for line in result.warnings)


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
    command = [sys.executable, "-m", "csulora", "correct", adapter]
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


TRAINING = [
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_3.pth"),
    *("training_args.bin", "scaler.pt", "random_states_0.pkl", "x/last.ckpt", "zero_to_fp32.py"),
]
KEPT = ["trainer_state.json", "tokenizer.json", "x/notes.txt", "checkpoints.md"]


def test_of_a_trainers_folder_only_the_adapter_is_copied(tmp_path, subspace, out, capsys):
    """Its checkpoints are adapters of their own, and what it needs to go on is of no use to a server."""
    source = write_adapter(tmp_path / "run")
    for step in (5, 10):
        nested = write_adapter(source / f"checkpoint-{step}", seed=step)
        for name in ("optimizer.pt", "trainer_state.json"):
            (nested / name).write_bytes(b"state")
    (source / "global_step10").mkdir()
    (source / "global_step10" / "notes.txt").write_text("x")
    (source / "x").mkdir()
    for name in (*TRAINING, *KEPT):
        (source / name).write_bytes(b"state")
    result = run(capsys, "correct", source, "--subspace", subspace, "--out-dir", out)
    assert result.code == 0
    expected = {WEIGHTS, CONFIG, REPORT, "README.md", *KEPT}
    assert set(tree(out)) == {f"run/{name}" for name in expected}
    left_out = json.loads((out / "run" / REPORT).read_text())["left_out"]
    assert left_out == sorted([*TRAINING, "checkpoint-5", "checkpoint-10", "global_step10"])
    (warning,) = result.warnings
    assert "checkpoint-10, checkpoint-5, global_step10" in warning
    again = tmp_path / "again"
    pattern = str(tmp_path / "run" / "checkpoint-*")
    assert run(capsys, "correct", pattern, "--subspace", subspace, "--out-dir", again).code == 0
    names = {WEIGHTS, CONFIG, REPORT, "README.md", "trainer_state.json"}
    assert set(tree(again)) == {f"checkpoint-{s}/{name}" for s in (5, 10) for name in names}
