"""Runs that go on where an earlier one ended, on the same ground or on ground that changed."""

import json
import os
import shutil

import builders
import pytest
from builders import JOURNAL, REPORT, WEIGHTS, journal_lines, outcomes, run_correct

from csulora import LoraAdapter, folder
from csulora.batch import steps

# --- resuming -------------------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("this adapter was read again")


def test_resume_reads_nothing_that_is_finished(capsys, batch, monkeypatch):
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    before = builders.tree(out)
    for name in ("read", "identify"):
        monkeypatch.setattr(steps, name, never)
    monkeypatch.setattr(folder, "read_json", never)
    result = run_correct(capsys, source, *common, "--resume", "--json")
    assert result.code == 0
    assert set(outcomes(result).values()) == {("skipped", None)}
    assert builders.tree(out) == before
    # Skipped adapters count in the figures of the batch too.
    assert json.loads(result.out)["summary"]["spread"]["off"]["median"] > 0


def lose_journal(source, out):
    (out / JOURNAL).unlink()


def tear_last_line(source, out):
    data = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(data[: data.rstrip(b"\n").rindex(b"\n") + 40])


def garble_a_line(source, out):
    lines = (out / JOURNAL).read_bytes().split(b"\n")
    lines[1] = b"\x00\xff" * 10
    (out / JOURNAL).write_bytes(b"\n".join(lines))


def remove_output(source, out):
    shutil.rmtree(out / "t" / "a")


def change_weights(source, out):
    builders.write_adapter(source / "t" / "a", seed=99)


def change_config(source, out):
    builders.edit_json(source / "t" / "a" / builders.CONFIG, lora_alpha=3)


def touch_source(source, out):
    os.utime(source / "t" / "a" / WEIGHTS)


def remove_source_weights(source, out):
    (source / "t" / "a" / WEIGHTS).unlink()


def remove_report(source, out):
    (out / "t" / "a" / REPORT).unlink()


def replace_output(source, out):
    """The output is not what the journal says: made with other settings behind its back."""
    from csulora import Correction, SafetySubspace, correct

    subspace = SafetySubspace.load(out.parent / "subspace.safetensors")
    new, report = correct(LoraAdapter.load(source / "t" / "a"), subspace, Correction(lambda_off=3))
    new.save(out / "t" / "a", overwrite=True, report=report.to_dict())


MATRIX = {
    "nothing": (lambda source, out: None, ("skipped", None), ""),
    "journal-lost": (lose_journal, ("skipped", None), ""),
    "last-line-torn": (tear_last_line, ("skipped", None), ""),
    "line-garbled": (garble_a_line, ("skipped", None), ""),
    "output-removed": (remove_output, ("corrected", None), ""),
    "source-touched": (touch_source, ("skipped", None), ""),
    "weights-changed": (change_weights, ("failed", "changed"), "other source"),
    "config-changed": (change_config, ("failed", "changed"), "other source"),
    "source-vanished": (remove_source_weights, ("failed", "source"), "no such file"),
    "report-removed": (remove_report, ("failed", "exists"), "not an output of csulora"),
    "output-replaced": (replace_output, ("failed", "changed"), "other settings"),
}


@pytest.mark.parametrize("case", MATRIX)
def test_resume(case, capsys, batch):
    change, expected, word = MATRIX[case]
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    before = builders.tree(out)
    change(source, out)
    result = run_correct(capsys, source, *common, "--resume", "--json")
    found = outcomes(result)
    assert found.pop("a") == expected, result.err
    assert set(found.values()) == {("skipped", None)}
    assert result.code == (1 if expected[0] == "failed" else 0)
    assert word in "".join(result.complaints)
    if expected[0] != "failed":
        assert builders.tree(out) == before
        assert {line.get("output") for line in journal_lines(out)} == {None, "t/a", "t/b", "c"}


