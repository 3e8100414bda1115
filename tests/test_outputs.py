"""Outputs after they were written: what has changed is never taken for what was made."""

import json
import os
import shutil

import builders
import pytest
from builders import CONFIG, REPORT, WEIGHTS, run, run_correct
from safetensors import safe_open

import csulora
from csulora import ChangedError, Correction, CsuloraError, ExistsError, version
from csulora.batch import steps


@pytest.fixture(autouse=True)
def journal_counts(monkeypatch):
    """Files that changed a moment ago are looked at again; here the journal has its say at once."""
    monkeypatch.setattr(steps, "SETTLED_NS", 0)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def uncorrected(source, output):
    """The source's own weights, and a report that vouches for them."""
    shutil.copy(source / WEIGHTS, output / WEIGHTS)
    report = json.loads((output / REPORT).read_text())
    report["output"]["sha256"] = builders.digest(output / WEIGHTS)
    builders.write_json(output / REPORT, report)


DAMAGES = {
    "the uncorrected weights, vouched for": uncorrected,
    "a bit of the weights": lambda source, output: flip_a_bit(output / WEIGHTS),
    "weights emptied": lambda source, output: (output / WEIGHTS).write_bytes(b""),
    "weights cut short": lambda source, output: os.truncate(output / WEIGHTS, 900),
    "the uncorrected weights": lambda source, output: shutil.copy(
        source / WEIGHTS, output / WEIGHTS
    ),
    "weights of another": lambda source, output: shutil.copy(
        output.parent / "other" / WEIGHTS, output / WEIGHTS
    ),
    "no configuration": lambda source, output: (output / CONFIG).unlink(),
    "configuration of the source": lambda source, output: shutil.copy(
        source / CONFIG, output / CONFIG
    ),
    "another alpha": lambda source, output: builders.edit_json(output / CONFIG, lora_alpha=99),
    "report without digests": lambda source, output: builders.edit_json(
        output / REPORT, output=None
    ),
    "report emptied": lambda source, output: (output / REPORT).write_bytes(b""),
    "report of another": lambda source, output: shutil.copy(
        output.parent / "other" / REPORT, output / REPORT
    ),
}


