"""`csulora verify`: what is still as it was written, and what is what it was made of."""

import json
import os
import shutil

import builders
import oracle
import pytest
import torch
from builders import CONFIG, REPORT, WEIGHTS, run
from safetensors import safe_open

import csulora
from csulora import Correction


def test_verify_computes_it_anew(capsys, adapter, batch, subspace, tmp_path):
    out = tmp_path / "out"
    given = ("--source", tmp_path / "in", "--subspace", subspace)
    result = run(capsys, "verify", out, *given, "--json")
    found = json.loads(result.out)
    assert result.code == 0 and found["format"] == "csulora_verify/1"
    assert [one["folder"] for one in found["folders"]] == [str(out / "lora"), str(out / "other")]
    assert all(
        one["checked"] == ["files", "source", "subspace", "result"] and one["ok"]
        for one in found["folders"]
    )
    one = run(capsys, "verify", out / "lora", "--source", adapter, "--subspace", subspace)
    assert one.code == 0 and "as written (files, source, subspace, result)" in one.out


def forged(output, factor):
    """Weights changed together with everything that speaks of them, as only the result can tell."""
    with safe_open(output / WEIGHTS, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name] = tensors[name] * factor
    builders.save_file(tensors, output / WEIGHTS, metadata)
    report = json.loads((output / REPORT).read_text())
    report["output"]["sha256"] = builders.digest(output / WEIGHTS)
    builders.write_json(output / REPORT, report)
    return name.removesuffix(".lora_B.weight").removeprefix(builders.PREFIX)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("settings", "dtype", "load"),
        ("settings", "dtype", "float99"),
        ("settings", "dtype", []),
        ("settings", "granularity", "other"),
        ("subspace", "rank", "x"),
        ("subspace", "rank", 9999),
    ],
)
def test_settings_that_nobody_writes_are_a_problem_of_that_output(
    part, name, value, capsys, batch, subspace, tmp_path
):
    output = tmp_path / "out" / "lora"
    with safe_open(output / WEIGHTS, framework="pt") as handle:
        mark = json.loads(handle.metadata()["csulora"])
    report = json.loads((output / REPORT).read_text())
    for stated in (mark, report):
        stated[part][name] = value
    metadata = {"format": "pt", "csulora": json.dumps(mark)}
    builders.save_file(builders.load_file(output / WEIGHTS), output / WEIGHTS, metadata)
    report["output"]["sha256"] = builders.digest(output / WEIGHTS)
    builders.write_json(output / REPORT, report)
    given = ("--source", tmp_path / "in", "--subspace", subspace)
    result = run(capsys, "verify", tmp_path / "out", *given)
    assert result.code == 1 and "1 as written, 1 not" in result.out
    assert str(output) in result.complaints[0] and "settings" in result.complaints[0]


@pytest.mark.parametrize("key", ["made_by", "settings", "subspace", "source"])
def test_verify_compares_the_report_with_the_mark(key, batch, tmp_path):
    output = tmp_path / "out" / "lora"
    report = json.loads((output / REPORT).read_text())
    first = next(iter(report[key]))
    builders.edit_json(output / REPORT, **{key: report[key] | {first: "9"}})
    (problem,) = csulora.verify(output).problems
    assert "name different" in problem