@pytest.mark.parametrize(
    "change",
    [
        ("--lambda-off", 3),
        ("--rank", "same"),
        ("--subspace-rank", 2),
        ("--portable",),
        ("--method", "realign"),
    ],
)
def test_resume_with_other_settings_mixes_nothing(change, capsys, batch):
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    shutil.rmtree(out / "t" / "a")
    before = builders.tree(out)
    result = run_correct(capsys, source, *common, "--resume", "--json", *change)
    assert result.code == 1
    found = outcomes(result)
    assert found == {
        "a": ("failed", "not started"),
        "b": ("failed", "changed"),
        "c": ("failed", "changed"),
    }
    assert builders.tree(out) == before


@pytest.mark.parametrize("journal", ["gone", "empty"])
def test_resume_mixes_nothing_where_the_journal_has_no_lines(journal, capsys, batch):
    """As a run that was killed in its first second leaves it."""
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    shutil.rmtree(out / "t" / "a")
    if journal == "gone":
        (out / JOURNAL).unlink()
    else:
        (out / JOURNAL).write_bytes(b"")
    before = builders.tree(out)
    result = run_correct(capsys, source, *common, "--resume", "--json", "--lambda-off", 3)
    assert outcomes(result)["a"] == ("failed", "not started")
    assert builders.tree(out) | before == before
    result = run_correct(capsys, source, *common, "--resume", "--json")
    assert outcomes(result) == {
        "a": ("corrected", None),
        "b": ("skipped", None),
        "c": ("skipped", None),
    }


@pytest.mark.parametrize("form", ["same", "exact"])
def test_a_batch_by_realignment(form, capsys, batch, subspace):
    """Made, recognised, verified from its source, and another strength is another result."""
    source, common, out = batch
    common = (*common, "--method", "realign", "--edge", "off", "--form", form)
    assert run_correct(capsys, source, *common).code == 0
    before = builders.tree(out)
    report = json.loads(before[f"c/{builders.REPORT}"])
    assert report["settings"]["method"] == "realign" and report["totals"]["relative_change"] > 0.01
    result = run_correct(capsys, source, *common, "--resume", "--json")
    assert set(outcomes(result).values()) == {("skipped", None)}
    given = ("verify", out, "--source", source, "--subspace", subspace)
    result = builders.run(capsys, *given)
    assert (result.code, result.out.count("as written (files, source, subspace, result)")) == (0, 3)
    result = run_correct(capsys, source, *common, "--overwrite", "--strength", 7)
    assert result.code == 0 and builders.tree(out) != before


def test_a_file_that_changed_a_moment_ago_is_looked_at_again(capsys, batch, monkeypatch):
    monkeypatch.setattr(steps, "SETTLED_NS", 3_600_000_000_000)
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    assert all(line["files"] is None for line in journal_lines(out)[1:])
    monkeypatch.setattr(steps, "identify", never)
    assert run_correct(capsys, source, *common, "--resume").code == 1


def test_the_journal_of_another_version(capsys, batch):
    source, common, out = batch
    out.mkdir()
    (out / JOURNAL).write_text('{"format": "csulora_journal/2"}\n')
    result = run_correct(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert "csulora_journal/1" in result.complaints[0]


def test_an_unreadable_source_fails_alone(capsys, batch, monkeypatch):
    source, common, _ = batch
    read = open

    def denied(path, *rest, **options):
        if str(path).endswith(f"t/a/{WEIGHTS}") and str(source) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest, **options)

    monkeypatch.setattr("builtins.open", denied)
    result = run_correct(capsys, source, *common, "--json")
    assert result.code == 1
    assert outcomes(result)["a"] == ("failed", "source")
    assert "Permission denied" in result.complaints[0]
    assert json.loads(result.out)["summary"]["corrected"] == 2


def test_a_source_that_vanishes_fails_alone_and_is_not_sought_elsewhere(
    batch, monkeypatch, tmp_path, subspace
):
    from pathlib import Path

    import huggingface_hub

    from csulora import SafetySubspace
    from csulora.batch import Call, find, stream

    monkeypatch.chdir(tmp_path)
    items = find(["in/c", "in/t"])
    shutil.rmtree("in/c")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    found = list(stream(items, SafetySubspace.load(subspace), Call(Path("out"))))
    assert [outcome.status for outcome in found] == ["failed", "corrected", "corrected"]
    assert (found[0].kind, found[0].error) == ("source", "in/c: no such folder any more")
