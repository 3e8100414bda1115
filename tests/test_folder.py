"""One folder to one folder: made, made anew, recognised; and asked for by many at once."""

import json
import os

import builders
import pytest
from builders import CONFIG, REPORT, WEIGHTS, change_weights, names

import csulora
from csulora import ChangedError, Correction, CsuloraError, ExistsError, UsageError, folder


def test_a_fresh_target_is_what_the_batch_writes(capsys, adapter, subspace, loaded, tmp_path):
    outcome = csulora.correct_folder(adapter, loaded, tmp_path / "one" / "deep" / "lora")
    assert (outcome.status, outcome.adapter) == ("corrected", str(adapter))
    assert outcome.output == tmp_path / "one" / "deep" / "lora"
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", tmp_path / "two")
    assert builders.run(capsys, *arguments).code == 0
    assert builders.tree(outcome.output) == builders.tree(tmp_path / "two" / "lora")
    assert names(outcome.output.parent) == ["lora"]  # no journal, no lock, nothing temporary
    written = json.loads((outcome.output / REPORT).read_text())
    assert outcome.report == csulora.Report.from_dict(written)
    assert outcome.totals == outcome.report.totals and outcome.report.modules
    assert outcome.bytes_out == (outcome.output / WEIGHTS).stat().st_size > outcome.bytes_in


def test_what_is_up_to_date_is_recognised_and_not_touched(adapter, loaded, out, monkeypatch):
    first = csulora.correct_folder(adapter, loaded, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(folder, "correct_batch", None)  # nothing is computed
    for existing in ("refresh", "resume"):
        again = csulora.correct_folder(adapter, loaded, out, existing=existing)
        assert again.status == "skipped" and again.report == first.report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def change_config(adapter):
    builders.edit_json(adapter / CONFIG, lora_alpha=3)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (change_weights, "source"),
        (change_config, "source"),
        (lambda adapter: {"correction": Correction(lambda_off=99)}, "settings"),
        (lambda adapter: {"correction": Correction(form="same")}, "settings"),
        (lambda adapter: {"portable": True}, "settings"),
    ],
)
def test_a_changed_source_or_setting_refreshes(adapter, loaded, out, tmp_path, change, word):
    csulora.correct_folder(adapter, loaded, out)
    options = change(adapter) or {}
    with pytest.raises(ChangedError, match=f"made with other {word}"):
        csulora.correct_folder(adapter, loaded, out, existing="resume", **options)
    outcome = csulora.correct_folder(adapter, loaded, out, **options)
    assert outcome.status == "corrected"
    csulora.correct_folder(adapter, loaded, tmp_path / "fresh", **options)
    assert builders.tree(out) == builders.tree(tmp_path / "fresh")


def test_another_subspace_refreshes(adapter, loaded, out, tmp_path):
    csulora.correct_folder(adapter, loaded, out)
    other = builders.write_subspace(tmp_path / "o", builders.subspace_tensors(seed=1))
    outcome = csulora.correct_folder(adapter, csulora.SafetySubspace.load(other), out)
    assert outcome.status == "corrected"
    assert outcome.report.subspace["sha256"] == builders.digest(other)


def test_refuse_overwrite_and_folders_of_others(adapter, loaded, out):
    csulora.correct_folder(adapter, loaded, out, existing="refuse")
    with pytest.raises(ExistsError, match=r"already exists$"):
        csulora.correct_folder(adapter, loaded, out, existing="refuse")
    assert csulora.correct_folder(adapter, loaded, out, existing="overwrite").status == "corrected"
    (out / REPORT).unlink()
    for existing in ("refresh", "resume"):
        with pytest.raises(ExistsError, match=r"not an output of csulora$"):
            csulora.correct_folder(adapter, loaded, out, existing=existing)
    with pytest.raises(UsageError, match="existing must be one of"):
        csulora.correct_folder(adapter, loaded, out, existing="never")


