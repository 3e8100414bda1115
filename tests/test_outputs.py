"""Outputs after they were written: what has changed is never taken for what was made."""

import json
import os
import shutil

import builders
import oracle
import pytest
import torch
from builders import CONFIG, REPORT, WEIGHTS, run, run_correct
from safetensors import safe_open

import csulora
from csulora import ChangedError, Correction, CsuloraError, ExistsError, version
from csulora.batch import steps


@pytest.fixture(autouse=True)
def journal_counts(monkeypatch):
    """Files that changed a moment ago are looked at again; here the journal has its say at once."""
    monkeypatch.setattr(steps, "SETTLED_NS", 0)


@pytest.fixture
def loaded(subspace):
    return csulora.SafetySubspace.load(subspace)


@pytest.fixture
def batch(capsys, adapter, subspace, tmp_path):
    """Two finished outputs, and how they were asked for."""
    builders.write_adapter(tmp_path / "in" / "other", seed=1)
    call = (tmp_path / "in", "--subspace", subspace, "--out-dir", tmp_path / "out")
    assert run_correct(capsys, *call).code == 0
    return call


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


# --- verify ---------------------------------------------------------------------------------------


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


def test_verify_finds_outputs_however_deep(capsys, adapter, loaded, tmp_path):
    """Deeper than Python's stack, and not what is hidden or linked."""
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
