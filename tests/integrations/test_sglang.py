"""The guard in SGLang. No engine runs here: a stand-in everywhere, and where SGLang's own modules import
without a GPU, those with the text of its own functions."""

import json
import subprocess
import sys
from dataclasses import replace

import builders
import pytest
import sglang_stand_in as stand_in
import torch
from safetensors.torch import load_file, save_file

import csulora
from csulora.integrations import sglang
from csulora.serving import config

GENTLE = 1.0  # the fit of form same is near then
STRENGTHS = ("lambda_left", "lambda_right", "lambda_off")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a subspace, and the configuration that the environment names."""
    builders.write_subspace(tmp_path / "subspace.safetensors")
    monkeypatch.setenv(config.VARIABLE, str(tmp_path / "csulora.toml"))
    configure(tmp_path)
    return tmp_path


def configure(place, **changes):
    values = {"mode": "correct", "subspace": "subspace.safetensors", "cache": "cache"} | changes
    settings = dict.fromkeys(STRENGTHS, GENTLE)
    builders.write_guard(place / "csulora.toml", settings, **values)


class World:
    """SGLang's modules, and how its references are made."""

    def __init__(self, manager, registry, ref):
        self.manager, self.registry, self.ref = manager, registry, ref

    def installed(self):
        """The class of a scheduler's manager, after plugins were loaded and their hooks applied."""
        sglang.install()
        self.registry.apply_hooks()
        return self.manager.LoRAManager


@pytest.fixture(params=["stand-in", "its own"])
def world(request, monkeypatch):
    def ref(name, path, **more):
        kind = stand_in.Ref if request.param == "stand-in" else found.LoRARef
        return kind(lora_id=f"id-{name}", lora_name=name, lora_path=str(path), pinned=False)

    if request.param == "stand-in":
        yield World(stand_in.pretend(monkeypatch), stand_in.HookRegistry, ref)
        return
    hooks = pytest.importorskip("sglang.srt.plugins.hook_registry")
    found = pytest.importorskip("sglang.srt.lora.lora_registry")
    pytest.importorskip("sglang.srt.lora.lora_config")
    hooks.HookRegistry.reset()
    yield World(stand_in.with_real_functions(monkeypatch), hooks.HookRegistry, ref)
    hooks.HookRegistry.reset()


def correction(form="exact"):
    return csulora.Correction(form=form, **dict.fromkeys(STRENGTHS, GENTLE))


def wanted(adapter, place, max_rank=None):
    """The corrected update of each module, dW, by the library."""
    subspace = csulora.SafetySubspace.load(place / "subspace.safetensors")
    loaded = csulora.LoraAdapter.load(adapter)
    exact = 2 * max(module.rank for module in loaded.modules.values())
    form = "exact" if max_rank is None or exact <= max_rank else "same"
    corrected, _ = csulora.correct(loaded, subspace, correction(form))
    return {
        name: module.scaling * module.B.double() @ module.A.double()
        for name, module in corrected.modules.items()
    }


def assert_corrected(lora, adapter, place, max_rank=None):
    """That what SGLang would apply is the corrected update, by SGLang's own rule for the scale."""
    assert lora.config["lora_alpha"] == lora.config["r"]
    for module, dW in wanted(adapter, place, max_rank).items():
        torch.testing.assert_close(lora.update(module), dW, rtol=1e-5, atol=1e-6)


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"q_proj": 3}},
    "wide": {"rank": 7},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["folder", "tensors"])
def test_sglang_applies_the_corrected_update(world, place, kind, way):
    adapter = builders.write_adapter(place / "in" / "one", **KINDS[kind])
    manager = world.installed()(max_lora_rank=64)
    ref = world.ref("one", adapter)
    if way == "folder":
        result = manager.load_lora_adapter(ref)
        loaded_from = manager.lora_refs["id-one"].lora_path
        assert loaded_from.startswith(str(place / "cache"))
    else:
        tensors = load_file(adapter / builders.WEIGHTS)
        values = json.loads((adapter / builders.CONFIG).read_text())
        before = {name: X.clone() for name, X in tensors.items()}, dict(values)
        result = manager.load_lora_adapter_from_tensors(ref, tensors, values)
        assert values == before[1]
        assert all(torch.equal(X, before[0][name]) for name, X in tensors.items())
    assert result.success, result.error_message
    assert_corrected(manager.loras["id-one"], adapter, place)