def test_an_output_with_uncorrected_tensors_is_not_what_was_asked_for(adapter, loaded, out):
    builders.edit_tensors(
        adapter / WEIGHTS, lambda tensors: tensors.update(odd=tensors[min(tensors)].clone())
    )
    assert csulora.correct_folder(adapter, loaded, out, pass_through=True).status == "corrected"
    assert csulora.correct_folder(adapter, loaded, out, pass_through=True).status == "skipped"
    before = builders.tree(out)
    with pytest.raises(CsuloraError, match="odd"):
        csulora.correct_folder(adapter, loaded, out)
    assert builders.tree(out) == before


def test_a_bad_source_writes_nothing_and_keeps_what_is_there(adapter, loaded, out):
    csulora.correct_folder(adapter, loaded, out)
    before = builders.tree(out)
    (adapter / WEIGHTS).write_bytes(b"\xff" * 40)
    with pytest.raises(CsuloraError, match="safetensors"):
        csulora.correct_folder(adapter, loaded, out)
    assert builders.tree(out) == before and names(out.parent) == sorted(
        ["in", "out", "subspace.safetensors"]
    )
    with pytest.raises(CsuloraError, match="no such folder"):
        csulora.correct_folder(adapter.parent / "gone", loaded, out)


@pytest.mark.parametrize("where", ["in/lora/out", "in", "in/lora"])
def test_a_target_in_the_way_of_its_source(adapter, loaded, tmp_path, where):
    before = builders.tree(tmp_path)
    with pytest.raises(CsuloraError, match="lies inside the adapter"):
        csulora.correct_folder(adapter, loaded, tmp_path / where)
    assert builders.tree(tmp_path) == before


def test_a_target_that_cannot_be_written(adapter, loaded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CsuloraError, match="cannot be written"):
        csulora.correct_folder(adapter, loaded, tmp_path / "file" / "out")


def test_without_fsync_and_other_files_for_caches(adapter, loaded, out, tmp_path, monkeypatch):
    csulora.correct_folder(adapter, loaded, tmp_path / "durable")
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("fsync"))
    outcome = csulora.correct_folder(adapter, loaded, out, durable=False, companions=False)
    assert names(out) == [CONFIG, WEIGHTS, REPORT]
    for name in (CONFIG, WEIGHTS):
        assert (out / name).read_bytes() == (tmp_path / "durable" / name).read_bytes()
    assert outcome.steps.keys() == {"read", "correct", "write"}
    assert sum(outcome.steps.values()) == pytest.approx(outcome.seconds)
    assert csulora.correct_folder(adapter, loaded, tmp_path / "o", durable=False).output.is_dir()


def test_an_adapter_in_memory_is_not_read_again(adapter, loaded, out, tmp_path, monkeypatch):
    expected = csulora.correct_folder(adapter, loaded, tmp_path / "read")
    read = csulora.LoraAdapter.load(adapter, pass_through=True)
    monkeypatch.setattr(folder, "identify", None)
    monkeypatch.setattr(csulora.LoraAdapter, "load", None)
    outcome = csulora.correct_folder(read, loaded, out)
    assert builders.tree(out) == builders.tree(tmp_path / "read")
    assert outcome.report == expected.report
    assert csulora.correct_folder(read, loaded, out).status == "skipped"


def test_adapters_in_memory_that_do_not_do(adapter, loaded, out):
    read = csulora.LoraAdapter.load(adapter)
    plain = csulora.LoraAdapter.from_tensors(read.tensors(), read.config)
    with pytest.raises(UsageError, match="lies in no folder"):
        csulora.correct_folder(plain, loaded, out)
    builders.edit_tensors(
        adapter / WEIGHTS, lambda tensors: tensors.update(odd=tensors[min(tensors)].clone())
    )
    read = csulora.LoraAdapter.load(adapter, pass_through=True)
    with pytest.raises(CsuloraError, match="not LoRA updates on linear weights: odd"):
        csulora.correct_folder(read, loaded, out)
    assert not out.exists()
