"""Models whose modules are nested one way in memory and another on disk.

transformers writes the checkpoints and reads them back, PEFT writes the adapters and merges the corrected
ones; right is W_aligned + what the dense oracle makes of the update, by the weights in memory.
"""

import re

import builders
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import TOLERANCES

from csulora import Correction, CsuloraError, LoraAdapter, SafetySubspace, correct, estimate
from csulora.files.layouts import match_layouts
from csulora.settings import FORMS

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

K = 5
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The same shapes as the language model's on purpose: nothing but names tells the towers apart.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 1,
}
QWEN25_VISION = QWEN_VISION | {"out_hidden_size": 32, "intermediate_size": 48}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 16}


def text(kind, **more):
    return TEXT | {"model_type": kind, "head_dim": 8} | more


def vision(kind, **more):
    return VISION | {"model_type": kind} | more


CLIP = vision("clip_vision_model", projection_dim=16)
SIGLIP = vision("siglip_vision_model", vision_use_head=False, projection_dim=32)
# By the beginning of transformers' class names: the arguments of the configuration.
FAMILIES = {
    "Gemma3": {"text_config": text("gemma3_text"), "vision_config": SIGLIP},
    "Llava": {"text_config": text("llama"), "vision_config": CLIP},
    "VideoLlava": {"text_config": text("llama"), "vision_config": CLIP},
    "PaliGemma": {"text_config": text("gemma"), "vision_config": SIGLIP, "projection_dim": 32},
    "AyaVision": {"text_config": text("cohere2"), "vision_config": SIGLIP},
    "Mistral3": {"text_config": text("mistral"), "vision_config": vision("pixtral", head_dim=8)},
    "Mllama": {
        "text_config": TEXT
        | {
            "model_type": "mllama_text_model",
            "cross_attention_layers": [1],
            "rope_parameters": ROPE,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "Idefics3": {"text_config": text("llama"), "vision_config": vision("idefics3_vision")},
    "InternVL": {
        "text_config": text("qwen2"),
        "vision_config": vision("internvl_vision", image_size=[16, 16], patch_size=[8, 8]),
    },
    "Qwen2VL": {
        "text_config": text("qwen2_vl_text", **MROPE),
        "vision_config": QWEN_VISION | {"embed_dim": 32, "mlp_ratio": 2},
    },
    "Qwen2_5_VL": {
        "text_config": text("qwen2_5_vl_text", **MROPE),
        "vision_config": QWEN25_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
    },
    "Qwen3VL": {
        "text_config": text("qwen3_vl_text", **MROPE),
        "vision_config": QWEN25_VISION
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "Voxtral": {
        "text_config": text("llama"),
        "audio_config": AUDIO
        | {
            "model_type": "voxtral_encoder",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
    },
}
# Checkpoints as published: their towers have a wrapper that models made from scratch are saved without.
WRAPPED_TOWERS = ("Gemma3", "Llava", "VideoLlava", "PaliGemma", "AyaVision")


class World:
    """A model pair of one family on disk, and adapters over all its linear layers."""

    def __init__(self, family, folder):
        self.folder = folder
        self.kind = getattr(transformers, f"{family}ForConditionalGeneration")
        config = getattr(transformers, f"{family}Config")
        torch.manual_seed(0)
        model = self.kind(config(**FAMILIES[family]))
        self.on_disk = {}
        for name in ("base", "aligned"):
            self.shift(model)
            model.save_pretrained(folder / name)
            if family in WRAPPED_TOWERS:
                builders.edit_tensors(folder / name / "model.safetensors", wrap_towers)
        stored = load_file(folder / "aligned" / "model.safetensors")
        self.base, self.aligned = (self.weights(name) for name in ("base", "aligned"))
        for name, W in self.aligned.items():  # random weights: equal ones are the same
            same = [k for k, X in stored.items() if X.shape == W.shape and torch.equal(X, W)]
            if name.endswith(".weight") and len(same) == 1:
                self.on_disk[name.removesuffix(".weight")] = same[0].removesuffix(".weight")
        self.adapter = self.write_adapter(folder / "adapter")
        self.modules = sorted(LoraAdapter.load(self.adapter).modules)
        self.old_adapter = self.write_old_adapter(folder / "old-adapter")

    @staticmethod
    def shift(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)

    def weights(self, name):
        return {n: W.detach() for n, W in self.load(name).named_parameters()}

    def load(self, name):
        model, info = self.kind.from_pretrained(
            self.folder / name, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return model

    def write_adapter(self, folder, **options):
        options = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"} | options
        model = peft.get_peft_model(self.load("aligned"), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    def write_old_adapter(self, folder):
        """The same adapter as releases wrote it that nested models as their checkpoints do."""
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(
            (self.adapter / "adapter_config.json").read_bytes()
        )

        def old(name):
            module, _, factor = name.removeprefix(builders.PREFIX).partition(".lora_")
            return f"{builders.PREFIX}{self.on_disk[module]}.lora_{factor}"

        tensors = load_file(self.adapter / "adapter_model.safetensors")
        renamed = {old(name): X for name, X in tensors.items()}
        save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def merged(self, folder):
        """The update of each weight in memory, as PEFT merges it."""
        loaded = peft.PeftModel.from_pretrained(self.load("aligned"), folder)
        after = dict(loaded.merge_and_unload().named_parameters())
        moved = {n: (after[n].detach() - W).double() for n, W in self.aligned.items()}
        return {name: D for name, D in moved.items() if D.any()}

    def wanted(self, name, dW):
        D = (self.aligned[name] - self.base[name]).double()
        U, _, Vt = torch.linalg.svd(D)
        return oracle.correct(dW, U[:, :K], Vt[:K].mT, Correction().strengths, "direction")


def wrap_towers(tensors):
    for name in list(tensors):
        wrapped = re.sub(r"^((vision|image|video)_tower)\.", r"\1.vision_model.", name)
        tensors[wrapped] = tensors.pop(name)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


def check(world, subspace, adapter, folder):
    """Whatever PEFT loads of an adapter it loads of the corrected one, as the oracle has it."""
    new, _ = correct(LoraAdapter.load(adapter), subspace)
    new.save(folder)
    raw, found = world.merged(adapter), world.merged(folder)
    assert raw.keys() == found.keys()
    for name, dW in raw.items():
        # merging rounds W to float32
        rounding = 4e-7 * float(world.aligned[name].norm())
        check_update(found[name], world.wanted(name, dW), rounding)
    # what PEFT does not find under an old name, too
    given, made = builders.effective(adapter), builders.effective(folder)
    assert len(given) == len(world.modules)
    in_memory = dict(zip(world.on_disk.values(), world.on_disk, strict=True))
    for name, dW in given.items():
        check_update(made[name], world.wanted(f"{in_memory.get(name, name)}.weight", dW), 0.0)
    return raw


def check_update(found, wanted, slack):
    error = float((found - wanted).norm())
    assert error <= TOLERANCES[torch.float32] * float(wanted.norm()) + slack


def test_adapters_of_today_and_of_older_releases(world, tmp_path):
    """The corrected adapter, merged by PEFT, is the oracle's, whoever named the modules, and how."""
    pair = world.folder / "base", world.folder / "aligned"
    everything = estimate(*pair, rank=K)
    for style, adapter in (("new", world.adapter), ("old", world.old_adapter)):
        like = estimate(*pair, rank=K, like=adapter)
        # a subspace speaks the checkpoint's names, whichever the adapter's are
        assert set(like.modules) == {world.on_disk[name] for name in world.modules}
        like.save(tmp_path / f"{style}.safetensors")
        found = SafetySubspace.load(tmp_path / f"{style}.safetensors")
        merged = check(world, found, adapter, tmp_path / style)
        assert style == "old" or len(merged) == len(world.modules)
        for name, module in like.modules.items():
            assert torch.equal(module.U, everything.modules[name].U)


def test_modules_by_their_names_in_memory(world):
    pair = world.folder / "base", world.folder / "aligned"
    names = world.modules[::5]
    found = estimate(*pair, rank=1, modules=names)
    assert set(found.modules) == {world.on_disk[name] for name in names}


@pytest.mark.parametrize("form", FORMS)
def test_ranks_by_pattern_under_older_names(form, tmp_path):
    """PEFT applies patterns to the names in memory, whatever the file says: the keys have to stay."""
    world = World("Llava", tmp_path)
    patterns = {"rank_pattern": {"q_proj": 3, r"1\..*v_proj": 1}, "alpha_pattern": {"down_proj": 7}}
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    world.adapter = world.write_adapter(tmp_path / "patterned", **patterns, **targets)
    old = world.write_old_adapter(tmp_path / "old-patterned")
    subspace = estimate(tmp_path / "base", tmp_path / "aligned", rank=K)
    for adapter in (world.adapter, old):
        new, _ = correct(LoraAdapter.load(adapter), subspace, Correction(form=form))
        new.save(tmp_path / "new" / adapter.name)
        found = world.merged(tmp_path / "new" / adapter.name)
        assert found.keys() == world.merged(adapter).keys() and len(found) == 10
        for name, module in new.modules.items():
            memory = {disk: n for n, disk in world.on_disk.items()}.get(name, name)
            wanted = module.scaling * (module.B.double() @ module.A.double())
            slack = 4e-7 * float(world.aligned[f"{memory}.weight"].norm())
            check_update(found[f"{memory}.weight"], wanted, slack)


def test_output_head(world, tmp_path):
    """Beside the language model, within it on disk, or not stored at all because it is tied."""
    adapter = world.write_adapter(tmp_path / "adapter", target_modules=["lm_head"])
    pair = world.folder / "base", world.folder / "aligned"
    subspace = estimate(*pair, rank=K, like=adapter)
    new, _ = correct(LoraAdapter.load(adapter, pass_through=True), subspace)
    base, aligned = (
        world.load(name).lm_head.weight.detach().double() for name in ("base", "aligned")
    )
    U, _, Vt = torch.linalg.svd(aligned - base)
    raw, made = (
        {n: m.scaling * m.B.double() @ m.A.double() for n, m in a.modules.items()}
        for a in (LoraAdapter.load(adapter, pass_through=True), new)
    )
    wanted = oracle.correct(
        raw["lm_head"], U[:, :K], Vt[:K].mT, Correction().strengths, "direction"
    )
    check_update(made["lm_head"], wanted, 0.0)


def has_sense(name):
    return any(word in name for word in ("vision", "visual", "image", "video", "audio"))


def test_no_tower_matches_another(world):
    """With one tower's modules alone in the subspace nothing of another fits, whatever it is called."""
    layouts = set(world.on_disk.values()), set(world.on_disk)
    every = set().union(*layouts)
    seeing = {name for name in every if has_sense(name)}
    # also as the language model alone has them
    speaking = {name.removeprefix(f"{part}.") for name in every - seeing for part in ("model", "x")}
    speaking |= {re.sub(r"^.*?(?=layers\.)", "", name) for name in speaking}
    for known in layouts:
        for part, others in ((seeing & known, speaking), (known - seeing, seeing)):
            for name in others:
                with pytest.raises(CsuloraError, match="no unique match"):
                    match_layouts([name], part, "here", "there")


Q = "layers.0.q_proj"
TEXT_ON_DISK, TEXT_IN_MEMORY = f"language_model.model.{Q}", f"model.language_model.{Q}"
SEEING = f"vision_tower.encoder.{Q}"
THINKER, TALKER = f"thinker.model.{Q}", f"talker.model.{Q}"


@pytest.mark.parametrize(
    ("wanted", "known", "target"),
    [
        (TEXT_IN_MEMORY, [TEXT_ON_DISK, SEEING], TEXT_ON_DISK),
        (f"model.{Q}", [TEXT_IN_MEMORY, f"model.{SEEING}"], TEXT_IN_MEMORY),
        (f"language_model.{Q}", [TEXT_ON_DISK, SEEING], TEXT_ON_DISK),
        (f"transformer.{Q}", [Q], Q),
        (TEXT_IN_MEMORY, [THINKER, TALKER], THINKER),
        ("lm_head", [SEEING, "language_model.lm_head"], "language_model.lm_head"),
        ("lm_head", ["embed_out"], "embed_out"),
        (f"model.{Q}", [f"backbone.{Q}"], f"backbone.{Q}"),  # Nemotron-H
        # CLIP's vision model, which is its own checkpoint
        (f"encoder.{Q}", [f"vision_model.encoder.{Q}"], f"vision_model.encoder.{Q}"),
        (f"model.{SEEING}", [f"vision_tower.vision_model.encoder.{Q}", TEXT_ON_DISK], None),
    ],
)
def test_the_one_that_fits(wanted, known, target):
    assert match_layouts([wanted], known, "here", "there") == {wanted: target or known[0]}


@pytest.mark.parametrize(
    ("wanted", "known", "words"),
    [
        ([f"model.{Q}"], [THINKER, TALKER], [THINKER, TALKER]),
        ([f"model.{Q}"], [TEXT_ON_DISK, TEXT_IN_MEMORY], [TEXT_ON_DISK, TEXT_IN_MEMORY]),
        # the language model or the tower alone: both are called so
        ([Q], [TEXT_ON_DISK, SEEING], [TEXT_ON_DISK, SEEING]),
        ([Q], [SEEING], ["another tower"]),
        ([f"model.{Q}"], [f"vision_tower.model.{Q}"], ["another tower"]),
        ([f"encoder.{Q}"], [f"{part}_model.encoder.{Q}" for part in ("text", "vision")], ["text_"]),
        ([f"image_tower.{Q}"], [f"video_tower.{Q}"], []),
        ([TEXT_IN_MEMORY, f"model.{Q}"], [TEXT_ON_DISK], [TEXT_IN_MEMORY, f"model.{Q} (not alone"]),
        ([TEXT_IN_MEMORY, TEXT_ON_DISK], [TEXT_ON_DISK], ["not alone"]),
    ],
)
def test_no_guess_where_several_fit_or_none(wanted, known, words):
    with pytest.raises(CsuloraError) as caught:
        match_layouts(wanted, known, "here", "there")
    for word in ("here: ", wanted[-1], *words, "; there"):
        assert word in str(caught.value)


def every_renaming():
    """(module in memory, on disk) of each language or vision-language model class, built on no device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_converters, apply_renamings
    from transformers.models.auto import modeling_auto

    kinds = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kinds = {*kinds.values(), *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    for name in sorted(kind for kind in kinds if isinstance(kind, str)):
        kind = getattr(transformers, name, None)
        try:
            with torch.device("meta"):
                model = kind(kind.config_class())
        except Exception:  # wants a package, a device, or a configuration of its own
            continue
        back = [c.reverse_transform() for c in get_model_conversion_mapping(model)[::-1]]
        renamings = [c for c in back if isinstance(c, WeightRenaming)]
        converters = [c for c in back if not isinstance(c, WeightRenaming)]
        names = [
            n
            for n, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not any(int(i) > 1 for i in re.findall(r"\.(\d+)(?=\.)", f"{n}."))
        ]
        yield (
            name,
            {
                n: apply_renamings(f"{n}.weight", renamings).removesuffix(".weight")
                for n in names
                if apply_converters(f"{n}.weight", converters)[1] is None
            },
        )


@pytest.mark.exhaustive
def test_no_model_of_transformers_is_matched_wrongly():
    """What it renames within a model's parts may stay unmatched, which is an error and no guess."""
    classes = right = renamed = unmatched = 0
    for family, on_disk in every_renaming():
        classes += 1
        known = set(on_disk.values())
        for name, target in on_disk.items():
            try:
                assert match_layouts([name], known, "", "")[name] == target, family
                right += 1
                renamed += name != target
            except CsuloraError:
                assert name != target, (family, name)
                unmatched += 1
    print(classes, right, renamed, unmatched)
    assert classes > 150 and renamed > 10 * TEXT["num_hidden_layers"] and unmatched < renamed
