"""What is never served as it is: by which reason it is refused, and for how long."""

import pickle

import builders
import pytest
import torch
from builders import CONFIG, LAYERS, REPORT, WEIGHTS
from refusing import add, refused
from safetensors.torch import load_file

import csulora
from csulora.serving import counters
from csulora.serving.guard import refusal_text

PREFIX = builders.PREFIX


def unprefixed(tensors):
    for name in list(tensors):
        tensors[name.removeprefix(PREFIX)] = tensors.pop(name)


def test_names_without_the_prefix_are_corrected(place):
    plain = place.guard().admit(place.adapter("plain"), "plain")
    folder = place.adapter("short")
    builders.edit_tensors(folder / WEIGHTS, unprefixed)
    found = place.guard().admit(folder, "short")
    assert found.how == "corrected"
    one, other = builders.effective(found.path), builders.effective(plain.path)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name]) for name in one)


LAYER = f"{PREFIX}{LAYERS[0]}"


@pytest.mark.parametrize("form", ["portable", "keep"])
@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (add("odd"), {}, "not lora"),
        (add(f"{PREFIX}lm_head.weight", (32, 16)), {"modules_to_save": ["lm_head"]}, "not lora"),
        (add(f"{PREFIX}model.embed_tokens.weight", (32, 16)), {}, "not lora"),
        (add(f"{LAYER}.bias", (24,)), {"bias": "all"}, "not lora"),
        (add(f"{LAYER}.lora_B.bias", (24,)), {"lora_bias": True}, "not lora"),
        (add(f"{LAYER}.lora_magnitude_vector", (24,)), {"use_dora": True}, "not lora"),
        (add(f"{LAYER}.lora_magnitude_vector", (24,)), {}, "source"),
        (add(f"{LAYER}.lora_C.weight", (4, 4)), {}, "not lora"),
        (add("model.layers.0.self_attn.k_proj.lora_a.weight"), {}, "not lora"),
        (None, {"use_dora": True}, "not lora"),
        (None, {"peft_type": "LOHA"}, "source"),
        (None, {"r": 5}, "source"),
        (lambda tensors: tensors.popitem(), {}, "source"),
        (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), {}, "source"),
    ],
)
def test_what_would_pass_uncorrected_is_refused(place, form, change, config, reason):
    folder = place.adapter()
    builders.edit_json(folder / CONFIG, **config)
    if change is not None:
        builders.edit_tensors(folder / WEIGHTS, change)
    place.age(folder)
    g = place.guard(form=form)
    first = refused(g, folder)
    assert first.reason == reason
    assert "pass-through" not in str(first)  # no option of a server
    assert place.entries() == []
    assert str(refused(g, folder)) == str(first)  # from memory
    assert counters.collect()["refused", reason] == 2
    assert refusal_text("one", first) == f"csulora refused one: {first}"


def test_what_was_refused_is_looked_at_anew_once_it_is_another(place):
    folder = place.adapter()
    builders.edit_tensors(folder / WEIGHTS, add("odd"))
    place.age(folder)
    g = place.guard()
    assert refused(g, folder).reason == "not lora"
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop("odd"))
    assert g.admit(folder, "one").how == "corrected"


def test_what_was_refused_for_a_passing_reason_is_served_later(place, monkeypatch):
    folder, g = place.adapter(), place.guard()
    real, read = csulora.adapter.read_safetensors, []

    def failing(path, **options):
        read.append(path)
        raise csulora.CsuloraError(f"{path}: Too many open files")

    monkeypatch.setattr(csulora.adapter, "read_safetensors", failing)
    for _ in range(3):
        assert refused(g, folder).reason == "source"
    assert len(read) == 1
    monkeypatch.setattr(csulora.adapter, "read_safetensors", real)
    assert refused(g, folder).reason == "source"
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert g.admit(folder, "one").how == "corrected"