@pytest.mark.parametrize("limit", [None, 4, 8])
def test_the_form_fits_the_rank_of_the_server(world, place, limit):
    """At its start, when the manager has kept no rank yet, and later."""
    adapter = builders.write_adapter(place / "in" / "one")
    manager = world.installed()(max_lora_rank=limit, lora_paths=[world.ref("one", adapter)])
    assert manager.loras["id-one"].config["r"] == (4 if limit == 4 else 8)
    assert manager.load_lora_adapter(world.ref("two", adapter)).success
    tensors = load_file(adapter / builders.WEIGHTS)
    values = json.loads((adapter / builders.CONFIG).read_text())
    assert manager.load_lora_adapter_from_tensors(
        world.ref("three", "__tensor__"), tensors, values
    ).success
    for name in ("one", "two", "three"):
        assert_corrected(manager.loras[f"id-{name}"], adapter, place, limit)


def test_a_refusal_is_a_result_that_clients_read(world, place):
    adapter = builders.write_adapter(place / "in" / "one", rank=9)
    manager = world.installed()(max_lora_rank=8)
    result = manager.load_lora_adapter(world.ref("one", adapter))
    assert not result.success and manager.loras == {}
    assert result.error_message.startswith("csulora refused one: its rank in the form same is 9")
    result = manager.load_lora_adapter(world.ref("one", "some/adapter-on-a-hub"))
    assert result.error_message.startswith("csulora refused one: ")
    assert "no such adapter folder" in result.error_message


def test_a_refused_adapter_ends_the_start_that_names_it(world, place):
    with pytest.raises(RuntimeError, match="csulora refused one"):
        world.installed()(max_lora_rank=8, lora_paths=[world.ref("one", place / "missing")])


def test_no_other_weights_of_a_folder_reach_sglang(world, place):
    """It reads every safetensors file of a folder, and an index may point to one of them alone."""
    adapter = builders.write_adapter(place / "in" / "one")
    raw = load_file(adapter / builders.WEIGHTS)
    save_file(raw, adapter / "zzz.safetensors", {"format": "pt"})
    builders.write_json(
        adapter / "model.safetensors.index.json",
        {"weight_map": dict.fromkeys(raw, "zzz.safetensors")},
    )
    manager = world.installed()(max_lora_rank=8)
    assert manager.load_lora_adapter(world.ref("one", adapter)).success
    assert_corrected(manager.loras["id-one"], adapter, place)


def test_the_form_of_the_configuration_is_overruled(world, place):
    configure(place, form="keep")
    adapter = builders.write_adapter(place / "in" / "one", use_rslora=True)
    manager = world.installed()(max_lora_rank=8)
    assert manager.load_lora_adapter(world.ref("one", adapter)).success
    assert_corrected(manager.loras["id-one"], adapter, place)


def spoiled(tensors, values):
    """Tensors and configurations that no correction can be given for."""
    first = next(iter(tensors))
    yield {**tensors, first: tensors[first] * float("nan")}, values, "NaN"
    extra = {"base_model.model.classifier.weight": torch.zeros(2, 2)}
    yield {**tensors, **extra}, values, "classifier"
    yield {**tensors, first: tensors[first][:2]}, values, "do not fit"
    yield {first.replace("layers.0", "layers.7"): tensors[first]}, values, ""
    yield {}, values, "no LoRA tensors"
    yield {**tensors, first: None}, values, "not a dense tensor"
    yield tensors, {**values, "peft_type": "LOHA"}, "only LORA adapters"
    yield tensors, {**values, "r": float("nan")}, ""
    yield tensors, None, ""
    yield None, values, ""


def test_tensors_that_cannot_be_corrected_are_refused(world, place):
    adapter = builders.write_adapter(place / "in" / "one")
    tensors = load_file(adapter / builders.WEIGHTS)
    values = json.loads((adapter / builders.CONFIG).read_text())
    manager = world.installed()(max_lora_rank=64)
    for bad, configuration, text in spoiled(tensors, values):
        result = manager.load_lora_adapter_from_tensors(
            world.ref("one", "__tensor__"), bad, configuration
        )
        assert not result.success and manager.loras == {}
        assert result.error_message.startswith("csulora refused one: ")
        assert text in result.error_message


