"""`csulora sweep --eval` with a command whose frontier is known: what is chosen, told, kept and left."""

import json
import math
import os
import shlex
import sys
from pathlib import Path

import builders
import pytest
import torch

import csulora
from csulora import baselines
from csulora.sweep.place import EVALUATIONS, RESULT, VARIANT

MEASURE = Path(__file__).with_name("measure.py")
QUICK = ("--methods", "realign", "--forms", "same", "--ranks", "4", "--steps", "2")


@pytest.fixture
def command(adapter):
    """The evaluation command, with further words."""

    def of(*words):
        return shlex.join(
            [sys.executable, str(MEASURE), str(adapter), "{adapter}", *map(str, words)]
        )

    return of


@pytest.fixture
def sweep(capsys, adapter, subspace, out):
    def run(*options):
        call = ("sweep", adapter, "--subspace", subspace, "--out-dir", out, *options)
        return builders.run(capsys, *call)

    return run


def result_of(out):
    return json.loads((out / RESULT).read_text(), parse_constant=lambda name: 1 / 0)


def rows(result, kind):
    return [row for row in result["rows"] if row["kind"] == kind]


def test_the_best_setting_is_within_the_limit_and_its_command_makes_the_same_bytes(
    capsys, sweep, command, adapter, subspace, out, tmp_path
):
    """The copy that the command sees last of the best setting is what `csulora correct` writes."""
    keep = tmp_path / "keep.py"
    keep.write_text(
        "import runpy, shutil, sys\n"
        f"shutil.copytree(sys.argv[2], {str(tmp_path)!r} + '/kept/' + sys.argv[2].replace('/', '_'))\n"
        f"runpy.run_path({str(MEASURE)!r}, run_name='__main__')\n"
    )
    line = shlex.join([sys.executable, str(keep), str(adapter), "{adapter}"])
    found = sweep("--eval", line, "--steps", 4, "--ranks", "2,4", "--jobs", 2)
    assert found.code == 0, found.err
    result = result_of(out)
    best = result["best"]
    (row,) = (r for r in rows(result, "setting") if r["settings"] == best["settings"])
    # The limit lies at a change of 0.36; the largest utility is the smallest change beyond it.
    assert row["metrics"]["complied"] <= 0.1
    assert row["relative_change"] == pytest.approx(0.36, abs=0.02)
    within = [r for r in rows(result, "setting") if r["within_limit_when_chosen"]]
    assert row["metrics"]["utility"] == max(r["metrics"]["utility"] for r in within)
    assert best["command"] in found.out
    words = shlex.split(best["command"])
    assert words[:3] == ["csulora", "correct", str(adapter)]
    assert builders.run(capsys, *words[1:]).code == 0
    made = builders.tree(out / "best" / adapter.name)
    assert made in [builders.tree(path) for path in (tmp_path / "kept").iterdir()]


def test_every_row_shows_the_change_that_was_measured_and_every_control_is_there(
    sweep, command, out, adapter, subspace
):
    assert sweep("--eval", command(), "--ranks", "4", "--steps", 3).code == 0
    result = result_of(out)
    for row in result["rows"]:
        assert row["metrics"]["change"] == pytest.approx(row["relative_change"], abs=2e-5), row
    assert [row["kind"] for row in result["rows"][:2]] == ["raw", "no-adapter"]
    assert rows(result, "raw")[0]["metrics"]["utility"] == pytest.approx(1)
    assert rows(result, "no-adapter")[0]["metrics"]["change"] == pytest.approx(1)
    settings = rows(result, "setting")
    loaded = csulora.LoraAdapter.load(adapter)
    space = csulora.SafetySubspace.load(subspace)
    for method in ("csulora", "realign"):
        own = [r for r in settings if r["settings"]["method"] == method]
        controls = [
            row for row in result["rows"] if row.get("compared_with", {}).get("method") == method
        ]
        kinds = [row["kind"] for row in controls]
        assert kinds == ["down-scaling", "down-scaling", "random-subspace", "add-back", "pruning"]
        norm, change, random, added, pruned = controls
        (row,) = (r for r in own if r["settings"] == norm["compared_with"])
        assert norm["factor"] == pytest.approx(row["norm_kept"], rel=1e-5)
        assert norm["norm_kept"] == pytest.approx(row["norm_kept"], rel=1e-5)
        for equal in (change, added):
            assert equal["relative_change"] == pytest.approx(row["relative_change"], rel=1e-4)
        assert added["relative_change"] == pytest.approx(
            baselines.relative_change(loaded, baselines.add_back(loaded, space, added["gamma"]))
        )
        assert random["settings"] == row["settings"]
        assert random["relative_change"] != pytest.approx(row["relative_change"], rel=1e-3)
        assert pruned["modules"] == 1  # of two; the nearest there is


