"""Damaged figures and names that are no text: one adapter's affair, and every result valid JSON."""

import json
import os

import builders
import pytest
import torch
from builders import JOURNAL, REPORT, outcomes, run_correct

import csulora
from csulora import CsuloraError

FIGURES = ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "-1e300", "NaN", "Infinity", "null", '"1"']
FIGURES += ["true", "[]", "{}"]


def strict(text):
    """JSON as every other program reads it."""

    def refuse(literal):
        raise AssertionError(literal)

    return json.loads(text, parse_constant=refuse)


def spoil_figure(text, key, figure):
    """The first value of that key, which ends at a comma or brace, replaced by another literal."""
    begin = text.index(f'"{key}":') + len(key) + 3
    end = min(text.index(mark, begin) for mark in ",}" if mark in text[begin:])
    return text[:begin] + figure + text[end:]


@pytest.mark.parametrize("key", ["relative_change", "energy_before"])
@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("place", ["journal", "report"])
def test_a_damaged_figure(capsys, batch, place, figure, key):
    source, common, out = batch
    assert run_correct(capsys, source, *common).code == 0
    if place == "journal":
        first, line, rest = (out / JOURNAL).read_text().split("\n", 2)
        name = os.path.basename(json.loads(line)["output"])
        (out / JOURNAL).write_text("\n".join([first, spoil_figure(line, key, figure), rest]))
    else:
        name = "a"
        (out / JOURNAL).unlink()
        path = out / "t" / "a" / REPORT
        path.write_text(spoil_figure(path.read_text(), key, f" {figure}"))
    for _ in range(2):
        result = run_correct(capsys, source, *common, "--resume", "--json")
        found = outcomes(result)
        strict(result.out)
        assert "unforeseen" not in result.err + result.out
        spoilt = found.pop(name)
        assert set(found.values()) == {("skipped", None)}
        # A line that counts for nothing leaves the word to the report.
        if place == "journal" or (key, figure) == ("energy_before", "-1e300"):
            assert spoilt == ("skipped", None), result.err
        else:
            assert spoilt[0] == "failed" and len(result.complaints) == 1, result.err
            assert REPORT in result.complaints[0] or "report" in result.complaints[0]


@pytest.mark.parametrize("share", [*FIGURES[:6], "null", '"0.5"', "true", "[1]"])
def test_a_damaged_share_in_a_subspace(tmp_path, adapter, out, capsys, share):
    file = builders.write_subspace(
        tmp_path / "bad", energy_share=f'{{"{builders.LAYERS[0]}": {share}}}'
    )
    result = run_correct(capsys, adapter, "--subspace", file, "--out-dir", out)
    if share == "-1e300":
        return  # a number, and nobody computes with it
    assert (result.code, len(result.complaints)) == (2, 1), result.err
    assert "bad: malformed metadata" in result.complaints[0]


# --- names ----------------------------------------------------------------------------------------

STRANGE = b"\xff\xe9t\xe9"  # no UTF-8


def test_names_that_are_no_utf_8(capsys, tmp_path, subspace):
    """Python stands in halves of surrogates for such bytes, which nothing can encode."""
    folder = builders.write_adapter(tmp_path / "in" / "plain")
    os.rename(os.fsencode(folder), os.fsencode(tmp_path / "in") + b"/" + STRANGE)
    place = os.fsencode(tmp_path / "in") + b"/" + STRANGE
    for name in (b"/n\xf6te", b"/adapter_model.\xf6"):
        with open(place + name, "wb") as file:
            file.write(b"text")
    builders.write_adapter(tmp_path / "in" / "good", seed=1)
    common = (tmp_path / "in", "--subspace", subspace)
    for i, option in enumerate(["--json", f"--page={tmp_path / 'page.html'}", None]):
        out = tmp_path / f"out{i}"
        rest = [option] if option else []
        first = run_correct(capsys, *common, "--out-dir", out, *rest)
        assert first.code == 0 and "unforeseen" not in first.err, first.err
        again = run_correct(capsys, *common, "--out-dir", out, "--resume", "--json")
        assert again.code == 0 and strict(again.out)["summary"]["skipped"] == 2
        made = os.fsencode(out) + b"/" + STRANGE
        assert sorted(os.listdir(made)) == sorted(
            [
                b"n\xf6te",
                b"README.md",
                *map(os.fsencode, (builders.CONFIG, builders.WEIGHTS, REPORT)),
            ]
        )
        with open(made + b"/" + os.fsencode(REPORT), encoding="utf-8") as file:
            report = strict(file.read())
        assert report["source"]["name"] == r"\udcff\udce9t\udce9"
        assert report["left_out"] == [r"adapter_model.\udcf6"]
    (tmp_path / "in" / "bad").mkdir()
    os.mkfifo(place + b"/p\xeepe")
    result = run_correct(capsys, *common, "--out-dir", tmp_path / "last")
    assert (result.code, len(result.complaints)) == (1, 1)
    assert result.complaints[0].isprintable() and "p\\udceepe" in result.complaints[0]


@pytest.mark.parametrize("target", ["circle", "nowhere"])
def test_a_link_that_leads_nowhere_is_not_sought_on_a_hub(
    capsys, tmp_path, subspace, monkeypatch, target
):
    monkeypatch.chdir(tmp_path)
    os.symlink(target, "circle")
    builders.write_adapter(tmp_path / "good")
    for arguments in (("circle", "good"), (tmp_path / "circle", tmp_path / "good")):
        result = run_correct(
            capsys, *arguments, "--subspace", subspace, "--out-dir", "out", "--overwrite"
        )
        assert (result.code, len(result.complaints)) == (1, 1)
        assert "circle: a link that leads nowhere" in result.complaints[0]
    assert builders.outputs(tmp_path / "out") == ["good"]


def test_a_checkpoint_whose_name_is_no_utf_8(capsys, tmp_path):
    base, aligned = builders.checkpoint_pair(tmp_path)
    place = os.fsdecode(os.fsencode(tmp_path) + b"/" + STRANGE)
    os.rename(base, place)
    out = tmp_path / "s"
    result = builders.run(capsys, "estimate", place, aligned, "--out", out)
    assert result.code == 0, result.err
    assert csulora.SafetySubspace.load(out).origin.base == r"\udcff\udce9t\udce9"


def test_tensors_in_memory_whose_names_are_no_text(adapter):
    loaded = csulora.LoraAdapter.load(adapter)
    tensors = loaded.tensors() | {"\ud800": torch.ones(1)}
    with pytest.raises(CsuloraError, match="no name in Unicode"):
        csulora.LoraAdapter.from_tensors(tensors, loaded.config, pass_through=True)


def test_a_subspace_in_memory_whose_names_are_no_text(tmp_path, adapter):
    made = builders.random_subspace(csulora.LoraAdapter.load(adapter))
    modules = {"\ud800": next(iter(made.modules.values()))}
    with pytest.raises(CsuloraError, match="not a name in Unicode"):
        csulora.SafetySubspace(modules, made.origin).save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
