"""The GPU benchmark and its tuner without a GPU: counting, checking, printing, all but the clock."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import chain  # noqa: E402
import forecast  # noqa: E402
import gpu  # noqa: E402
import on_a_gpu  # noqa: E402
import roofline  # noqa: E402
import sass  # noqa: E402
import workloads  # noqa: E402

from csulora_kernels import plan  # noqa: E402
from csulora_kernels.layout import Shape  # noqa: E402


@pytest.fixture
def dry(interpreter, monkeypatch, capsys):
    """Runs a script of bench/ in this process and returns what it prints."""

    def run(script, *arguments):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [script, "--dry", *arguments])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_benchmark_checks_and_counts_without_a_clock(dry, tmp_path):
    lines = dry("gpu", "--json", str(tmp_path / "rows.json")).splitlines()
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["commit"] and written["torch"] and written["triton"]
    whats = [row["what"] for row in written["rows"]]
    assert whats[:4] == ["project", "solve", "recompose", "correct"] and len(whats) == 18
    for row in written["rows"]:
        assert row["milliseconds"] is None and row["floor_share"] is None
        assert row["bytes"] > 0 and row["check"] <= 2 * 2.0**-8 and not row["note"]
    assert sum(line.startswith("toy") for line in lines) == 18


@pytest.mark.slow
def test_the_tuner_prints_what_to_write(dry):
    out = dry("tune", "--ranks", "3")
    assert ", ProjectLaunch(block_d=" in out and "R = 16, K = 64" in out


def test_steps_for_a_gpu_that_fail_or_take_too_long_stop_no_other(tmp_path):
    def ended(code, seconds=60.0, minutes=1):
        step = on_a_gpu.Step("step", [sys.executable, "-c", code], seconds)
        return on_a_gpu.run(step, tmp_path, time.monotonic() + 60 * minutes)["code"]

    assert ended("print(1)") == 0 and ended("raise SystemExit(3)") == 3
    assert ended("import time; time.sleep(60)", seconds=0.5) is None
    assert ended("print(1)", minutes=0) is None


def test_the_steps_for_a_gpu_find_what_they_are_for(tmp_path):
    known = [
        {model, f"N={N}", f"r={r}", *form.split(), kind}
        for model, N, r, form, kind in gpu.cases(dry=False, every=True)
    ]
    for step in on_a_gpu.compilations():
        wanted = set(step.command[-1].split())
        assert any(wanted <= case for case in known), step
    by_name = {step.name: step.command for step in on_a_gpu.steps(tmp_path, 2)}
    few = [*by_name["racecheck"][5:], "--collect-only"]  # what the sanitizer runs
    done = subprocess.run(few, cwd=BENCH.parent, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("7/"), done.stdout
    assert all(Path(by_name[name][1]).is_file() for name in ("benchmark", "tune"))


@pytest.mark.parametrize("adapters", [1, 8, 64])
@pytest.mark.parametrize("form", workloads.FORMS)
def test_the_work_lists_read_every_factor_once_a_stage_and_write_every_result_once(adapters, form):
    """The counted bytes of a stage are the floor's terms: no stretch twice, none left out."""
    work = workloads.Workload.of("llama-3.1-8b", adapters, 16, form)
    tiles = work.tiles()
    covered = plan.project_work(work.shapes, adapters, tiles)
    stretches = (covered[:, 6] - covered[:, 5]).long()
    width = tiles.group * tiles.project.strips
    members = (adapters - covered[:, 2] * width).clamp(max=width)
    assert int((stretches * members).sum()) * 16 * 2 == work.factors
    rows = 0
    for item in roofline.items(work, tiles):
        group = plan.recompose_group(tiles, work.kind, item.wide)
        rows += (item.d_to - item.d_from) * min(adapters - item.group * group, group)
    again = sum(s.d_in + (s.d_out if work.kind.writes_B else 0) for s in work.shapes)
    assert rows == adapters * again
    counted = roofline.stage_bytes(work, tiles)
    small = 0.06 * work.floor  # coordinates, Gram matrices and cores
    assert 0 <= counted["project"] - work.factors - work.basis <= small
    share = again / work.length
    inputs = share * (work.factors + work.basis)
    assert 0 <= counted["recompose"] - inputs - work.result <= small
    k = max(s.k for s in work.shapes)
    again = int(stretches.sum()) * k * 4 - work.basis  # each program reads its stretch of the basis
    assert roofline.stage_l2_bytes(work, tiles)["project"] == counted["project"] + again


