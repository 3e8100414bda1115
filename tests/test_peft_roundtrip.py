"""PEFT is the judge: it loads the corrected folder, and the merged weights are base + dense oracle."""

from dataclasses import replace

import builders
import oracle
import pytest
import torch
from checkpoint_models import mixtral
from safetensors.torch import load_file
from tiny_models import LINEAR, load_aligned, save_pair
from tolerances import TOLERANCES

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    Realignment,
    SafetySubspace,
    correct,
    decompose,
    estimate,
)
from csulora.settings import FORMS

peft = pytest.importorskip("peft")

SETTINGS = [
    Correction(),
    Correction(0, 5, 50, 500, granularity="component"),
    Correction(30, 0, 30, 0),
    Correction(form="same"),
    # D of these models is noise, so that its edge would leave nothing to do.
    Realignment(edge=False),
    Realignment(5, edge=False, form="exact", opposed=True),
]


EMBEDDINGS = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request, tmp_path_factory):
    """(kind, folder) with `base` and `aligned` checkpoints and their `subspace.safetensors`."""
    folder = tmp_path_factory.mktemp(request.param)
    save_pair(request.param, folder, max_shard_size="20KB")
    subspace = estimate(folder / "base", folder / "aligned", rank=6)
    subspace.save(folder / "subspace.safetensors")
    return request.param, folder


def aligned_model(world):
    return load_aligned(*world)


