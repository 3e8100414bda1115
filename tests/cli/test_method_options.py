"""`--strength-for` and `--budget`: what they write, what is recognised later, what is refused."""

import json

import builders
import pytest
import torch
from builders import LAYERS, REPORT, WEIGHTS, run
from safetensors.torch import load_file

import csulora
from csulora.batch import steps

Q, DOWN = LAYERS


def report_of(folder):
    return json.loads((folder / REPORT).read_text())


@pytest.fixture
def call(adapter, subspace, out):
    return ("correct", adapter, "--subspace", subspace, "--out-dir", out)


@pytest.mark.parametrize("method", ["csulora", "realign"])
def test_strengths_of_single_modules(method, call, capsys, adapter, out):
    options = ("--strength-for", "*=5", "--strength-for", "self_attn.*=0")
    options = ("--method", method, *options, "--strength-for", "down_proj=drop")
    assert run(capsys, *call, *options).code == 0
    report = report_of(out / adapter.name)
    patterns = {"*": 5.0, "self_attn.*": 0.0, "down_proj": "drop"}
    assert list(report["settings"]["strength_for"].items()) == list(patterns.items())
    assert report["strength"] is None and "budget" not in report["settings"]
    before, after = (builders.effective(folder) for folder in (adapter, out / adapter.name))
    assert torch.equal(before[Q], after[Q]) and not bool(after[DOWN].any())
    assert report["modules"][DOWN]["relative_change"] == 1
    A, B = (load_file(out / adapter.name / WEIGHTS)[name] for name in builders.lora_names(DOWN))
    assert not bool(A.any()) and not bool(B.any()) and A.shape[0] == 4


def test_a_pattern_given_again_counts_from_there(call, capsys, adapter, out):
    given = ("q_proj=1", "*=2", "q_proj=inf")
    assert run(capsys, *call, *(x for text in given for x in ("--strength-for", text))).code == 0
    report = report_of(out / adapter.name)
    assert list(report["settings"]["strength_for"].items()) == [("*", 2.0), ("q_proj", "inf")]


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (("--budget", "change=0.2"), {"change": 0.2}),
        (("--budget", "off=0.2", "--form", "same"), {"off": 0.2}),
        (("--budget", "change=0.2", "--lambda-aligned", "0.1"), {"change": 0.2}),
        (("--budget", "change=0.2", "--method", "realign", "--edge", "off"), {"change": 0.2}),
    ],
)
def test_a_budget(options, budget, call, capsys, adapter, out, subspace):
    result = run(capsys, *call, *options)
    assert result.code == 0 and not result.warnings
    report = report_of(out / adapter.name)
    ((kind, limit),) = budget.items()
    totals = report["totals"]
    reached = totals["relative_energy_after"]["off"] if kind == "off" else totals["relative_change"]
    assert reached == pytest.approx(limit, abs=1e-6)
    assert report["settings"]["budget"] == budget
    assert f"strength {report['strength']:g}" in result.out
    verified = run(
        capsys, "verify", out / adapter.name, "--source", adapter, "--subspace", subspace
    )
    assert verified.code == 0, verified.out
    listed = run(capsys, *call, *options, "--overwrite", "--json")
    assert json.loads(listed.out)["adapters"][0]["strength"] == report["strength"]


def test_a_budget_beyond_reach_is_a_warning(call, capsys, adapter, out):
    result = run(capsys, *call, "--budget", "change=3", "--json")
    assert result.code == 0 and "change=3 is beyond reach" in result.warnings[0]
    assert json.loads(result.out)["adapters"][0]["strength"] == "inf"
    assert report_of(out / adapter.name)["strength"] == "inf"


def test_verify_sees_another_strength_in_the_report(call, capsys, adapter, out, subspace):
    assert run(capsys, *call, "--budget", "change=0.2").code == 0
    folder = out / adapter.name
    builders.edit_json(folder / REPORT, strength=2 * report_of(folder)["strength"])
    found = csulora.verify(folder, source=adapter, subspace=csulora.SafetySubspace.load(subspace))
    assert found.problems == (f"{REPORT} does not say what the correction does",)


def test_what_fits_one_adapter_alone_fails_the_other_alone(call, capsys, adapter, out, tmp_path):
    other = builders.write_adapter(tmp_path / "in" / "other", shapes={Q: builders.SHAPES[Q]})
    result = run(capsys, call[0], other, *call[1:], "--strength-for", "down_proj=0")
    assert result.code == 1 and builders.outputs(out) == [adapter.name]
    (complaint,) = result.complaints
    assert "other: no module matches strength_for down_proj" in complaint and Q in complaint


@pytest.mark.parametrize("keeps_journal", [True, False])
def test_resume_knows_patterns_by_their_order_too(
    keeps_journal, call, capsys, adapter, out, monkeypatch
):
    monkeypatch.setattr(steps, "SETTLED_NS", 0)
    one, two = ("--strength-for", "self_attn.*=5"), ("--strength-for", "q_proj=0")
    assert run(capsys, *call, *one, *two).code == 0
    if not keeps_journal:
        (out / builders.JOURNAL).unlink()
    again = run(capsys, *call, *one, *two, "--resume", "--json")
    assert builders.outcomes(again) == {adapter.name: ("skipped", None)}
    for options in ((*two, *one), one, (*one, *two, "--budget", "change=0.1")):
        other = run(capsys, *call, *options, "--resume", "--json")
        assert builders.outcomes(other) == {adapter.name: ("failed", "changed")}
    loaded = csulora.SafetySubspace.load(call[3])
    target = out / adapter.name
    same = csulora.Correction(strength_for={"self_attn.*": 5, "q_proj": 0})
    assert csulora.correct_folder(adapter, loaded, target, same).status == "skipped"
    turned = csulora.Correction(strength_for={"q_proj": 0, "self_attn.*": 5})
    assert csulora.correct_folder(adapter, loaded, target, turned).status == "corrected"


def test_report_and_mark_with_patterns_in_another_order_contradict(call, capsys, adapter, out):
    assert run(capsys, *call, "--strength-for", "*=5", "--strength-for", "q_proj=0").code == 0
    folder = out / adapter.name
    settings = report_of(folder)["settings"]
    settings["strength_for"] = dict(reversed(settings["strength_for"].items()))
    builders.edit_json(folder / REPORT, settings=settings)
    assert csulora.verify(folder).problems == (f"{WEIGHTS} and the report name different settings",)


@pytest.mark.parametrize("method", ["csulora", "realign"])
def test_inspect_shows_what_they_would_do(method, capsys, adapter, subspace, tmp_path):
    options = ("--method", method, "--budget", "change=0.1", "--strength-for", "q_proj=0")
    call = ("inspect", adapter, "--subspace", subspace, *options)
    result = run(capsys, *call, "--plot", tmp_path / "shares.png")
    assert result.code == 0 and (tmp_path / "shares.png").exists()
    report = json.loads(run(capsys, *call, "--json").out)
    assert report["modules"][Q]["relative_change"] == 0
    assert report["totals"]["relative_change"] == pytest.approx(0.1, abs=1e-6)
    assert "a budget of change 0.1, " in result.out and "; q_proj at 0: strength" in result.out
    assert f"strength {report['strength']:g}" in result.out