def test_a_forecast_is_its_largest_limit_and_grows_with_the_work(monkeypatch):
    """Without compiling and interpreting: with made-up counts of both."""
    code = sass.Code((300, 200, 250, 150), 900, 4)
    monkeypatch.setattr(
        forecast, "codes", lambda *_: {"project_kernel": code, "recompose_kernel": code}
    )
    monkeypatch.setattr(forecast, "chain_steps", lambda *_: {"barrier": 10_000})
    gpu = forecast.GPUS["h200"]
    one, many = (
        forecast.forecast(workloads.Workload.of("llama-3.1-8b", N, 16, "exact"), gpu)
        for N in (1, 64)
    )
    assert [stage.stage for stage in one] == list(forecast.STAGES)
    for few, more in zip(one, many, strict=True):
        assert few.milliseconds == max(few.limits.values()) == few.limits[few.binding]
        assert all(more.limits[name] > few.limits[name] for name in few.limits)
    assert one[1].binding == "chain"
    assert one[1].limits["chain"] == pytest.approx(1e3 * 10_000 * 25 / gpu.clock)
    # Every limit is met somewhere in the figures of the card: 4.8 TB/s for what DRAM moves.
    work = workloads.Workload.of("llama-3.1-8b", 64, 16, "exact")
    moved = roofline.stage_bytes(work, work.tiles())["recompose"]
    assert many[2].limits["DRAM"] == pytest.approx(1e3 * moved / 4.8e12)
    with pytest.raises(ValueError, match="16-bit factors"):
        wide = workloads.Workload.of("llama-3.1-8b", 1, 16, "exact", dtype=torch.float32)
        forecast.forecast(wide, gpu)


def test_instructions_are_counted_once_for_each_turn_of_each_warp():
    work = workloads.Workload((Shape(256, 64, 7),), 1, 8, "exact", torch.bfloat16)
    tiles = work.tiles()
    block = tiles.project.block_d
    turns = 256 // block, 64 // block
    code = sass.Code((100, 10), 50, 4)
    found = forecast.issued(work, tiles, "project", code)
    assert found == 4 * (turns[0] * 100 + turns[1] * 10 + 2 * 25)


def test_innermost_loops_are_found_in_compiled_code():
    sass_text = "\n".join(
        f"        /*{at:04x}*/                   {text} ;"
        for at, text in (
            (0x00, "MOV R1, R2"),
            (0x10, "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24"),
            (0x20, "@P0 BRA 0x10"),
            (0x30, "IADD3 R1, R1, 1"),
            (0x40, "@P1 BRA 0x10"),
            (0x50, "EXIT"),
            (0x60, "NOP"),
        )
    )
    code = sass.instructions(sass_text)
    assert len(code) == 6
    assert [[at for at, _ in loop] for loop in sass.innermost_loops(code)] == [[0x10, 0x20]]


@pytest.mark.usefixtures("interpreter")
def test_the_chain_of_solve_is_counted_on_the_kernel_itself():
    """Twice: the same; and a fit takes longer than the cores alone."""
    counted = chain.steps("exact", 16, 7)
    assert counted == chain.steps("exact", 16, 7)
    # Two factorizations of 16 pivots at the least, and a barrier behind each.
    assert counted["division"] >= 32 and counted["barrier"] >= 32 and counted["product"] > 0
    assert chain.cycles(counted, 1) > chain.LATENCY["barrier"] * counted["barrier"]
    assert chain.cycles(chain.steps("same", 16, 7), 1) > 2 * chain.cycles(counted, 1)


def test_measured_rows_are_found_beside_their_forecast():
    beside = forecast.measured(BENCH / "results" / "gpu-h200.json")
    wanted = {
        (N, 16, form, s) for N in (1, 64) for form in workloads.FORMS for s in forecast.STAGES
    }
    assert wanted <= beside.keys() and all(t > 0 for t in beside.values())


@pytest.mark.slow
def test_the_compiled_code_of_a_workload_has_a_loop_for_each_side():
    """In a process of its own, as compiling needs Triton without its interpreter."""
    program = (
        "import forecast, workloads\n"
        "codes = forecast.codes(workloads.Workload.of('llama-3.1-8b', 1, 16, 'same'), 90)\n"
        "print([(name, len(c.loops), min(c.loops) > 50, c.warps) for name, c in codes.items()])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{BENCH.parent}{os.pathsep}{BENCH}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == (
        ["[('project_kernel',", "2,", "True,", "4),", "('recompose_kernel',", "2,", "True,", "4)]"]
    )