def make_adapter(world, folder, dtype=torch.float32, whole_embeddings=False, **options):
    """A PEFT adapter with random factors, over all block-level linear layers if not told otherwise."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR[world[0]]} | options
    model = peft.get_peft_model(aligned_model(world), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # which PEFT starts at zero
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_embedding_layers=whole_embeddings)
    return folder


def merged_updates(world, folder):
    """W_merged - W_aligned by parameter, as PEFT computes it from an adapter folder."""
    model = aligned_model(world)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # float32 whatever the files hold, so that the merge itself does not round
    loaded = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=True)
    after = dict(loaded.merge_and_unload().named_parameters())
    return {name: (after[name] - before[name]).detach().double() for name in before}


def truth_of(folder, name, module, dW, U, V, correction):
    """The corrected update by the dense oracle; `same` of CSULoRA keeps a block of it."""
    if isinstance(correction, Correction):
        return oracle.correct(dW, U, V, correction.strengths, correction.granularity)
    B = LoraAdapter.load(folder).modules[name].B if correction.form == "same" else None
    options = {"strength": correction.strength, "gamma": correction.gamma}
    return oracle.realign(dW, U, module.S, V, opposed=correction.opposed, B=B, **options)


def check(world, folder, corrected_folder, correction, tolerance, subspace):
    raw, found = merged_updates(world, folder), merged_updates(world, corrected_folder)
    checked = 0
    for name, module in subspace.modules.items():
        key = name + ".weight"
        # An embedding is a linear weight from tokens to features that is stored as its transpose.
        embedding = name in EMBEDDINGS.values()
        U, V = (module.V, module.U) if embedding else (module.U, module.V)
        turned = module.fan_in_fan_out or embedding
        dW, result = (X[key].mT if turned else X[key] for X in (raw, found))
        wanted = truth_of(folder, name, module, dW, U, V, correction)
        if correction.form == "same" and isinstance(correction, Correction):
            kept, truth = (oracle.blocks(X, U, V)[0] for X in (result, wanted))
            assert float((kept - truth).norm()) <= tolerance * float(dW.norm())
        else:
            assert float((result - wanted).norm()) <= tolerance * float(wanted.norm())
        checked += 1
    assert checked == len([name for name in raw if float(raw[name].norm()) > 0])


# Merging adds a float32 rounding of W to each entry, which the oracle does not see.
MERGE = 2e-5


@pytest.mark.parametrize("correction", SETTINGS, ids=str)
@pytest.mark.parametrize("portable", [False, True])
def test_merged_weights_are_base_plus_oracle(world, tmp_path, correction, portable):
    folder = make_adapter(world, tmp_path / "adapter")
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    new, _ = correct(LoraAdapter.load(folder), subspace, correction, portable=portable)
    new.save(tmp_path / "new")
    check(world, folder, tmp_path / "new", correction, MERGE, subspace)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("correction", SETTINGS, ids=str)
def test_a_dropped_module_adds_nothing_by_peft(world, tmp_path, correction, use_rslora, portable):
    """Beside modules that are corrected, and one that is left alone."""
    folder = make_adapter(world, tmp_path / "adapter", use_rslora=use_rslora)
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    dropped, kept = {"llama": ("v_proj", "q_proj"), "gpt2": ("c_fc", "c_attn")}[world[0]]
    own = replace(correction, strength_for={f"*.{dropped}": "drop", f"1.*.{kept}": 0})
    new, report = correct(LoraAdapter.load(folder), subspace, own, portable=portable)
    new.save(tmp_path / "new")
    raw, found = merged_updates(world, folder), merged_updates(world, tmp_path / "new")
    plain, _ = correct(LoraAdapter.load(folder), subspace, correction)
    plain.save(tmp_path / "plain")
    wanted = merged_updates(world, tmp_path / "plain")
    for name in subspace.modules:
        key = name + ".weight"
        if name.endswith(dropped):
            assert float(raw[key].norm()) > 0 == float(found[key].norm())
            assert report.modules[name].relative_change == 1
            continue
        left_alone = name.endswith(kept) and ".1." in name
        truth = raw[key] if left_alone else wanted[key]
        assert float((found[key] - truth).norm()) <= MERGE * float(truth.norm())


PATTERNS = {
    "llama": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 1},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 11, "mlp.up_proj": 2},
    },
    "gpt2": {
        "rank_pattern": {"attn.c_proj": 8, "c_fc": 1},
        "alpha_pattern": {"transformer.h.1.mlp.c_proj": 11, "c_attn": 2},
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("patterned", [False, True])
def test_scaling_rules(world, tmp_path, form, portable, use_rslora, patterned):
    """rsLoRA, rank_pattern and alpha_pattern; ranks above k = 6 and of 1; by PEFT's own rules."""
    options = PATTERNS[world[0]] if patterned else {}
    folder = make_adapter(world, tmp_path / "adapter", use_rslora=use_rslora, **options)
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    correction = Correction(form=form)
    new, report = correct(LoraAdapter.load(folder), subspace, correction, portable=portable)
    new.save(tmp_path / "new")
    check(world, folder, tmp_path / "new", correction, MERGE, subspace)
    config = peft.LoraConfig.from_pretrained(tmp_path / "new")
    ranks = {module.rank_out for module in report.modules.values()}
    if portable:
        assert config.lora_alpha == config.r and ranks == {config.r}
        assert not config.rank_pattern and not config.alpha_pattern and not config.use_rslora
    else:
        assert config.use_rslora == use_rslora
    if form == "same" and not portable:
        original = peft.LoraConfig.from_pretrained(folder)
        assert (config.r, config.rank_pattern) == (original.r, original.rank_pattern)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_within_two_ulp(world, tmp_path, dtype, form, portable):
    folder = make_adapter(world, tmp_path / "adapter", dtype)
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    correction = Correction(form=form)
    new, _ = correct(LoraAdapter.load(folder), subspace, correction, portable=portable)
    assert all(m.A.dtype == dtype and m.B.dtype == dtype for m in new.modules.values())
    new.save(tmp_path / "new")
    check(world, folder, tmp_path / "new", correction, TOLERANCES[dtype], subspace)


def test_small_float16_factors_keep_their_digits(world, tmp_path):
    """Entries near 1e-6 would fall among the subnormal float16 numbers if written as they come."""
    folder = make_adapter(world, tmp_path / "adapter")
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    adapter = LoraAdapter.load(folder)
    for module in adapter.modules.values():
        module.B.mul_(1e-4)
    exact, _ = correct(adapter, subspace)
    half, _ = correct(adapter, subspace, dtype=torch.float16)
    for name, module in half.modules.items():
        wanted = exact.modules[name].B.double() @ exact.modules[name].A.double()
        error = (module.B.double() @ module.A.double() - wanted).norm() / wanted.norm()
        assert float(error) <= TOLERANCES[torch.float16]


