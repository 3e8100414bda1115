"""Calls that are wrong in themselves: exit code 2 and one line, before any work."""

import pytest
from builders import (
    run,
    tree,
    write_adapter,
)
from spoilers import check_refusal

# --- the call itself ------------------------------------------------------------------------------

BAD_CALLS = {
    "subspace-rank-0": (["--subspace-rank", "0"], ["subspace rank", "1 and 4"]),
    "subspace-rank-too-large": (["--subspace-rank", "5"], ["subspace rank", "1 and 4"]),
    "subspace-rank-negative": (["--subspace-rank", "-2"], ["subspace rank"]),
    "partial-and-left": (["--lambda-partial", "1", "--lambda-left", "1"], ["--lambda-partial"]),
    "partial-and-right": (["--lambda-partial", "1", "--lambda-right", "2"], ["--lambda-partial"]),
    "negative-off": (["--lambda-off", "-1"], ["lambda_off", "-1"]),
    "negative-aligned": (["--lambda-aligned=-0.5"], ["lambda_aligned"]),
    "nan-left": (["--lambda-left", "nan"], ["lambda_left", "nan"]),
    "minus-inf-right": (["--lambda-right=-inf"], ["lambda_right"]),
    "strength-of-csulora": (["--strength", "3"], ["--strength", "csulora"]),
    "opposed-csulora": (["--opposed"], ["--opposed", "csulora"]),
    "lambda-of-realign": (
        ["--method", "realign", "--lambda-off", "3"],
        ["--lambda-off", "realign"],
    ),
    "granularity-of-realign": (
        ["--method", "realign", "--granularity", "component"],
        ["--granularity", "realign"],
    ),
    "negative-strength": (["--method", "realign", "--strength", "-1"], ["strength", "-1"]),
    "nan-strength": (["--method", "realign", "--strength", "nan"], ["strength", "nan"]),
    "negative-target": (["--method", "realign", "--target=-0.5"], ["target", "-0.5"]),
    "infinite-target": (["--method", "realign", "--target", "inf"], ["target", "finite"]),
    "strength-for-nothing": (
        ["--strength-for", "q_proj"],
        ["--strength-for q_proj", "PATTERN=VALUE"],
    ),
    "strength-for-no-pattern": (["--strength-for", "=3"], ["--strength-for =3", "PATTERN=VALUE"]),
    "strength-for-a-word": (["--strength-for", "q=keep"], ["--strength-for q=keep", "'keep'"]),
    "strength-for-no-value": (["--strength-for", "q="], ["--strength-for q=", "no number"]),
    "strength-for-negative": (["--strength-for", "q=-1"], ["strength_for q", "-1"]),
    "strength-for-nan": (
        ["--method", "realign", "--strength-for", "q=nan"],
        ["strength_for q", "nan"],
    ),
    "budget-without-kind": (["--budget", "0.3"], ["--budget 0.3", "no number"]),
    "budget-of-nothing": (["--budget", "=0.3"], ["budget of csulora", "''"]),
    "budget-unknown": (["--budget", "energy=0.3"], ["change or off", "'energy'"]),
    "budget-a-word": (["--budget", "change=much"], ["--budget change=much", "'much'"]),
    "budget-twice": (["--budget", "change=1", "--budget", "off=1"], ["--budget", "once"]),
    "budget-0": (["--budget", "change=0"], ["budget change", "above 0"]),
    "budget-negative": (["--budget", "off=-1"], ["budget off", "-1"]),
    "budget-infinite": (["--budget", "change=inf"], ["budget change", "finite"]),
    "budget-off-of-realign": (
        ["--method", "realign", "--budget", "off=0.3"],
        ["budget of realign", "'off'"],
    ),
    "budget-and-off": (
        ["--budget", "change=1", "--lambda-off", "10"],
        ["--lambda-off", "--budget"],
    ),
    "budget-and-partial": (
        ["--budget", "change=1", "--lambda-partial", "10"],
        ["--lambda-partial", "--budget"],
    ),
    "budget-and-left": (
        ["--budget", "change=1", "--lambda-left", "1"],
        ["--lambda-left", "--budget"],
    ),
    "budget-and-strength": (
        ["--method", "realign", "--budget", "change=1", "--strength", "3"],
        ["--strength", "--budget"],
    ),
    "edge-unknown": (["--edge", "on"], ["--edge", "'on'", "csulora correct --help"]),
    "overwrite-and-resume": (["--overwrite", "--resume"], ["--resume", "--overwrite"]),
    "option-unknown": (["--frm", "exact\nsame"], ["--frm", "--help"]),
    "batch-bytes-negative": (["--batch-bytes=-5"], ["--batch-bytes", "'-5'", "512M"]),
    "batch-bytes-a-word": (["--batch-bytes", "lots"], ["--batch-bytes", "'lots'"]),
    "jobs-0": (["--jobs", "0"], ["jobs"]),
    "device-unknown": (["--device", "abacus"], ["device", "abacus"]),
    "device-meta": (["--device", "meta"], ["device", "meta"]),
    "list-missing": (["--adapters-from", "/no/such/list"], ["/no/such/list"]),
    "out-dir-empty": (["--out-dir", ""], ["--out-dir is empty"]),
    "list-without-end": (["--adapters-from", "/dev/zero"], ["/dev/zero", "more than"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case, adapter, subspace, out, capsys):
    arguments, words = BAD_CALLS[case]
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out, *arguments)
    check_refusal(result, 2, words, out)
    assert result.out == ""


BAD_SWEEPS = {
    "eval-and-select": (
        ["--eval", "a {adapter}", "--select", "b {adapter}"],
        ["--eval", "--select"],
    ),
    "select-alone": (["--select", "a {adapter}"], ["--report"]),
    "report-alone": (["--report", "a {adapter}"], ["--select"]),
    "select-is-report": (["--select", "a{adapter}", "--report", "a{adapter}"], ["same"]),
    "no-place": (["--eval", "measure"], ["{adapter}", "measure"]),
    "open-quote": (["--eval", "measure '{adapter}"], ["split"]),
    "limit-without-eval": (["--limit", "a<=1"], ["--limit", "--eval"]),
    "steps-without-eval": (["--steps", "0"], ["--steps", "--eval"]),
    "overwrite-without-eval": (["--overwrite"], ["--overwrite", "--eval"]),
    "no-limit": (["--eval", "a {adapter}", "--limit", "a<1"], ["limit", "a<1"]),
    "jobs-0": (["--eval", "a {adapter}", "--jobs", "0"], ["--jobs", "0"]),
    "steps-negative": (["--eval", "a {adapter}", "--steps", "-1"], ["--steps", "-1"]),
    "timeout-0": (["--eval", "a {adapter}", "--timeout", "0"], ["--timeout"]),
    "timeout-nan": (["--eval", "a {adapter}", "--timeout", "nan"], ["--timeout"]),
    "without-unknown": (["--eval", "a {adapter}", "--without", "all"], ["raw, no-adapter", "all"]),
    "method-unknown": (["--methods", "magic"], ["method", "magic"]),
    "form-twice": (["--forms", "same,same"], ["form", "once"]),
    "no-method": (["--methods", ","], ["method"]),
    "granularity-unknown": (["--granularities", "row"], ["granularity", "row"]),
    "rank-too-large": (["--ranks", "2,5"], ["subspace rank", "1 to 4"]),
    "strength-0": (["--strengths", "0,1"], ["strength 0"]),
    "strength-nan": (["--strengths", "nan"], ["strength", "nan"]),
    "out-dir-empty": (["--out-dir", ""], ["--out-dir is empty"]),
    "device-unknown": (["--device", "abacus"], ["device", "abacus"]),
}


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_bad_sweep(case, adapter, subspace, out, capsys):
    arguments, words = BAD_SWEEPS[case]
    result = run(capsys, "sweep", adapter, "--subspace", subspace, "--out-dir", out, *arguments)
    check_refusal(result, 2, words, out)
    assert result.out == ""


def test_a_sweep_of_what_is_no_adapter(tmp_path, subspace, out, capsys):
    call = ("--subspace", subspace, "--out-dir", out)
    (tmp_path / "empty").mkdir()
    check_refusal(run(capsys, "sweep", tmp_path / "empty", *call), 1, ["empty"], out)
    corrected = tmp_path / "corrected"
    adapter = write_adapter(tmp_path / "in" / "lora")
    assert run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", corrected).code == 0
    again = run(capsys, "sweep", corrected / "lora", *call, "--eval", "a {adapter}")
    check_refusal(again, 1, [str(corrected / "lora"), "corrected by csulora already"], out)


def test_bad_device_even_if_no_adapter_loads(tmp_path, subspace, out, capsys):
    arguments = ("--subspace", subspace, "--out-dir", out, "--device", "abacus")
    check_refusal(run(capsys, "correct", tmp_path / "no", *arguments), 2, ["abacus"], out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", "half"],
        ["--dtype", "int8"],
        ["--granularity", "row"],
        ["--lambda-off", "much"],
        ["--jobs", "two"],
        ["--overwrite", "--resume"],
        ["--no-such-option"],
    ],
)
def test_malformed_arguments(arguments, adapter, subspace, out, capsys):
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out, *arguments)
    assert result.code == 2
    assert arguments[0] in result.err
    assert "Traceback" not in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], ["rank", "0"]),
        (["--energy", "0"], ["energy"]),
        (["--energy", "1.5"], ["energy", "1.5"]),
        (["--energy", "nan"], ["energy", "nan"]),
        (["--modules", "q_proj,nothing"], ["base", "nothing"]),
        (["--modules", ""], ["base", "''"]),
        (["--like", "/no/such/adapter"], ["/no/such/adapter"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_estimate_call(arguments, words, pair, out, capsys):
    result = run(capsys, "estimate", *pair, "--out", out / "s.safetensors", *arguments)
    check_refusal(result, 2, words, out)


def test_estimate_never_replaces_what_is_not_a_subspace(pair, capsys):
    before = tree(pair[1])
    result = run(capsys, "estimate", *pair, "--out", pair[1] / "model.safetensors")
    assert result.code == 2
    assert "model.safetensors" in result.complaints[0]
    assert tree(pair[1]) == before


def test_estimate_out_is_a_folder(pair, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    result = run(capsys, "estimate", *pair, "--out", tmp_path / "folder")
    check_refusal(result, 2, ["folder"], tmp_path / "folder")


def test_output_place_below_a_file(pair, adapter, subspace, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    result = run(capsys, "estimate", *pair, "--out", tmp_path / "file" / "s.safetensors")
    check_refusal(result, 2, [str(tmp_path / "file")], tmp_path / "out")
    place = tmp_path / "file" / "out"
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", place)
    check_refusal(result, 2, [str(tmp_path / "file")], tmp_path / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_no_adapters(subspace, out, capsys):
    result = run(capsys, "correct", "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 2, ["no adapters"], out)


def test_two_adapters_with_one_name(tmp_path, subspace, out, capsys):
    pair = [write_adapter(tmp_path / place / "lora") for place in ("a", "b")]
    result = run(capsys, "correct", *pair, "--subspace", subspace, "--out-dir", out)
    check_refusal(result, 2, [str(out / "lora"), "rename"], out)


def test_out_dir_is_a_file(adapter, subspace, out, capsys):
    out.write_text("x")
    result = run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert str(out) in result.complaints[0]
    assert out.read_text() == "x"


def test_output_exists(adapter, subspace, out, capsys):
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert run(capsys, *arguments).code == 0
    before = tree(out)
    result = run(capsys, *arguments, "--lambda-off", 3)
    assert (result.code, len(result.complaints)) == (1, 1)
    assert str(out / "lora") in result.complaints[0]
    assert "--overwrite" in result.complaints[0]
    assert tree(out) == before


@pytest.mark.parametrize("option", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize("place", ["same", "linked", "around", "within"])
def test_output_must_not_touch_a_source(place, option, tmp_path, subspace, capsys):
    """Replacing an output folder must never replace or swallow an adapter it was made from."""
    source = write_adapter(tmp_path / "x" / "lora" / "lora")
    (tmp_path / "link").symlink_to(tmp_path / "x" / "lora")
    out = {
        "same": source.parent,
        "linked": tmp_path / "link",
        "around": source.parent.parent,
        "within": source,
    }[place]
    before = tree(tmp_path)
    options = [option] if option else []
    result = run(capsys, "correct", source, "--subspace", subspace, "--out-dir", out, *options)
    assert (result.code, len(result.complaints)) == (2, 1), result.err
    assert str(source) in result.complaints[0]
    assert tree(tmp_path) == before


def test_output_must_not_touch_another_source(tmp_path, subspace, capsys):
    first = write_adapter(tmp_path / "b" / "x")
    second = write_adapter(tmp_path / "elsewhere" / "b")
    before = tree(tmp_path)
    arguments = ("--subspace", subspace, "--out-dir", tmp_path, "--overwrite")
    result = run(capsys, "correct", first, second, *arguments)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert tree(tmp_path) == before