def test_controls_are_switched_off_by_name(sweep, command, out):
    names = "no-adapter,down-scaling,random-subspace,add-back,pruning"
    log = out.parent / "log"
    assert sweep(*QUICK, "--eval", command("--log", log), "--without", names).code == 0
    result = result_of(out)
    assert {row["kind"] for row in result["rows"]} == {"raw", "setting"}
    assert result["without"] == sorted(names.split(","))
    assert sweep(*QUICK, "--eval", command(), "--without", "raw," + names).code == 0
    assert {row["kind"] for row in result_of(out)["rows"]} == {"setting"}
    wrong = sweep(*QUICK, "--eval", command(), "--without", "magic")
    assert wrong.code == 2 and "not 'magic'" in wrong.err


def test_figures_of_the_prompts_that_chose_are_not_told(sweep, command, out):
    select, report = command("--say", 1), command("--say", 2)
    options = (*QUICK, "--limit", "complied<=0.8")
    found = sweep(*options, "--select", select, "--report", report)
    assert found.code == 0, found.err
    text = (out / RESULT).read_text()
    result = json.loads(text)
    assert {row["metrics"]["split"] for row in result["rows"]} == {2.0}
    assert result["prompts"].startswith("the figures are from other prompts")
    assert all("metrics" not in entry for tried in result["tried"].values() for entry in tried)
    assert "other prompts" in found.out
    assert result["commands"] == {"select": select, "report": report}
    # The reporting command ran on what is told of alone.
    kept = [json.loads(line) for line in (out / EVALUATIONS).read_text().splitlines()[1:]]
    assert sum(entry["command"] == report for entry in kept) == len(result["rows"])
    assert result["notes"] == []
    assert result["best"] is not None
    worse = sweep(*options, "--select", select, "--report", command("--worse", 0.3))
    assert "By the prompts that are reported the best is beyond complied<=0.8" in worse.out
    only = sweep(*QUICK, "--overwrite", "--eval", select)
    assert "The figures are from the prompts that chose" in only.out


def test_what_was_evaluated_is_not_evaluated_again(sweep, command, out, tmp_path):
    log = tmp_path / "log"
    line = command("--log", log)
    assert sweep(*QUICK, "--eval", line).code == 0
    calls, text = len(log.read_text().splitlines()), (out / RESULT).read_bytes()
    kept = (out / EVALUATIONS).read_bytes()
    assert sweep(*QUICK, "--eval", line).code == 0
    assert len(log.read_text().splitlines()) == calls
    assert ((out / RESULT).read_bytes(), (out / EVALUATIONS).read_bytes()) == (text, kept)
    # A line that is torn, and one that is no line of ours, count for nothing.
    lines = kept.splitlines(keepends=True)
    (out / EVALUATIONS).write_bytes(b"".join([*lines[:-2], b"{not json}\n", lines[-1][:40]]))
    assert sweep(*QUICK, "--eval", line).code == 0
    assert len(log.read_text().splitlines()) == calls + 2
    assert (out / RESULT).read_bytes() == text
    assert sweep(*QUICK, "--eval", line, "--overwrite").code == 0
    assert len(log.read_text().splitlines()) == 2 * calls + 2
    # Another command, another adapter: nothing of it is taken.
    assert sweep(*QUICK, "--eval", command("--log", log, "--say", 3)).code == 0
    assert {row["metrics"]["split"] for row in result_of(out)["rows"]} == {3.0}


def test_jobs_change_nothing(sweep, command, out):
    assert sweep("--eval", command(), "--ranks", "2,4", "--jobs", 4, "--steps", 3).code == 0
    text = (out / RESULT).read_bytes()
    assert sweep("--eval", command(), "--ranks", "2,4", "--overwrite", "--steps", 3).code == 0
    assert (out / RESULT).read_bytes() == text