def test_pickles_are_refused_and_left_out(place):
    folder = place.adapter()
    g = place.guard()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "adapter_model.pt").write_bytes(pickle.dumps({"a": 1}))
    assert builders.tree(g.admit(folder, "one").path).keys() == {WEIGHTS, CONFIG, REPORT}
    (folder / WEIGHTS).unlink()
    error = refused(g, folder)
    assert error.reason == "pickle" and "only safetensors are read" in str(error)


def embedding(tensors):
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.randn(4, 32)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.randn(16, 4)


def head(tensors):
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = torch.randn(4, 16)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = torch.randn(32, 4)


@pytest.mark.parametrize(
    ("change", "name", "portable"),
    [(embedding, "model.embed_tokens", "source"), (head, "lm_head", "corrected")],
)
def test_embeddings_and_heads_only_corrected(place, change, name, portable):
    folder = place.adapter()
    builders.edit_tensors(folder / WEIGHTS, change)
    place.age(folder)
    for form in ("portable", "keep"):
        assert refused(place.guard(form=form), folder).reason == "subspace"
    shapes = builders.SHAPES | {name: (32, 16) if name == "lm_head" else (16, 32)}
    tensors = builders.subspace_tensors(shapes)
    if name != "lm_head":
        tensors[f"{name}.U"], tensors[f"{name}.V"] = tensors[f"{name}.V"], tensors[f"{name}.U"]
    builders.write_subspace(place.root / "subspace.safetensors", tensors)
    found = place.guard(form="keep").admit(folder, "one")
    raw, new = load_file(folder / WEIGHTS), load_file(found.path / WEIGHTS)
    assert raw.keys() == new.keys()
    assert not any(raw[n].shape == new[n].shape and torch.equal(raw[n], new[n]) for n in raw)
    if portable == "corrected":
        assert place.guard().admit(folder, "one").how == "corrected"
    else:
        assert refused(place.guard(), folder).reason == "subspace"


def test_the_portable_form_goes_without_a_copy_of_the_head(place):
    """PEFT writes the base weight beside LoRA on a head; it is left out, and nothing else is."""
    folder = place.adapter()
    copy = f"{PREFIX}lm_head.base_layer.weight"
    builders.edit_tensors(folder / WEIGHTS, head)
    builders.edit_tensors(folder / WEIGHTS, add(copy, (32, 16)))
    tensors = builders.subspace_tensors(builders.SHAPES | {"lm_head": (32, 16)})
    builders.write_subspace(place.root / "subspace.safetensors", tensors)
    found = place.guard().admit(folder, "one")
    names = load_file(found.path / WEIGHTS).keys()
    assert copy not in names and f"{PREFIX}lm_head.lora_A.weight" in names
    assert refused(place.guard(form="keep"), folder).reason == "not lora"
    builders.edit_tensors(folder / WEIGHTS, add(f"{PREFIX}other.base_layer.weight", (32, 16)))
    assert refused(place.guard(), folder).reason == "not lora"


def test_folders_that_are_none(place):
    g = place.guard()
    file = place.root / "file"
    file.write_text("x")
    for given in (place.root / "nowhere", file, "org/model", "", "a\0b"):
        assert refused(g, given).reason in ("missing", "unforeseen", "source")
    assert refused(g, place.cache).reason == "outside"
    assert refused(g, place.cache / "leases").reason == "outside"
    empty = place.adapters / "empty"
    empty.mkdir()
    assert refused(g, empty).reason == "source"


def test_links_out_of_an_adapter_are_refused(place):
    folder, other = place.adapter(), place.adapter("other")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(other / WEIGHTS)
    error = refused(place.guard(), folder)
    assert error.reason == "source" and "links outside its folder" in str(error)


def test_what_nobody_foresaw_is_a_refusal(place, monkeypatch):
    folder = place.adapter()
    g = place.guard()
    monkeypatch.setattr("csulora.serving.entries.write_folder", lambda *_, **__: 1 / 0)
    error = refused(g, folder)
    assert error.reason == "unforeseen" and str(error).startswith("ZeroDivisionError")
    assert place.entries() == [] and place.leftovers() == []
    monkeypatch.undo()
    assert g.admit(folder, "one").how == "corrected"