def test_require_takes_no_tensors_and_nothing_unproven(world, place):
    configure(place, mode="require", folders=["in"])
    adapter = builders.write_adapter(place / "in" / "one")
    manager = world.installed()(max_lora_rank=64)
    tensors = load_file(adapter / builders.WEIGHTS)
    values = json.loads((adapter / builders.CONFIG).read_text())
    ref = world.ref("one", adapter)
    result = manager.load_lora_adapter_from_tensors(ref, tensors, values)
    assert not result.success and "came as tensors" in result.error_message
    result = manager.load_lora_adapter(ref)
    assert not result.success and "is not corrected" in result.error_message
    assert manager.loras == {}
    subspace = csulora.SafetySubspace.load(place / "subspace.safetensors")
    csulora.correct_folder(adapter, subspace, place / "out" / "one", correction(), portable=True)
    result = manager.load_lora_adapter(replaced(ref, place / "out" / "one"))
    assert result.success, result.error_message
    assert_corrected(manager.loras["id-one"], adapter, place)


def replaced(ref, path):
    if isinstance(ref, stand_in.Ref):
        return replace(ref, lora_path=str(path))
    import msgspec

    return msgspec.structs.replace(ref, lora_path=str(path))


def test_observe_serves_raw_and_logs(world, place):
    configure(place, mode="observe", audit="audit.jsonl")
    adapter = builders.write_adapter(place / "in" / "one")
    tensors = load_file(adapter / builders.WEIGHTS)
    values = json.loads((adapter / builders.CONFIG).read_text())
    manager = world.installed()(max_lora_rank=64)
    assert manager.load_lora_adapter(world.ref("one", adapter)).success
    assert manager.load_lora_adapter_from_tensors(
        world.ref("two", "__tensor__"), tensors, values
    ).success
    assert manager.load_lora_adapter_from_tensors(
        world.ref("three", "__tensor__"), tensors, values | {"peft_type": "LOHA"}
    ).success
    for lora in manager.loras.values():
        assert all(torch.equal(lora.tensors[name], X) for name, X in tensors.items())
    lines = [json.loads(line) for line in (place / "audit.jsonl").read_text().splitlines()]
    assert [line["decision"] for line in lines] == ["observed"] * 3
    one, two, three = lines
    assert one["relative_change"] == pytest.approx(two["relative_change"]) and two["rank"] == 8
    assert "relative_change" not in three and "LOHA" in three["text"]


@pytest.mark.parametrize("mode", ["off", None])
def test_without_a_guard_nothing_is_touched(world, place, monkeypatch, mode):
    if mode is None:
        monkeypatch.delenv(config.VARIABLE)
    else:
        configure(place, mode=mode)
    before = world.manager.LoRAManager._load_lora_adapter
    assert world.installed()._load_lora_adapter is before


def test_a_configuration_that_is_wrong_is_an_error(world, place):
    configure(place, mode="corect")
    with pytest.raises(csulora.CsuloraError, match="mode: must be one of"):
        sglang.install()


def test_a_guard_that_cannot_open_ends_the_scheduler(world, place):
    (place / "subspace.safetensors").write_bytes(b"none")
    manager = world.installed()
    with pytest.raises(SystemExit, match=r"csulora: error: .*subspace\.safetensors"):
        manager(max_lora_rank=8)


@pytest.mark.parametrize("name", sglang.EXPECTED)
def test_functions_that_are_not_as_expected_end_the_start(world, place, name):
    setattr(world.manager.LoRAManager, name, lambda self, other: None)
    text = (
        rf"cannot guard this server: .*LoRAManager\.{name} takes \(self, other\), and not \(self, "
    )
    with pytest.raises(csulora.CsuloraError, match=text):
        sglang.install()
    delattr(world.manager.LoRAManager, name)
    with pytest.raises(csulora.CsuloraError, match=f"{name} cannot be had .*, and not \\(self, "):
        sglang.install()


