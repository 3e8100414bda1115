"""What a report warns of reaches the audit log, and the commands that fill or ask the cache."""

import json

import builders
import pytest
from builders import WEIGHTS

import csulora
from csulora.serving import config
from csulora.serving.guard import Guard

OTHER = {"base_model_name_or_path": "mistralai/Mistral-7B-v0.3"}


def last(place):
    return place.decisions()[-1]


@pytest.mark.parametrize("mode", ["correct", "observe"])
def test_an_adapter_of_another_model(place, mode):
    folder, plain = place.adapter(**OTHER), place.adapter("plain", seed=1)
    g = place.guard(mode=mode)
    found = g.admit(folder, "one")
    (warning,) = last(place)["warnings"]
    assert "was trained on mistralai/Mistral-7B-v0.3" in warning
    g.admit(plain, "plain")
    assert "warnings" not in last(place)
    if mode == "correct":
        assert found.warnings == (warning,) and g.admit(folder, "one").warnings == (warning,)
        g = place.guard(mode="require")  # another process, which has the record
        assert g.admit(folder, "one").how == "hit" and last(place)["warnings"] == [warning]
        assert g.admit(found.path, "one").warnings == (warning,)
        (found.path / WEIGHTS).write_bytes(b"x")
        assert g.admit(folder, "one").how == "repaired" and last(place)["warnings"] == [warning]


def test_a_budget_that_is_kept_by_doing_nothing(place):
    folder = place.adapter()
    place.file.write_text(place.file.read_text() + "[settings.budget]\noff = 1.0\n")
    g = Guard(config.load(place.file))
    g.open()
    assert g.admit(folder, "one").warnings and "strength" in " ".join(last(place)["warnings"])


def test_a_folder_that_is_recomputed(place):
    source = place.adapter(**OTHER)
    subspace = csulora.SafetySubspace.load(place.root / "subspace.safetensors")
    csulora.correct_folder(source, subspace, place.root / "fixed", portable=True)
    found = place.guard().admit(place.root / "fixed", "fixed")
    assert found.how == "recomputed" and "was trained on" in found.warnings[0]


def test_an_adapter_of_tensors(place):
    adapter, g = csulora.LoraAdapter.load(place.adapter(**OTHER)), place.guard()
    g.admit_tensors(adapter.tensors(), adapter.written_config(), "one")
    assert "was trained on" in last(place)["warnings"][0]


def test_a_name_of_any_length_makes_no_long_line(place):
    found = place.guard().admit(place.adapter(base_model_name_or_path="x" * 9999), "one")
    assert [len(text) for text in found.warnings] == [500]


def test_the_commands_say_it(capsys, place):
    folder = place.adapter(**OTHER)
    place.adapter("plain", seed=1)
    found = {}
    for command in ("serve-check", "prewarm", "prewarm"):
        call = (command, "--config", place.file)
        result = builders.run(capsys, *call, "--json")
        (line,) = [line for line in result.err.splitlines() if "warning" in line]
        assert line.startswith(f"csulora: warning: {folder}: the adapter was trained on")
        assert result.code == 0
        for entry in json.loads(result.out)["adapters"]:
            name = entry.get("folder", entry.get("adapter"))
            found.setdefault(name, []).append(entry["warnings"])
    assert found == {
        str(folder): [[line.partition(f"{folder}: ")[2]]] * 3,
        str(place.adapters / "plain"): [[]] * 3,
    }
