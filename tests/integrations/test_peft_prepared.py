"""Corrections of PEFT models that were prepared for hot swaps, second ones, and from two checkpoints."""

import copy

import pytest
import torch

from csulora import CsuloraError, correct_folder, estimate

pytest.importorskip("transformers")
pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

from peft_models import (  # noqa: E402
    EXACT,
    KINDS,
    METHODS,
    SAME,
    assert_same_state,
    fill,
    loaded,
    logits,
    lora_layers,
    make,
    named,
    refused,
    state,
    step,
    through_folder,
)

from csulora.integrations.peft import correct_model, repair  # noqa: E402

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
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=5e-6)
    assert before == {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    assert scalings == [id(layer.scaling["default"]) for layer in lora_layers(model)]
    assert {layer.r["default"] for layer in lora_layers(model)} == {16}
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(llama, tmp_path / "saved")), wanted, rtol=0, atol=5e-6)


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
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=5e-6)


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
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=5e-6)
    hotswap.hotswap_adapter(model, tmp_path / "second" / "raw", "default", torch_device="cpu")
    correct_model(model, llama.subspace, EXACT)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=5e-6)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(llama, tmp_path / "saved")), wanted, rtol=0, atol=5e-6)


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
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=5e-6)
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