def failing(tmp_path, body):
    """A command that is a script with this body; sys.argv[1] is the folder."""
    script = tmp_path / "failing.py"
    script.write_text(f"import json, os, sys, time\n{body}\n")
    return shlex.join([sys.executable, str(script), "{adapter}"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "print('{}')\nprint('a\\nthe cause\\x1b[31m', file=sys.stderr)\nsys.exit(3)",
            "exit code 3",
        ),
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("print('complied 0.1')", "printed no JSON object"),
        ('print(\'{"complied": NaN, "utility": 1}\')', "complied is nan"),
        ("print('{\"complied\": 0.1}')", "no number 'utility'"),
        ('print(\'{"complied": 50, "utility": 1}\')', "complied is 50"),
        ("time.sleep(60)", "no end after 0.5 seconds"),
        ("os.system('sleep 60 &')\nos.setsid if 0 else time.sleep(60)", "no end after 0.5 seconds"),
        ("sys.stdout.write('x' * 5_000_000)", "printed no JSON object"),
    ],
)
def test_a_command_that_fails_is_told_of_and_the_sweep_goes_on(sweep, out, tmp_path, body, reason):
    line = failing(tmp_path, body)
    options = (*QUICK, "--timeout", 0.5) if "sleep" in body else QUICK
    found = sweep(*options, "--eval", line, "--jobs", 2)
    assert found.code == 1
    result = result_of(out)
    assert result["best"] is None and len(result["failures"]) == 5
    assert all(reason in failure["error"] for failure in result["failures"])
    assert len(found.complaints) == 5 and all(reason in line for line in found.complaints)
    if "cause" in body:
        assert found.complaints[0].endswith("it said last: the cause\\x1b[31m")
    assert [row["metrics"] for row in result["rows"]] == [None, None]
    assert [path.name for path in out.iterdir() if path.name != RESULT] == []


def test_one_failure_among_many(sweep, command, out, tmp_path):
    """The extreme cannot be measured: everything else is."""
    body = f"""
import runpy
here = json.load(open(sys.argv[1] + "/csulora_report.json")) if os.path.exists(
    sys.argv[1] + "/csulora_report.json") else {{}}
if here.get("settings", {{}}).get("strength") == "inf":
    sys.exit("no memory")
sys.argv = ["measure", {str(tmp_path / "in" / "lora")!r}, sys.argv[1]]
runpy.run_path({str(MEASURE)!r}, run_name="__main__")"""
    found = sweep(*QUICK, "--eval", failing(tmp_path, body), "--limit", "complied<=0.8")
    assert found.code == 1
    result = result_of(out)
    (failure,) = result["failures"]
    assert failure["variant"].endswith("strength inf") and "no memory" in failure["error"]
    assert result["best"] is not None
    (tried,) = result["tried"].values()
    assert [entry["within_limit"] for entry in tried][-1] is None


def test_a_command_that_is_not_there(sweep, out):
    found = sweep(*QUICK, "--eval", "/no/such/command {adapter}")
    assert found.code == 1 and "cannot be run (No such file" in found.err


def test_no_shell_sees_the_command(sweep, out, tmp_path):
    line = f"{shlex.join([sys.executable, '-c', 'print(1)'])} {{adapter}} ; touch {tmp_path / 'touched'}"
    assert sweep(*QUICK, "--eval", line).code == 1
    assert not (tmp_path / "touched").exists()


def test_an_adapter_that_changes_nothing_and_one_that_is_fine_already(sweep, command, out, adapter):
    found = sweep(*QUICK, "--eval", command(), "--limit", "complied<=1")
    assert found.code == 0
    assert "The raw adapter is within complied<=1 as it is" in found.out
    builders.edit_tensors(
        adapter / builders.WEIGHTS,
        lambda tensors: [X.zero_() for name, X in tensors.items() if "lora_B" in name],
    )
    found = sweep(*QUICK, "--eval", failing(out.parent, 'print(\'{"complied": 1, "utility": 0}\')'))
    assert found.code == 0
    assert "Realign same k 4 changes nothing at any strength" in found.out
    assert "No setting that was tried is within complied<=0.1" in found.out
    assert result_of(out)["best"] is None


def test_what_is_asked_can_be_any_metric(sweep, command, out):
    options = ("--limit", "change>=0.2", "--maximize", "utility", "--json")
    found = sweep(*QUICK, "--eval", command(), *options)
    assert found.code == 0
    result = result_of(out)
    assert json.loads(found.out) == result
    assert result["limit"] == "change>=0.2"
    (row,) = rows(result, "setting")
    assert 0.2 <= row["metrics"]["change"] < 0.3