def test_dtype_option_and_overflow(world, tmp_path):
    folder = make_adapter(world, tmp_path / "adapter")
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    adapter = LoraAdapter.load(folder)
    new, _ = correct(adapter, subspace, dtype=torch.bfloat16)
    assert {m.A.dtype for m in new.modules.values()} == {torch.bfloat16}
    first = next(iter(adapter.modules.values()))
    first.A.mul_(1e7)
    first.B.mul_(1e7)
    with pytest.raises(CsuloraError, match="does not fit"):
        correct(adapter, subspace, dtype=torch.float16)
    first.A.mul_(1e20)
    with pytest.raises(CsuloraError, match="overflow"):
        correct(adapter, subspace)


def test_zero_strengths_return_the_adapter_bit_for_bit(world, tmp_path):
    folder = make_adapter(world, tmp_path / "adapter", torch.bfloat16)
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    adapter = LoraAdapter.load(folder)
    new, report = correct(adapter, subspace, Correction(0, 0, 0, 0))
    for name, module in adapter.modules.items():
        assert torch.equal(new.modules[name].A, module.A)
        assert torch.equal(new.modules[name].B, module.B)
    assert report.totals.relative_change == 0


def test_dora_can_be_looked_at_but_not_corrected(world, tmp_path):
    """use_dora makes DoRA of all modules, so a copy would be an output in which nothing was corrected."""
    folder = make_adapter(world, tmp_path / "adapter", use_dora=True)
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    adapter = LoraAdapter.load(folder, pass_through=True)
    assert decompose(adapter, subspace).totals.modules == 0 < len(adapter.passed_through)
    with pytest.raises(CsuloraError, match="no module could be corrected"):
        correct(adapter, subspace)


def test_modules_to_save_pass_through_beside_corrected_modules(world, tmp_path):
    folder = make_adapter(world, tmp_path / "adapter", modules_to_save=["lm_head"])
    subspace = SafetySubspace.load(world[1] / "subspace.safetensors")
    with pytest.raises(CsuloraError, match="lm_head"):
        LoraAdapter.load(folder)
    new, report = correct(LoraAdapter.load(folder, pass_through=True), subspace)
    new.save(tmp_path / "new")
    assert report.totals.modules == len(subspace.modules)
    raw, found = merged_updates(world, folder), merged_updates(world, tmp_path / "new")
    changed = [name for name in raw if not torch.equal(raw[name], found[name])]
    assert len(changed) == len(subspace.modules)


# --- embeddings -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_embedding(world):
    """The subspace of all that `embedding_targets` names."""
    kind, folder = world
    return estimate(folder / "base", folder / "aligned", rank=6, modules=embedding_targets(kind))


def embedding_targets(kind):
    return [*LINEAR[kind], EMBEDDINGS[kind].rpartition(".")[2]]


