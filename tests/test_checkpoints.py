"""Checkpoints as they come: heads tied or not, files that contradict each other, quantised weights.

transformers says what it reads of a folder, PEFT writes and loads the adapters, the oracle is right.
"""

import json
import warnings

import builders
import oracle
import pytest
import torch
from builders import edit_json, edit_tensors, run
from checkpoint_models import (
    INDEX,
    LLAMA,
    SINGLE,
    Q,
    gpt2,
    llama,
    mamba,
    neox,
    read,
    t5,
    write_pair,
)
from safetensors.torch import load_file
from tolerances import TOLERANCES

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    Realignment,
    SafetySubspace,
    correct,
    estimate,
)
from csulora.settings import FORMS

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

K = 4


# --- the output head ------------------------------------------------------------------------------

HEADS = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt-neox": neox,  # embed_out on disk
    "gpt2": gpt2,  # tied to wte
    "mamba": mamba,  # to embeddings
    "t5": t5,  # to shared
}


def head_adapter(model, folder, **options):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tied head is adapted alone
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter))
        adapted.save_pretrained(folder)
    return folder


def head_update(model, folder):
    """The update of the output head as PEFT has it, and whether it then has another base weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model.lm_head.weight.detach().clone()
        loaded = peft.PeftModel.from_pretrained(model, folder).base_model.model.lm_head
    assert torch.equal(loaded.base_layer.weight, before)
    return loaded.get_delta_weight("default").detach().double()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_output_head(kind, portable, tmp_path):
    model = HEADS[kind]()
    pair = write_pair(tmp_path, model)
    aligned, _ = read(model, pair[1])
    adapter = head_adapter(read(model, pair[1])[0], tmp_path / "adapter")
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(adapter / "adapter_model.safetensors")

    subspace = estimate(*pair, rank=K, like=adapter)
    assert len(subspace.modules) == 1
    with pytest.raises(CsuloraError, match=r"lm_head\.base_layer\.weight.*--pass-through"):
        LoraAdapter.load(adapter)
    loaded = LoraAdapter.load(adapter, pass_through=True)
    new, report = correct(loaded, subspace, portable=portable)
    new.save(tmp_path / "new")

    written = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert (copy in written) != portable and copy in loaded.passed_through
    assert any(copy in warning for warning in report.warnings) == portable
    assert report.passed_through == ([] if portable else [copy])

    D = (aligned.lm_head.weight - read(model, pair[0])[0].lm_head.weight).detach().double()
    U, _, Vt = torch.linalg.svd(D)
    raw = head_update(read(model, pair[1])[0], adapter)
    wanted = oracle.correct(raw, U[:, :K], Vt[:K].mT, Correction().strengths, "direction")
    found = head_update(aligned, tmp_path / "new")
    assert float((found - wanted).norm()) <= TOLERANCES[torch.float32] * float(wanted.norm())


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_whose_update_is_tied_to_the_head(form, tmp_path):
    """PEFT loads the head's factors for both: the report and the file have to say the same of either."""
    model = llama(tie_word_embeddings=True)
    pair = write_pair(tmp_path, model)
    adapter = head_adapter(model, tmp_path / "adapter", ensure_weight_tying=True)
    subspace = estimate(*pair, rank=K, like=adapter)
    correction = Correction(lambda_left=100, lambda_right=0, form=form)
    new, report = correct(LoraAdapter.load(adapter), subspace, correction)
    new.save(tmp_path / "new")
    loaded = peft.PeftModel.from_pretrained(
        read(model, pair[1])[0], tmp_path / "new"
    ).base_model.model
    head = loaded.lm_head.get_delta_weight("default").detach()
    assert torch.equal(head, loaded.model.embed_tokens.get_delta_weight("default").detach())
    for name, found in (("lm_head", head), ("model.embed_tokens", head.mT)):
        module = new.modules[name]
        error = float((module.scaling * module.B @ module.A - found).norm() / found.norm())
        assert error <= (1e-2 if form == "same" else TOLERANCES[torch.float32])
    left, right = (report.modules[n].relative_change for n in ("lm_head", "model.embed_tokens"))
    assert left == pytest.approx(right, rel=1e-2)


def test_realignment_refuses_an_embedding_tied_to_the_head(tmp_path):
    """One set of factors, of which the inputs of one are the outputs of the other."""
    model = llama(tie_word_embeddings=True)
    pair = write_pair(tmp_path, model)
    adapter = head_adapter(model, tmp_path / "adapter", ensure_weight_tying=True)
    subspace = estimate(*pair, rank=K, like=adapter)
    with pytest.raises(CsuloraError, match="embed_tokens: shares its factors with the output head"):
        correct(LoraAdapter.load(adapter), subspace, Realignment())
    correct(LoraAdapter.load(adapter), subspace, Realignment(0))