def test_without_matplotlib_everything_else_is_there(sweep, command, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for options, picture in (((), "energies.png"), (("--eval", command()), "frontier.png")):
        found = sweep(*QUICK[:-2], *options)
        assert found.code == 0
        (warning,) = found.warnings
        assert "no picture: plots need matplotlib" in warning
        assert result_of(out)["rows"] and picture not in found.out
        assert not (out / picture).exists()


def test_given_strengths_are_the_first_ones(sweep, command, out):
    found = sweep(*QUICK[:-2], "--steps", 0, "--eval", command(), "--strengths", "2,inf")
    assert found.code == 0
    (tried,) = result_of(out)["tried"].values()
    assert [entry["strength"] for entry in tried] == [2.0, "inf"]


def test_a_half_adapter_and_a_factor_beyond_one(sweep, command, out, adapter, tmp_path):
    """Realignment in form exact can make an update larger; its control of equal norm is larger too."""
    loaded = csulora.LoraAdapter.load(adapter)
    small = baselines.scaled(loaded, 1e-3)
    small.save(tmp_path / "small" / "lora")
    space = csulora.SafetySubspace.load(tmp_path / "subspace.safetensors")
    from csulora.sweep import Energies, Setting, families
    from csulora.sweep.controls import Material, beside, measured

    chosen = families(4, methods=["realign"], forms=["exact"], ranks=[4])
    (totals,) = Energies(small, space, chosen).totals(chosen[0], [math.inf])
    assert totals.relative_change > 1
    material = Material(small, space)
    controls = beside(Setting(chosen[0], math.inf), totals, material, ())
    assert [v.name for v in controls] == ["down-scaling", "random-subspace", "add-back", "pruning"]
    _change, kept = measured(material, controls[0])
    assert controls[0].values["factor"] > 1 and kept == pytest.approx(
        controls[0].values["factor"], rel=1e-5
    )
    assert measured(material, controls[2])[0] == pytest.approx(totals.relative_change, rel=1e-4)


def test_controls_of_a_setting_are_what_they_say_densely(adapter, subspace):
    from csulora.sweep import Energies, Setting, families
    from csulora.sweep.controls import Material, beside

    loaded, space = csulora.LoraAdapter.load(adapter), csulora.SafetySubspace.load(subspace)
    (family,) = families(4, methods=["csulora"], ranks=[2])
    (totals,) = Energies(loaded, space, [family]).totals(family, [5.0])
    material = Material(loaded, space)

    def dense(one):
        return {name: m.scaling * m.B.double() @ m.A.double() for name, m in one.modules.items()}

    def norm(parts):
        return math.sqrt(sum(float(X.square().sum()) for X in parts))

    raw = dense(loaded)
    corrected = dense(csulora.correct(loaded, space.leading(2), family.at(5.0))[0])
    wanted = norm(corrected[name] - raw[name] for name in raw) / norm(raw.values())
    assert totals.relative_change == pytest.approx(wanted, abs=1e-6)
    variants = beside(Setting(family, 5.0), totals, material, ())
    made = {v.title.split(",")[-1].strip(): dense(v.make(material)[0]) for v in variants}
    assert norm(made["equal norm"].values()) == pytest.approx(norm(corrected.values()), rel=1e-5)
    D = {name: m.U.double() * m.S.double() @ m.V.double().mT for name, m in space.modules.items()}
    changes = [
        norm(dense(v.make(material)[0])[name] - raw[name] for name in raw) / norm(raw.values())
        for v in variants
        if v.title.endswith("equal change")
    ]
    assert changes == pytest.approx([wanted, wanted], rel=1e-4)
    added = dense(next(v for v in variants if v.name == "add-back").make(material)[0])
    gamma = next(v for v in variants if v.name == "add-back").values["gamma"]
    for name in raw:
        assert torch.allclose(added[name] - raw[name], gamma * D[name], atol=1e-5)
    pruned = dense(next(v for v in variants if v.name == "pruning").make(material)[0])
    gone = [name for name in raw if not bool(pruned[name].any())]
    cosines = baselines.cosines(loaded, space)
    assert gone == [min(cosines, key=cosines.get)]


def test_nothing_is_left_and_nothing_outside_is_written(sweep, command, out, tmp_path):
    before = builders.tree(tmp_path)
    assert sweep(*QUICK, "--eval", command()).code == 0
    after = builders.tree(tmp_path)
    assert {name for name in after if name not in before} == {
        f"out/{name}" for name in (RESULT, EVALUATIONS, "frontier.png")
    }
    assert all(after[name] == before[name] for name in before)
    assert not any(name.startswith(VARIANT) for name in os.listdir(out))
