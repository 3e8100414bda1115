"""Strengths of single modules and budgets by Triton: what torch gives, at the same strength."""

from dataclasses import replace

import pytest
import torch
from problems import SEVERAL, several, truth, update

from csulora import Correction, Realignment, correct

pytestmark = pytest.mark.usefixtures("interpreter")
Q0, UP0, Q1, UP1 = SEVERAL
PATTERNS = {"q_proj": 0, "layers.0.mlp.*": "drop", "layers.1.mlp.*": float("inf")}
METHODS = [Correction(), Realignment(form="exact"), Realignment()]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_own_strengths_beside_a_budget(method):
    adapter, subspace = several()
    own = {**PATTERNS, "layers.0.mlp.*": 0, "layers.1.mlp.*": "drop"}
    del own["q_proj"]
    limit = 0.6  # of which 0.536 is what is dropped
    asked = replace(method, strength_for=own, budget={"change": limit})
    reports = {}
    for backend in ("torch", "triton"):
        new, reports[backend] = correct(adapter, subspace, asked, backend=backend, device="cpu")
        assert not bool(new.modules[UP1].A.any()) and not bool(new.modules[UP1].B.any())
        assert torch.equal(new.modules[UP0].B, adapter.modules[UP0].B)
        for name in (Q0, Q1):
            old = adapter.modules[name]
            found = method.with_strength(reports[backend].strength)
            wanted = truth(old, subspace.modules[name], found)
            error = float((update(new.modules[name]) - wanted).norm() / wanted.norm())
            assert error <= 1e-5, (backend, name)
    assert reports["torch"].strength == reports["triton"].strength
    for name, entry in reports["torch"].modules.items():
        found = reports["triton"].modules[name]
        assert found.rank_out == entry.rank_out
        assert found.relative_change == pytest.approx(entry.relative_change, abs=1e-6)
    change = reports["triton"].totals.relative_change
    assert change == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_kind_of_strength_in_one_launch(method):
    adapter, subspace = several(torch.bfloat16)
    asked = replace(method, strength_for=PATTERNS)
    pair = [
        correct(adapter, subspace, asked, backend=backend, device="cpu")
        for backend in ("torch", "triton")
    ]
    for name, module in pair[0][0].modules.items():
        found = pair[1][0].modules[name]
        assert (found.rank, found.A.dtype) == (module.rank, module.A.dtype)
        size = float(update(module).norm())
        assert float((update(found) - update(module)).norm()) <= 2e-2 * size, name
    for report in (report for _, report in pair):
        changes = {name: entry.relative_change for name, entry in report.modules.items()}
        assert changes[Q0] == changes[Q1] == 0 and changes[UP0] == 1 > changes[UP1] > 0