@pytest.mark.parametrize("keeps_journal", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_is_not_finished(damage, keeps_journal, capsys, adapter, batch):
    out = adapter.parent.parent / "out"
    whole = builders.tree(out)
    DAMAGES[damage](adapter, out / "lora")
    if not keeps_journal:
        (out / builders.JOURNAL).unlink()
    result = run_correct(capsys, *batch, "--resume", "--json")
    outcomes = {o["adapter"].rpartition("/")[2]: o for o in json.loads(result.out)["adapters"]}
    assert (outcomes["lora"]["status"], outcomes["lora"]["kind"]) == ("failed", "changed")
    assert outcomes["other"]["status"] == "skipped"
    assert result.code == 1 and "lora" in result.complaints[0]
    verified = run(capsys, "verify", out)
    assert verified.code == 1 and len(verified.complaints) == 1
    assert run_correct(capsys, *batch, "--overwrite").code == 0
    assert builders.tree(out) == whole
    assert run(capsys, "verify", out).code == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_is_refreshed(damage, adapter, loaded, tmp_path):
    other = builders.write_adapter(tmp_path / "in" / "other", seed=1)
    out = tmp_path / "out"
    csulora.correct_folder(other, loaded, out / "other")
    csulora.correct_folder(adapter, loaded, out / "lora")
    whole = builders.tree(out)
    DAMAGES[damage](adapter, out / "lora")
    with pytest.raises(ChangedError):
        csulora.correct_folder(adapter, loaded, out / "lora", existing="resume")
    assert csulora.correct_folder(adapter, loaded, out / "lora").status == "corrected"
    assert builders.tree(out) == whole


def test_digests_and_mark_are_those_of_the_files(batch, adapter, subspace):
    output = adapter.parent.parent / "out" / "lora"
    report = json.loads((output / REPORT).read_text())
    assert report["output"] == {
        "sha256": builders.digest(output / WEIGHTS),
        "config_sha256": builders.digest(output / CONFIG),
    }
    assert report["made_by"] == {"version": csulora.__version__, "method": version.METHOD}
    with safe_open(output / WEIGHTS, framework="pt") as handle:
        mark = json.loads(handle.metadata()["csulora"])
    for key in ("made_by", "settings", "subspace", "source"):
        assert mark[key] == report[key]
    assert mark["source"]["sha256"] == builders.digest(adapter / WEIGHTS)
    assert mark["subspace"]["sha256"] == builders.digest(subspace)
    lines = (output.parent / builders.JOURNAL).read_text().splitlines()[1:]
    assert all(json.loads(line)["made_by"] == report["made_by"] for line in lines)


@pytest.mark.parametrize(("name", "value"), [("VERSION", "99.0"), ("METHOD", 99)])
@pytest.mark.parametrize("keeps_journal", [True, False])
def test_versions_are_not_mixed(capsys, batch, monkeypatch, adapter, name, value, keeps_journal):
    out = adapter.parent.parent / "out"
    if not keeps_journal:
        (out / builders.JOURNAL).unlink()
    monkeypatch.setitem(version.MADE_BY, name.lower(), value)
    shutil.rmtree(out / "other")
    result = run_correct(capsys, *batch, "--resume", "--json")
    found = {o["adapter"].rpartition("/")[2]: o for o in json.loads(result.out)["adapters"]}
    assert found["lora"]["kind"] == "changed" and "version" in found["lora"]["error"]
    if keeps_journal:
        assert found["other"]["kind"] == "not started" and "version" in found["other"]["error"]


# --- an output as a source ------------------------------------------------------------------------


def test_an_output_is_not_corrected_again_unless_asked_for(
    capsys, adapter, batch, loaded, tmp_path
):
    output = tmp_path / "out" / "lora"
    call = ("--subspace", batch[2], "--out-dir", tmp_path / "twice")
    result = run_correct(capsys, output, *call)
    assert result.code == 1 and not list((tmp_path / "twice").glob("*"))
    assert "'lora'" in result.complaints[0] and "--again" in result.complaints[0]
    (output / REPORT).unlink()  # the weights say so as well
    with pytest.raises(CsuloraError, match="already"):
        csulora.correct_folder(output, loaded, tmp_path / "api")
    assert run_correct(capsys, output, *call, "--again").code == 0
    with safe_open(tmp_path / "twice" / "lora" / WEIGHTS, framework="pt") as handle:
        mark = json.loads(handle.metadata()["csulora"])
    assert mark["before"]["source"]["sha256"] == builders.digest(adapter / WEIGHTS)
    warnings = json.loads((tmp_path / "twice" / "lora" / REPORT).read_text())["warnings"]
    assert any("corrected before" in line for line in warnings)
    # Looking at it is no correction.
    assert run(capsys, "inspect", output, "--subspace", batch[2]).code == 0
    # Uncorrected weights in the place of corrected ones are an adapter like any other.
    shutil.copy(adapter / WEIGHTS, output / WEIGHTS)
    shutil.copy(adapter / CONFIG, output / CONFIG)
    assert csulora.correct_folder(output, loaded, tmp_path / "api").status == "corrected"


def test_twice_in_memory_is_said(adapter, loaded):
    once, _ = csulora.correct(csulora.LoraAdapter.load(adapter), loaded)
    twice, report = csulora.correct(once, loaded, Correction(lambda_off=3))
    assert twice.made["before"] == once.made and "corrected before" in report.warnings[0]


MARKS = {
    "a source that is text": '{"settings": {}, "source": "x"}',
    "no source": '{"settings": {}, "source": null}',
    "beyond float64": '{"settings": {"lambda_off": 1e999}, "source": {}}',
    "nested deeply": '{"settings": {}, "source": ' + 500 * "[" + 500 * "]" + "}",
}


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_others_cost_no_output_its_own(mark, capsys, adapter, subspace, tmp_path):
    tensors = builders.load_file(adapter / WEIGHTS)
    builders.save_file(tensors, adapter / WEIGHTS, {"format": "pt", "csulora": MARKS[mark]})
    call = ("--subspace", subspace, "--out-dir")
    first = run_correct(capsys, adapter, *call, tmp_path / "out")
    assert first.code == 0 or "corrected by csulora already" in first.complaints[0]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert run_correct(capsys, adapter, *call, tmp_path / "out", "--again").code == 0
    with safe_open(tmp_path / "out" / "lora" / WEIGHTS, framework="pt") as handle:
        assert "Infinity" not in handle.metadata()["csulora"]
    again = run_correct(capsys, tmp_path / "out" / "lora", *call, tmp_path / "twice")
    assert again.code == 1 and "already" in again.complaints[0]
    assert run(capsys, "verify", tmp_path / "out").code == 0


# --- folders of others ----------------------------------------------------------------------------


def folder_of(kind, path, adapter):
    """What csulora did not write."""
    path.mkdir()
    if "thesis" in kind:
        (path / "thesis.tex").write_text("mine")
    if kind == "thesis with a report":  # a copy, kept as evidence
        (path / REPORT).write_text('{"format": "csulora_report/1"}')
    if "adapter" in kind:  # of PEFT's, perhaps the only copy
        shutil.copytree(adapter, path, dirs_exist_ok=True)
    if kind == "adapter with a report of others":
        (path / REPORT).write_text("{}")
    return path


@pytest.mark.parametrize(
    "kind",
    ["thesis", "adapter", "thesis with a report", "adapter with a report of others"],
)
def test_folders_of_others_are_never_replaced(kind, capsys, adapter, subspace, loaded, tmp_path):
    place = folder_of(kind, tmp_path / "lora", adapter)
    before = builders.tree(place)
    new, _ = csulora.correct(csulora.LoraAdapter.load(adapter), loaded)
    with pytest.raises(ExistsError, match="did not write"):
        new.save(place, overwrite=True)
    for existing in ("overwrite", "refresh", "resume", "refuse"):
        with pytest.raises((ExistsError, ChangedError)):
            csulora.correct_folder(adapter, loaded, place, existing=existing)
    call = (adapter, "--subspace", subspace, "--out-dir", tmp_path)
    for option in ("--overwrite", "--resume"):
        result = run_correct(capsys, *call, option)
        assert result.code == 1 and len(result.complaints) == 1
        assert "--overwrite" not in result.complaints[0]  # which would not help
    assert builders.tree(place) == before


def test_what_was_trained_on_in_place_is_never_replaced(capsys, adapter, batch, loaded, tmp_path):
    output = tmp_path / "out" / "lora"
    builders.edit_tensors(output / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    before = builders.tree(output)
    for existing in ("refresh", "overwrite"):
        with pytest.raises(ExistsError, match="did not write"):
            csulora.correct_folder(adapter, loaded, output, existing=existing)
    assert run_correct(capsys, *batch, "--overwrite").code == 1
    assert builders.tree(output) == before


def test_what_csulora_wrote_is_replaced_even_without_a_report(adapter, loaded, out):
    adapter = csulora.LoraAdapter.load(adapter)
    adapter.save(out)
    csulora.correct(adapter, loaded)[0].save(out, overwrite=True)
    assert csulora.LoraAdapter.load(out).source.corrected


# --- the model it was trained on ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "known"),
    [
        ("base", True),
        ("/data/models/aligned/", True),
        ("Mirror/BASE", True),
        ("hub/models--org--base/snapshots/0123abcd", True),
        ("", True),
        (None, True),
        ("org/other", False),
        ("org/base-2", False),
        ("aligned/other", False),
        ("hub/models--org--other/snapshots/base", False),
    ],
)
def test_an_adapter_of_another_model(stated, known, capsys, adapter, subspace, loaded, tmp_path):
    builders.edit_json(adapter / CONFIG, base_model_name_or_path=stated)
    call = (adapter, "--subspace", subspace, "--out-dir")
    result = run_correct(capsys, *call, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "lora" / REPORT).read_text())["warnings"]
    assert result.code == 0 and len(written) == len(result.warnings) == (0 if known else 1)
    if not known:
        assert all(name in written[0] for name in (stated, "base", "aligned"))
    strict = run_correct(capsys, *call, tmp_path / "strict", "--strict-base")
    assert strict.code == (0 if known else 1) == len(strict.complaints)
    # What was let through is not what is asked for now.
    resumed = run_correct(capsys, *call, tmp_path / "out", "--strict-base", "--resume")
    assert resumed.code == (0 if known else 1)
    for options in ({"existing": "resume"}, {"existing": "refresh"}):
        if not known:
            with pytest.raises(CsuloraError, match="was trained on"):
                csulora.correct_folder(
                    adapter, loaded, tmp_path / "out" / "lora", strict_base=True, **options
                )
