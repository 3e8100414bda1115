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
    assert whats[:4] == ["project", "solve", "recompose", "correct"] and len(whats) == 9
    for row in written["rows"]:
        assert row["milliseconds"] is None and row["floor_share"] is None
        assert row["bytes"] > 0 and row["check"] <= 2 * 2.0**-8 and not row["note"]
    assert sum(line.startswith("toy") for line in lines) == 9


@pytest.mark.slow
def test_the_tuner_prints_what_to_write(dry):
    out = dry("tune", "--ranks", "3")
    assert "project: 0.000 ms with Launch(block_d=" in out and "R = 16, K = 64" in out


@pytest.mark.parametrize("adapters", [1, 8, 64])
@pytest.mark.parametrize("rank", ["exact", "same"])
def test_the_work_lists_read_every_factor_once_a_stage_and_write_every_result_once(adapters, rank):
    """The counted bytes of a stage are the floor's terms: no stretch twice, none left out."""
    work = roofline.Workload.of("llama-3.1-8b", adapters, 16, rank)
    tiles = work.tiles()
    covered = plan.project_work(work.shapes, adapters, tiles)
    stretches = (covered[:, 6] - covered[:, 5]).long()
    members = (adapters - covered[:, 2] * tiles.group).clamp(max=tiles.group)
    assert int((stretches * members).sum()) * 16 * 2 == work.factors
    written = plan.recompose_work(work.shapes, adapters, tiles)
    lengths = [(s.d_out, s.d_in) for s in work.shapes]
    block = tiles.recompose.block_d
    rows = sum(
        min(block, lengths[m][side] - start) * (last - first)
        for side, m, start, first, last in written.tolist()
    )
    assert rows * 16 * 2 == work.factors
    counted = roofline.stage_bytes(work, tiles)
    small = 0.06 * work.floor  # coordinates, Gram matrices and cores
    assert 0 <= counted["project"] - work.factors - work.basis <= small
    assert 0 <= counted["recompose"] - work.factors - work.basis - work.result <= small