@pytest.mark.parametrize("correction", SETTINGS, ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("own", [{}, {"embed_tokens|wte": 7}])
def test_merged_embeddings_are_base_plus_oracle(
    world, with_embedding, tmp_path, correction, use_rslora, own
):
    """With the rank and alpha of all modules, and with its own."""
    folder = make_adapter(
        world,
        tmp_path / "adapter",
        target_modules=embedding_targets(world[0]),
        use_rslora=use_rslora,
        rank_pattern=own,
        alpha_pattern=dict.fromkeys(own, 2),
    )
    new, report = correct(LoraAdapter.load(folder), with_embedding, correction)
    new.save(tmp_path / "new")
    check(world, folder, tmp_path / "new", correction, MERGE, with_embedding)
    module = report.modules[EMBEDDINGS[world[0]]]
    assert module.rank_in == own.get("embed_tokens|wte", 3)
    grown = module.rank_in if isinstance(correction, Correction) else module.subspace_rank
    assert module.rank_out == module.rank_in + (grown if correction.form == "exact" else 0)
    before, after = (load_file(X / builders.WEIGHTS) for X in (folder, tmp_path / "new"))
    assert before.keys() == after.keys() and any("lora_embedding_A" in name for name in after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_on_embeddings(world, with_embedding, tmp_path, dtype):
    names = embedding_targets(world[0])
    folder = make_adapter(world, tmp_path / "adapter", dtype, target_modules=names)
    correct(LoraAdapter.load(folder), with_embedding)[0].save(tmp_path / "new")
    check(world, folder, tmp_path / "new", Correction(), TOLERANCES[dtype], with_embedding)


def test_an_adapter_of_an_embedding_alone_and_its_subspace_by_like(world, tmp_path):
    kind, folder = world
    name = EMBEDDINGS[kind].rpartition(".")[2]
    adapter = make_adapter(world, tmp_path / "adapter", target_modules=[name], r=4)
    pair = folder / "base", folder / "aligned"
    subspace = estimate(*pair, rank=6, like=adapter)
    assert list(subspace.modules) == [EMBEDDINGS[kind]]
    assert subspace.sha256 == estimate(*pair, rank=6, modules=[name]).sha256
    loaded = LoraAdapter.load(adapter)
    new, _ = correct(loaded, subspace)
    new.save(tmp_path / "new")
    check(world, adapter, tmp_path / "new", Correction(), MERGE, subspace)
    with pytest.raises(CsuloraError, match=f"embeddings: {EMBEDDINGS[kind]}"):
        correct(loaded, subspace, portable=True)
    with pytest.raises(CsuloraError, match=f"match for 1 module.*{EMBEDDINGS[kind]}.*--like"):
        correct(loaded, SafetySubspace.load(folder / "subspace.safetensors"))


def test_whole_embeddings_beside_their_lora_are_copied_if_asked_to(world, with_embedding, tmp_path):
    """PEFT's own choice is to save them for some names of embeddings, and not for others."""
    names = embedding_targets(world[0])
    folder = make_adapter(
        world, tmp_path / "adapter", target_modules=names, whole_embeddings="auto"
    )
    whole = [n for n in load_file(folder / builders.WEIGHTS) if n.endswith("base_layer.weight")]
    assert bool(whole) == (world[0] == "llama")
    for name in whole:
        with pytest.raises(CsuloraError, match=f"1 tensor.*{name}; pass --pass-through"):
            LoraAdapter.load(folder)
    new, report = correct(LoraAdapter.load(folder, pass_through=True), with_embedding)
    assert report.passed_through == whole
    new.save(tmp_path / "new")
    check(world, folder, tmp_path / "new", Correction(), MERGE, with_embedding)


def test_dora_on_an_embedding_is_no_update_that_can_be_corrected(world, with_embedding, tmp_path):
    names = embedding_targets(world[0])
    folder = make_adapter(world, tmp_path / "adapter", target_modules=names, use_dora=True)
    with pytest.raises(CsuloraError, match="lora_magnitude_vector"):
        LoraAdapter.load(folder)
    with pytest.raises(CsuloraError, match="no module could be corrected"):
        correct(LoraAdapter.load(folder, pass_through=True), with_embedding)


# --- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [["mlp.experts.gate_up_proj"], ["down_proj"]])
@pytest.mark.parametrize("form", FORMS)
def test_expert_parameters_pass_through_beside_corrected_modules(tmp_path, parameters, form):
    """PEFT names their ranks otherwise than their tensors; the corrected folder must load."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], target_parameters=parameters
    )
    base = mixtral(vocab_size=32)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    model = peft.get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    adapter = LoraAdapter.load(tmp_path / "adapter", pass_through=True)
    assert adapter.passed_through and len(adapter.modules) == 2
    subspace = builders.random_subspace(adapter)
    new, _ = correct(adapter, subspace, Correction(form=form))
    new.save(tmp_path / "corrected")
    fresh = mixtral(vocab_size=32)
    fresh.load_state_dict(weights)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "corrected")
    merged = loaded.merge_and_unload().state_dict()
    before = model.merge_and_unload().state_dict()
    for name, module in new.modules.items():
        update = module.scaling * module.B @ module.A
        torch.testing.assert_close(merged[f"{name}.weight"], weights[f"{name}.weight"] + update)
    for name in before:
        if "experts" in name:
            torch.testing.assert_close(merged[name], before[name])
            changed = parameters[0].rpartition(".")[2] in name
            assert torch.equal(before[name], weights[name]) != changed
