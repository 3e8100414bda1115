"""The GPU benchmark and its tuner without a GPU: counting, checking, printing, all but the clock."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import roofline  # noqa: E402
import workloads  # noqa: E402

from csulora_kernels import plan  # noqa: E402


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
    assert "project: 0.000 ms with Launch(block_d=" in out and "R = 16, K = 64" in out


@pytest.mark.parametrize("adapters", [1, 8, 64])
@pytest.mark.parametrize("form", workloads.FORMS)
def test_the_work_lists_read_every_factor_once_a_stage_and_write_every_result_once(adapters, form):
    """The counted bytes of a stage are the floor's terms: no stretch twice, none left out."""
    work = workloads.Workload.of("llama-3.1-8b", adapters, 16, form)
    tiles = work.tiles()
    covered = plan.project_work(work.shapes, adapters, tiles)
    stretches = (covered[:, 6] - covered[:, 5]).long()
    members = (adapters - covered[:, 2] * tiles.group).clamp(max=tiles.group)
    assert int((stretches * members).sum()) * 16 * 2 == work.factors
    halves, sides = work.kind.halves, (0, 1) if work.kind.writes_B else (1,)
    written = plan.recompose_work(work.shapes, adapters, tiles, halves, sides).long()
    group = torch.where(
        written[:, 0] == 0,
        plan.recompose_group(tiles, 1),
        plan.recompose_group(tiles, halves),
    )
    members = torch.minimum(adapters - written[:, 2] * group, group)
    rows = int(((written[:, 4] - written[:, 3]) * members).sum())
    again = sum(s.d_in + (s.d_out if 0 in sides else 0) for s in work.shapes)
    assert rows == adapters * again
    counted = roofline.stage_bytes(work, tiles)
    small = 0.06 * work.floor  # coordinates, Gram matrices and cores
    assert 0 <= counted["project"] - work.factors - work.basis <= small
    share = again / work.length
    inputs = share * (work.factors + work.basis)
    assert 0 <= counted["recompose"] - inputs - work.result <= small