UNFORESEEN = {
    "a guard": ("csulora.serving.guard.Guard.admit", "csulora.serving.guard.Guard.admit_tensors"),
    "a rank": ("csulora.integrations.sglang.Hooks._max_rank",),
    "msgspec": ("msgspec.structs.replace",),
}


@pytest.mark.parametrize("of", UNFORESEEN)
@pytest.mark.parametrize("way", ["folder", "tensors"])
def test_whatever_else_goes_wrong_is_a_failed_load(world, place, monkeypatch, caplog, of, way):
    """It went through the scheduler, which ends by it."""
    if (of, way) == ("msgspec", "tensors"):
        pytest.skip("no reference is replaced")

    def fail(*arguments, **options):
        raise OSError(24, "Too many open files")

    manager = world.installed()(max_lora_rank=64)
    adapter = builders.write_adapter(place / "in" / "one")
    with monkeypatch.context() as patch:
        for name in UNFORESEEN[of]:
            patch.setattr(name, fail)
        if way == "folder":
            result = manager.load_lora_adapter(world.ref("one", adapter))
        else:
            tensors = load_file(adapter / builders.WEIGHTS)
            values = json.loads((adapter / builders.CONFIG).read_text())
            result = manager.load_lora_adapter_from_tensors(
                world.ref("one", "__tensor__"), tensors, values
            )
    assert not result.success and manager.loras == {}
    assert result.error_message == "csulora refused one: OSError: [Errno 24] Too many open files"
    assert "one is not served" in caplog.text
    assert manager.load_lora_adapter(world.ref("one", adapter)).success


@pytest.mark.parametrize("name", list(sglang.EXPECTED)[1:3])
def test_a_hook_that_was_not_applied_ends_the_scheduler(world, place, name):
    """SGLang logs such a thing, and starts."""
    plain = getattr(world.manager.LoRAManager, name)
    manager = world.installed()
    setattr(manager, name, plain)
    with pytest.raises(SystemExit, match=f"its hook on .*{name} was not applied"):
        manager(max_lora_rank=8)


def test_a_module_that_does_not_import_ends_the_start(place, monkeypatch):
    stand_in.pretend(monkeypatch)
    for name in (sglang.MODULE, sglang.REGISTER.module):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(csulora.CsuloraError, match=f"cannot guard this server: {name}"):
                sglang.install()


def test_the_expected_signatures_are_those_of_its_own_class():
    pytest.importorskip("sglang.srt.plugins.hook_registry")
    functions = stand_in.real_functions()
    for name, expected in sglang.EXPECTED.items():
        assert tuple(arg.arg for arg in functions[name].args.args) == expected.parameters


def test_hooks_stay_applied_beside_those_of_others(place, monkeypatch):
    """SGLang applies all hooks of a function in one go, and replaced classes before them."""
    hooks = pytest.importorskip("sglang.srt.plugins.hook_registry")
    from sglang.srt.lora.lora_registry import LoRARef

    hooks.HookRegistry.reset()
    manager = stand_in.with_real_functions(monkeypatch)
    seen = []

    class Other(manager.LoRAManager):
        def _load_lora_adapter(self, lora_ref):
            seen.append(lora_ref.lora_path)
            return super()._load_lora_adapter(lora_ref)

    def around(original, *arguments):
        return original(*arguments)

    try:
        register, kinds = hooks.HookRegistry.register, hooks.HookType
        register(f"{sglang.MANAGER}._load_lora_adapter", around, kinds.AROUND)
        sglang.install()
        register(f"{sglang.MANAGER}._load_lora_adapter", around, kinds.AROUND)
        register(sglang.MANAGER, Other, kinds.REPLACE)
        hooks.HookRegistry.apply_hooks()
        adapter = builders.write_adapter(place / "in" / "one")
        found = manager.LoRAManager(max_lora_rank=8)
        assert isinstance(found, Other)
        ref = LoRARef(lora_id="id-one", lora_name="one", lora_path=str(adapter), pinned=False)
        assert found.load_lora_adapter(ref).success
        assert_corrected(found.loras["id-one"], adapter, place)
        assert all(str(place / "cache") in path for path in seen)
    finally:
        hooks.HookRegistry.reset()


def test_importing_the_module_imports_nothing_of_sglang():
    code = "import sys, csulora.integrations.sglang; print('sglang' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