def test_portable_on_the_command_line_drops_the_copy_and_nothing_else(tmp_path, out, capsys):
    pair = write_pair(tmp_path, llama())
    adapter = head_adapter(read(llama(), pair[1])[0], tmp_path / "adapter")
    estimate(*pair, rank=K, like=adapter).save(tmp_path / "s.safetensors")
    call = ("correct", adapter, "--subspace", tmp_path / "s.safetensors", "--out-dir", out)
    refused = run(capsys, *call)
    assert refused.code == 1 and "lm_head.base_layer.weight" in refused.complaints[0]
    result = run(capsys, *call, "--portable")
    assert result.code == 0, result.err
    assert "lm_head.base_layer.weight" in result.warnings[0]
    assert run(capsys, *call, "--portable", "--resume").code == 0
    verify = ("verify", out, "--source", tmp_path, "--subspace", tmp_path / "s.safetensors")
    assert run(capsys, *verify).code == 0

    edit_tensors(
        adapter / "adapter_model.safetensors", lambda t: t.update({"x.weight": torch.ones(2)})
    )
    refused = run(capsys, *call, "--portable", "--overwrite")
    assert refused.code == 1 and "x.weight" in refused.complaints[0]
    assert "lm_head" not in refused.complaints[0] and "without --portable" in refused.complaints[0]


def test_a_base_weight_under_a_block_is_no_copy_that_may_be_dropped(tmp_path, subspace):
    adapter = builders.write_adapter(tmp_path / "lora")
    name = f"{builders.PREFIX}{Q}.base_layer.weight"
    edit_tensors(adapter / builders.WEIGHTS, lambda t: t.update({name: torch.ones(24, 16)}))
    loaded = LoraAdapter.load(adapter, pass_through=True)
    with pytest.raises(CsuloraError, match=r"portable form cannot hold.*q_proj\.base_layer"):
        correct(loaded, SafetySubspace.load(subspace), portable=True)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": None}, True),  # transformers ties unless told otherwise
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_a_head_is_tied_only_where_the_configuration_has_it_so(config, found, tmp_path):
    model = llama(tie_word_embeddings=True)
    pair = write_pair(tmp_path, model)
    adapter = head_adapter(model, tmp_path / "adapter")
    for folder in pair:
        edit_json(folder / "config.json", **config)
    if found:
        subspace = estimate(*pair, rank=K, like=adapter)
        assert list(subspace.modules) == ["lm_head"]
        # the displacement of the embeddings, and named so where they are asked for
        by_name = estimate(*pair, rank=K, modules=["embed_tokens", "lm_head"])
        assert set(by_name.modules) == {"lm_head", "model.embed_tokens"}
        assert "lm_head" not in estimate(*pair, rank=K).modules
        return
    with pytest.raises(CsuloraError, match=r"no lm_head\.weight is stored, nor .* ties it to"):
        estimate(*pair, rank=K, like=adapter)


# --- files that contradict each other -------------------------------------------------------------


def sharded(tmp_path):
    pair = write_pair(tmp_path, llama(), max_shard_size="3KB")
    assert all((folder / INDEX).exists() for folder in pair)
    return pair


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def drop(folder, name):
    """Take a tensor out of its shard; the index still lists it."""
    edit_tensors(folder / weight_map(folder)[name], lambda tensors: tensors.pop(name))
    _, missing = read(llama(), folder)
    assert missing == {name}  # transformers loads the rest


@pytest.mark.parametrize("side", [0, 1])
def test_a_listed_tensor_that_no_shard_holds_matters_where_it_is_selected(side, tmp_path, capsys):
    pair = sharded(tmp_path)
    whole = estimate(*pair, rank=K)
    shard = weight_map(pair[side])[f"{Q}.weight"]
    drop(pair[side], f"{Q}.weight")
    said = []
    rest = estimate(*pair, rank=K, modules=["k_proj", "down_proj"], warn=said.append)
    assert len(rest.modules) == 2
    assert all(torch.equal(m.U, whole.modules[name].U) for name, m in rest.modules.items())
    assert len(said) == 1 and f"{Q}.weight" in said[0] and INDEX in said[0]

    like = builders.write_adapter(tmp_path / "lora", shapes={Q: (16, 16)})
    for selection in ((), ("--modules", "q_proj"), ("--like", like)):
        out = tmp_path / "s.safetensors"
        result = run(capsys, "estimate", *pair, "--out", out, *selection)
        assert result.code == 2 and not out.exists()
        assert len(result.complaints) == len(result.warnings) == 1
        for word in (str(pair[side] / shard), f"{Q}.weight", "no shard holds"):
            assert word in result.complaints[0]