@pytest.mark.parametrize("form", ["exact", "same"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("portable", [False, True])
def test_verify_sees_what_only_the_result_tells(
    form, dtype, portable, adapter, loaded, capsys, tmp_path
):
    output = tmp_path / "out"
    options = {"dtype": None if dtype == "keep" else torch.bfloat16, "portable": portable}
    csulora.correct_folder(adapter, loaded, output, Correction(form=form), **options)
    assert csulora.verify(output, source=adapter, subspace=loaded).ok
    name = forged(output, 1.05)
    assert csulora.verify(output).ok
    (problem,) = csulora.verify(output, source=adapter, subspace=loaded).problems
    assert name in problem


def test_verify_sees_figures_that_are_not_those_of_the_result(adapter, loaded, tmp_path):
    output = tmp_path / "out"
    csulora.correct_folder(adapter, loaded, output)
    written = (output / REPORT).read_text()
    for change in (
        lambda report: report["totals"].update(relative_change=0.0),
        lambda report: report.update(modules={}),
        lambda report: report.update(passed_through=["a"]),
        lambda report: [module.update(energy_after=0) for module in report["modules"].values()],
    ):
        report = json.loads(written)
        change(report)
        builders.write_json(output / REPORT, report)
        (problem,) = csulora.verify(output, source=adapter, subspace=loaded).problems
        assert REPORT in problem
    report = json.loads(written)
    report["made_by"]["version"] = "0.0.0"
    builders.write_json(output / REPORT, report)
    (problem,) = csulora.verify(output).problems
    assert "version" in problem


def with_tensors(output, new):
    """Further or other tensors, and a report that vouches for them."""
    with safe_open(output / WEIGHTS, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    builders.save_file(tensors | new(tensors), output / WEIGHTS, metadata)
    report = json.loads((output / REPORT).read_text())
    report["output"]["sha256"] = builders.digest(output / WEIGHTS)
    report["passed_through"] = [name for name in new(tensors) if "lora" not in name]
    builders.write_json(output / REPORT, report)


def test_verify_sees_tensors_that_the_source_does_not_have(adapter, loaded, tmp_path):
    output = tmp_path / "out"
    csulora.correct_folder(adapter, loaded, output)
    with_tensors(output, lambda tensors: {"base_model.model.model.norm.weight": torch.ones(3)})
    problems = csulora.verify(output, source=adapter, subspace=loaded).problems
    assert any("passed-through" in problem for problem in problems)


def test_verify_of_one_with_other_shapes_goes_on_to_the_next(capsys, batch, tmp_path, subspace):
    def narrower(tensors):
        name = next(name for name in tensors if name.endswith("lora_A.weight"))
        return {name: tensors[name][:, 1:].contiguous()}

    with_tensors(tmp_path / "out" / "lora", narrower)
    given = ("--source", tmp_path / "in", "--subspace", subspace)
    result = run(capsys, "verify", tmp_path / "out", *given)
    assert result.code == 1 and len(result.complaints) == 1, result.err
    assert "modules" in result.complaints[0] and "1 as written, 1 not" in result.out


def test_verify_by_the_oracle(adapter, subspace, loaded, tmp_path):
    """What it calls right is what the dense definition gives, and what it calls wrong is not."""
    output = tmp_path / "out"
    csulora.correct_folder(adapter, loaded, output)
    bases = builders.subspace_tensors()
    wanted = {
        name: oracle.correct(
            dW, bases[f"{name}.U"], bases[f"{name}.V"], (0, 10, 10, 10), "direction"
        )
        for name, dW in builders.effective(adapter).items()
    }
    for factor, right in ((1, True), (1 + 1e-3, False)):
        forged(output, factor)
        found = builders.effective(output)
        close = all(oracle_distance(found[n], wanted[n]) < 1e-5 for n in wanted)
        assert close is right is csulora.verify(output, source=adapter, subspace=loaded).ok


def oracle_distance(found, wanted):
    return float((found - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda t: builders.edit_json(t / "in" / "lora" / CONFIG, r=4, lora_alpha=3),
            "another adapter",
        ),
        (lambda t: shutil.rmtree(t / "in" / "lora"), "no such"),
        (
            lambda t: builders.write_subspace(t / "subspace.safetensors", seed="1"),
            "another subspace",
        ),
        (lambda t: (t / "out" / "lora" / REPORT).unlink(), "not an output"),
        (lambda t: shutil.copytree(t / "in" / "lora", t / "out" / "raw"), "not an output"),
    ],
)
def test_verify_names_what_does_not_belong(change, word, capsys, batch, tmp_path, subspace):
    change(tmp_path)
    given = ("--source", tmp_path / "in", "--subspace", subspace)
    result = run(capsys, "verify", tmp_path / "out", *given)
    assert result.code == 1 and result.complaints
    assert all(word in line for line in result.complaints)


@pytest.mark.parametrize("name", ["lora.safetensors", "adapter_model_raw.bin", "lora.gguf"])
def test_verify_names_other_weights_in_an_output(name, adapter, loaded, out):
    """Some servers read every file of safetensors in a folder."""
    csulora.correct_folder(adapter, loaded, out)
    (out / "notes.txt").write_text("mine")
    assert not csulora.verify(out).problems
    (out / name).write_bytes((adapter / WEIGHTS).read_bytes())
    for given in ({}, {"source": adapter, "subspace": loaded}):
        (problem,) = csulora.verify(out, **given).problems
        assert name in problem and "did not write" in problem


def test_verify_looks_behind_links_and_names_what_has_no_output(capsys, batch, tmp_path, subspace):
    """A server follows a link: to the raw adapter in place of an output, say."""
    given = ("--source", tmp_path / "in", "--subspace", subspace)
    shutil.rmtree(tmp_path / "out" / "other")
    result = run(capsys, "verify", tmp_path / "out", *given)
    assert result.code == 0 and str(tmp_path / "in" / "other") in result.warnings[0]
    (tmp_path / "out" / "other").symlink_to(tmp_path / "in" / "other")
    result = run(capsys, "verify", tmp_path / "out", *given)
    (complaint,) = result.complaints
    assert result.code == 1 and "other: not an output" in complaint and not result.warnings


def test_verify_finds_outputs_however_deep(capsys, adapter, loaded, tmp_path):
    """Deeper than Python's stack, and not what is hidden."""
    csulora.correct_folder(adapter, loaded, tmp_path / "made")
    csulora.correct_folder(adapter, loaded, tmp_path / "tree" / "a")
    (tmp_path / "tree" / ".hidden").mkdir()
    shutil.copytree(tmp_path / "made", tmp_path / "tree" / ".hidden" / "b")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "made")
    levels = [tmp_path / "tree" / "d"]
    while len(levels) < 1_100:
        levels.append(levels[-1] / "d")
    for level in levels:  # `mkdir(parents=True)` goes no deeper than the stack
        level.mkdir()
    deep = levels[-1]
    os.rename(tmp_path / "made", deep / "c")
    result = run(capsys, "verify", tmp_path / "tree", "--json")
    os.rename(deep / "c", tmp_path / "made")  # cleaning up goes no deeper either
    for level in reversed(levels):
        level.rmdir()
    found = json.loads(result.out)
    assert [one["folder"] for one in found["folders"]] == [
        str(tmp_path / "tree" / "a"),
        str(deep / "c"),
    ]


@pytest.mark.parametrize("call", [["nowhere"], ["empty"], []])
def test_verify_of_nothing(call, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run(capsys, "verify", *call).code == 2
