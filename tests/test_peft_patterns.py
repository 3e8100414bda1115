"""rank_pattern and alpha_pattern by PEFT's own rules: what it computes with an output is the oracle's
update of what it computes with the source, whatever the keys are and whatever PEFT calls the modules."""

import itertools
import random

import builders
import oracle
import pytest
import torch
from torch import nn

from csulora import Correction, CsuloraError, LoraAdapter, LoraModule, Realignment, correct
from csulora.pipeline import by_torch
from csulora.pipeline.finish import finish
from csulora.pipeline.plan import Plan

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

OLD, NEW = "language_model.model.", "model.language_model."
# Beginnings of names in the model and in files of earlier versions of transformers.
MOVED = [(NEW, OLD), ("model.vision_tower.", "vision_tower.vision_model.")]
LIKE_GEMMA = {
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 32,
    },
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    },
    "mm_tokens_per_image": 1,
    "boi_token_index": 29,
    "eoi_token_index": 30,
    "image_token_index": 31,
}


def gemma():
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**LIKE_GEMMA))


class Nested(nn.Module):
    """Names that end one another, and layers of all kinds that PEFT adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 4, 3)
        self.x = nn.ModuleDict({"proj": nn.Linear(8, 12), "fc": nn.Linear(12, 8)})
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "proj": nn.Linear(8, 8),
                    "x": nn.ModuleDict({"proj": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)}),
                }
            )
            for _ in range(3)
        )


def write(model, folder, **options):
    """An adapter folder with random factors, by PEFT."""
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options
    made = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return folder


def updates(model, folder):
    """What PEFT adds to each weight, by its name for the module in the model."""
    loaded = peft.PeftModel.from_pretrained(model, folder)
    found = {}
    for name, layer in loaded.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            found[name] = layer.get_delta_weight("default").detach().double()
    return found


def age(folder):
    """Give tensors the names that earlier versions of transformers would have given them."""
    for new, old in MOVED:
        rename(folder, new, old)


def rename(folder, old, new):
    builders.edit_tensors(
        folder / builders.WEIGHTS,
        lambda tensors: [
            tensors.__setitem__(name.replace(f".{old}", f".{new}", 1), tensors.pop(name))
            for name in list(tensors)
        ],
    )


def check(build, folder, out, new, subspace, moved=()):
    """The output by PEFT, module by module: the oracle's update, or the source's of what is copied.

    Also after PEFT has saved it anew.
    """
    new.save(out)
    before, after = updates(build(), folder), updates(build(), out)
    saved_anew(build(), out, out.with_name(f"{out.name} anew"), after)
    assert before.keys() == after.keys()
    for name, dW in before.items():
        own = name
        for new_name, old_name in moved:
            own = own.replace(new_name, old_name, 1)
        wanted = dW
        if own in new.modules:
            basis = subspace.modules[own]
            wanted = oracle.correct(dW, basis.U, basis.V, (0, 10, 10, 10), "direction")
        assert float((after[name] - wanted).norm()) <= 1e-5 * float(dW.norm()), name
        assert float(dW.norm()) > 0
    return before


def saved_anew(model, out, again, wanted):
    """What PEFT saves of an output that it has loaded, keys sorted, means the same."""
    loaded = peft.PeftModel.from_pretrained(model, out)
    loaded.save_pretrained(again)
    found = updates(loaded.unload(), again)
    for name, dW in wanted.items():
        torch.testing.assert_close(found[name], dW, rtol=1e-5, atol=1e-6)


def partly(adapter, subspace, left):
    """The corrected adapter with some modules left as they are, by strengths of their own."""
    plan = Plan.of(adapter, subspace, Correction())
    kept = Correction(0, 0, 0, 0)
    members = [m._replace(correction=kept) if m.name in left else m for m in plan.members]
    plan = plan._replace(members=tuple(members))
    (solved,) = by_torch.solve([plan], torch.device("cpu"))
    return finish(plan, solved)[0]


VISION = "model.vision_tower.encoder.layers.0.self_attn"
KEYS = {
    "short": {"alpha_pattern": {"v_proj": 32}},
    "short rank": {"rank_pattern": {"v_proj": 4}},
    "rank and alpha": {
        "rank_pattern": {"v_proj": 4, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 7, r".*\.layers\.1\..*": 5, "nothing": 9},
    },
    "new names in full": {
        "rank_pattern": {f"{NEW}layers.0.self_attn.q_proj": 4},
        "alpha_pattern": {f"{NEW}layers.0.self_attn.q_proj": 9},
    },
    "old names in full": {"alpha_pattern": {f"{OLD}layers.0.self_attn.q_proj": 9}},
    "an alpha and its double": {"alpha_pattern": {f"{OLD}layers.0.self_attn.q_proj": 6}},
    "vision in full": {
        "rank_pattern": {f"{VISION}.q_proj": 4},
        "alpha_pattern": {f"{VISION}.q_proj": 5},
    },
    "anchored": {"alpha_pattern": {f"^{NEW}layers.(0|1).self_attn.q_proj$": 9}},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("case", KEYS)
def test_adapters_of_models_that_were_nested_anew(tmp_path, case, use_rslora):
    """PEFT renames their tensors on loading and matches patterns with the new names."""
    options = KEYS[case] | {"use_rslora": use_rslora, "target_modules": TARGETS}
    folder = write(gemma(), tmp_path / "adapter", **options)
    age(folder)
    adapter = LoraAdapter.load(folder)
    assert any(name.startswith(OLD) for name in adapter.modules)
    subspace = builders.random_subspace(adapter)
    new, _ = correct(adapter, subspace)
    check(gemma, folder, tmp_path / "new", new, subspace, MOVED)
    config = peft.LoraConfig.from_pretrained(tmp_path / "new")
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(config, field).keys() == options.get(field, {}).keys()


def test_a_convolution_beside_modules_that_were_nested_anew(tmp_path):
    """It keeps its rank and alpha while theirs double, under whichever name PEFT knows it."""
    options = {"target_modules": [*TARGETS, "patch_embedding"], "alpha_pattern": {"v_proj": 7}}
    folder = write(gemma(), tmp_path / "adapter", **options)
    age(folder)
    adapter = LoraAdapter.load(folder, pass_through=True)
    assert list(adapter.passed_through_ranks) == [
        "vision_tower.vision_model.embeddings.patch_embedding"
    ]
    subspace = builders.random_subspace(adapter)
    new, _ = correct(adapter, subspace)
    before = check(gemma, folder, tmp_path / "new", new, subspace, MOVED)
    assert "model.vision_tower.embeddings.patch_embedding" in before
    assert new.config["rank_pattern"] == {"patch_embedding": 2}


@pytest.mark.parametrize(
    "case", ["old names in full", "an alpha and its double", "new names in full", "short rank"]
)
def test_modules_left_as_they_are_beside_others_that_were_nested_anew(tmp_path, case):
    """Also where PEFT gives a module another alpha than its name in the file would."""
    folder = write(gemma(), tmp_path / "adapter", target_modules=TARGETS, **KEYS[case])
    age(folder)
    adapter = LoraAdapter.load(folder)
    subspace = builders.random_subspace(adapter)
    left = [f"{OLD}layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    partly(adapter, subspace, left).save(tmp_path / "partly")
    correct(adapter, subspace)[0].save(tmp_path / "new")
    before, after, whole = (
        updates(gemma(), tmp_path / name) for name in ("adapter", "partly", "new")
    )
    for name in before:
        wanted = before if name.replace(NEW, OLD, 1) in left else whole
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_put_together_by_hand(tmp_path):
    """Ranks and alphas of its own, which its configuration does not know."""
    folder = write(Nested(), tmp_path / "adapter", target_modules=["proj", "fc"], r=3)
    adapter = LoraAdapter.load(folder)
    modules = {
        name: LoraModule(torch.randn(i, m.A.shape[1]), torch.randn(m.B.shape[0], i), i * s, s)
        for i, (name, m) in enumerate(adapter.modules.items(), start=1)
        for s in (0.5 + i % 3,)
    }
    LoraAdapter(modules, adapter.config).save(tmp_path / "made")
    for name, update in updates(Nested(), tmp_path / "made").items():
        module = modules[name]
        torch.testing.assert_close(update.float(), module.scaling * module.B @ module.A)


NEEDS_SCALING = {
    "portable": (None, True),
    "budget": (Correction(budget={"change": 0.3}), False),
    "realign": (Realignment(edge=False), False),
}


@pytest.mark.parametrize("which", NEEDS_SCALING)
def test_a_key_that_means_two_things_where_the_scaling_counts(tmp_path, which):
    """Where it depends on the name what the scaling is, only a correction without it can be made."""
    correction, portable = NEEDS_SCALING[which]
    for case, ambiguous in (("old names in full", True), ("anchored", True), ("short", False)):
        folder = write(gemma(), tmp_path / case, target_modules=TARGETS, **KEYS[case])
        age(folder)
        adapter = LoraAdapter.load(folder)
        subspace = builders.random_subspace(adapter)
        if ambiguous:
            with pytest.raises(
                CsuloraError, match=r"alpha_pattern gives language_model.* the alpha"
            ):
                correct(adapter, subspace, correction, portable=portable)
            continue
        new, _ = correct(adapter, subspace, correction, portable=portable)
        if which == "portable":
            check(gemma, folder, tmp_path / "new", new, subspace, MOVED)
        elif which == "budget":
            new.save(tmp_path / "new")
            before, after = (updates(gemma(), X) for X in (folder, tmp_path / "new"))
            moved = sum((after[n] - dW).square().sum() for n, dW in before.items())
            whole = sum(dW.square().sum() for dW in before.values())
            assert float(moved / whole) ** 0.5 == pytest.approx(0.3, abs=1e-3)


def test_experts_that_transformers_fuses(tmp_path):
    """Adapters of each expert, as they were before: PEFT doubles the configured rank of fused ones."""

    def mixtral():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=16,
                num_local_experts=2,
            )
        )

    experts = "model.layers.0.block_sparse_moe.experts"
    shapes = {
        f"{experts}.{i}.{name}": (8, 12) if name == "w2" else (12, 8)
        for i in range(2)
        for name in ("w1", "w2", "w3")
    }
    attention = {"model.layers.0.self_attn.q_proj": (8, 8)}
    targets = {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    folder = builders.write_adapter(
        tmp_path / "adapter", shapes=shapes | attention, rank=2, lora_alpha=3, **targets
    )
    adapter = LoraAdapter.load(folder)
    subspace = builders.random_subspace(adapter, rank=2)
    new, _ = correct(adapter, subspace)
    new.save(tmp_path / "new")
    before, after = (
        peft.PeftModel.from_pretrained(mixtral(), path).merge_and_unload().state_dict()
        for path in (folder, tmp_path / "new")
    )
    base = mixtral().state_dict()
    truth = {
        name: oracle.correct(
            dW, subspace.modules[name].U, subspace.modules[name].V, (0, 10, 10, 10), "direction"
        )
        for name, dW in builders.effective(folder).items()
    }
    for i, (part, name) in itertools.product(range(2), [(0, "w1"), (1, "w3"), (None, "w2")]):
        key = "model.layers.0.mlp.experts." + ("down_proj" if name == "w2" else "gate_up_proj")
        rows = slice(None) if part is None else slice(12 * part, 12 * part + 12)
        found = (after[key] - base[key])[i][rows].double()
        assert float((before[key] - base[key])[i][rows].norm()) > 0.1
        assert float((found - truth[f"{experts}.{i}.{name}"]).norm()) <= 1e-5 * float(found.norm())


def random_options(generator):
    """Ranks and alphas by keys of every kind, short and in full."""
    keys = [
        *(
            "proj",
            "x.proj",
            "fc",
            "conv",
            "^proj",
            r"layers\.[0-9]+\.proj",
            "layers.1.x.proj",
        ),
        *(r".*\.x\..*", r"layers\.(0|2)\.x\.(proj|conv)", "nothing", "layers.0.proj|x.fc", ".*"),
    ]
    return {
        "r": generator.choice([1, 2, 3]),
        "lora_alpha": generator.choice([1, 4, 2.5]),
        "use_rslora": generator.random() < 0.5,
        # PEFT sorts the keys as it writes them.
        "rank_pattern": {
            k: generator.choice([1, 2, 4, 5]) for k in sorted(generator.sample(keys, 3))
        },
        "alpha_pattern": {
            k: generator.choice([0.5, 3, 8]) for k in sorted(generator.sample(keys, 3))
        },
    }


@pytest.mark.parametrize("others", [[], ["conv"]], ids=["alone", "beside others"])
def test_random_patterns(tmp_path, others):
    """Corrected modules alone, beside what is passed through, and beside ones left as they are."""
    generator = random.Random(len(others))
    for i in range(12):
        options = random_options(generator)
        folder = write(
            Nested(), tmp_path / f"in{i}", target_modules=["proj", "fc", *others], **options
        )
        adapter = LoraAdapter.load(folder, pass_through=bool(others))
        assert bool(adapter.passed_through) == bool(others)
        subspace = builders.random_subspace(adapter, rank=2)
        new, _ = correct(adapter, subspace)
        check(Nested, folder, tmp_path / f"out{i}", new, subspace)
        left = generator.sample(sorted(new.modules), 3)
        partly(adapter, subspace, left).save(tmp_path / f"partly{i}")
        before = updates(Nested(), folder)
        after = updates(Nested(), tmp_path / f"partly{i}")
        whole = updates(Nested(), tmp_path / f"out{i}")
        for name in before:
            wanted = before if name in left else whole
            torch.testing.assert_close(after[name], wanted[name], rtol=1e-5, atol=1e-6)
        saved_anew(Nested(), tmp_path / f"partly{i}", tmp_path / f"anew{i}", after)


def test_layers_pattern_and_transformed_layers(tmp_path):
    options = {
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "alpha_pattern": {"x.proj": 9},
    }
    folder = write(Nested(), tmp_path / "adapter", target_modules=["proj"], **options)
    adapter = LoraAdapter.load(folder)
    assert all(".1." not in name for name in adapter.modules)
    subspace = builders.random_subspace(adapter, rank=2)
    new, _ = correct(adapter, subspace)
    check(Nested, folder, tmp_path / "new", new, subspace)


def test_a_parameter_of_a_linear_layer_is_corrected_like_its_weight(tmp_path):
    """PEFT looks up its rank and alpha by the parameter's name."""
    options = {
        "target_modules": ["x.fc"],
        "target_parameters": ["x.proj.weight"],
        "rank_pattern": {r"x\.proj\.weight": 3},
        "alpha_pattern": {"weight": 7},
    }
    folder = write(Nested(), tmp_path / "adapter", **options)
    adapter = LoraAdapter.load(folder)
    subspace = builders.random_subspace(adapter, rank=2)
    new, _ = correct(adapter, subspace)
    check(Nested, folder, tmp_path / "new", new, subspace)
    assert any(name.endswith("x.proj") for name in new.modules)


def test_keys_stay_and_values_double(tmp_path):
    options = {"rank_pattern": {"x.proj": 4, "unused": 1}, "alpha_pattern": {"fc": 3, ".*0.*": 0.5}}
    folder = write(Nested(), tmp_path / "adapter", target_modules=["proj", "fc"], **options)
    adapter = LoraAdapter.load(folder)
    new, _ = correct(adapter, builders.random_subspace(adapter, rank=2))
    assert new.config["rank_pattern"] == {"x.proj": 8, "unused": 2}
    assert new.config["alpha_pattern"] == {"fc": 6, ".*0.*": 1}
    same, _ = correct(adapter, builders.random_subspace(adapter, rank=2), Correction(form="same"))
    assert same.config == adapter.config == same.written_config()