def test_a_tied_head_that_is_listed_is_the_embeddings(tmp_path):
    model = llama(tie_word_embeddings=True)
    pair = write_pair(tmp_path, model, max_shard_size="3KB")
    for folder in pair:
        value = json.loads((folder / INDEX).read_text())
        value["weight_map"]["lm_head.weight"] = value["weight_map"]["model.embed_tokens.weight"]
        builders.write_json(folder / INDEX, value)
        assert not read(model, folder)[1]
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        subspace = estimate(*pair, rank=K, modules=["lm_head", "embed_tokens"])
    head, embeddings = (subspace.modules[n] for n in ("lm_head", "model.embed_tokens"))
    torch.testing.assert_close(head.S, embeddings.S)


def test_a_tensor_in_another_shard_than_listed_is_read_as_transformers_reads_it(tmp_path):
    pair = sharded(tmp_path)
    whole = estimate(*pair, rank=K)
    value = json.loads((pair[1] / INDEX).read_text())
    names = value["weight_map"]
    other = next(file for file in names.values() if file != names[f"{Q}.weight"])
    names[f"{Q}.weight"] = other
    names.pop("model.layers.0.mlp.down_proj.weight")  # not listed at all
    builders.write_json(pair[1] / INDEX, value)
    assert not read(llama(), pair[1])[1]
    found = estimate(*pair, rank=K)
    assert found.modules.keys() == whole.modules.keys()
    assert all(torch.equal(m.U, whole.modules[name].U) for name, m in found.modules.items())


def test_one_file_beside_shards_that_differ(tmp_path, capsys):
    pair = write_pair(tmp_path / "single", llama())
    others = write_pair(tmp_path / "sharded", llama(), max_shard_size="3KB")
    expected = estimate(*pair, rank=K)
    for file in others[1].glob("model*"):
        (pair[1] / file.name).write_bytes(file.read_bytes())
    stored = load_file(pair[1] / SINGLE)[f"{Q}.weight"]
    assert torch.equal(read(llama(), pair[1])[0].state_dict()[f"{Q}.weight"], stored)
    result = run(capsys, "estimate", *pair, "--rank", K, "--out", tmp_path / "s.safetensors")
    assert result.code == 0 and len(result.warnings) == 1
    for word in (str(pair[1]), SINGLE, INDEX):
        assert word in result.warnings[0]
    expected.save(tmp_path / "expected.safetensors")
    names = ("s.safetensors", "expected.safetensors")
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_an_index_of_the_one_file_contradicts_nothing(tmp_path):
    pair = write_pair(tmp_path, llama())
    names = dict.fromkeys(load_file(pair[0] / SINGLE), SINGLE)
    builders.write_json(pair[0] / INDEX, {"metadata": {}, "weight_map": names})
    said = []
    estimate(*pair, rank=1, warn=said.append)
    assert not said
    (pair[0] / INDEX).write_text("{")
    estimate(*pair, rank=1, warn=said.append)
    assert len(said) == 1


def test_pairs_saved_in_two_layouts(tmp_path):
    config = transformers.Qwen2VLConfig(
        text_config=LLAMA
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    pair = write_pair(tmp_path, model)
    expected = estimate(*pair, rank=K)
    model.save_pretrained(tmp_path / "other", save_original_format=False)
    assert f"{Q}.weight" not in load_file(tmp_path / "other" / SINGLE)
    found = estimate(pair[0], tmp_path / "other", rank=K)
    assert found.modules.keys() == expected.modules.keys()
    assert all(torch.equal(m.U, expected.modules[name].U) for name, m in found.modules.items())


def test_what_transformers_renames_further_is_no_guess_and_the_error_says_what_helps(tmp_path):
    sizes = {k: LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    model = transformers.ViTForImageClassification(config)
    pair = write_pair(tmp_path, model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(CsuloraError, match="save_original_format=False"):
        estimate(*pair, rank=K, like=tmp_path / "adapter")
    for folder in pair:
        loaded = type(model).from_pretrained(folder)
        loaded.save_pretrained(tmp_path / "new" / folder.name, save_original_format=False)
    new = (tmp_path / "new" / folder.name for folder in pair)
    assert len(estimate(*new, rank=K, like=tmp_path / "adapter").modules) == 1
