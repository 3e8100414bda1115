"""Factors whose columns cancel each other: the update is tiny beside them, and corrected as it is."""

import oracle
import pytest
import torch
from problems import factors
from tolerances import TOLERANCES

import csulora
from csulora import Correction, LoraAdapter, LoraModule, ModuleSubspace, Origin, Realignment
from csulora import SafetySubspace as Subspace

FLOAT32 = TOLERANCES[torch.float32]
NAME = "model.layers.0.self_attn.q_proj"


def cancelling(size, seed):
    """An adapter of two columns that cancel but for `size` of one, its subspace, and its update."""
    B, A, U, V = factors(60, 50, 2, 5, seed=seed, inside=1.0)
    B, A, U, V = (X.float() for X in (B, A, U, V))
    B[:, 1] = -B[:, 0]
    A[1] = A[0] + size * A[1]
    S = 5 / (1 + torch.arange(5, dtype=torch.float32))
    subspace = Subspace(
        {NAME: ModuleSubspace(U, S, V, 0.9)}, Origin("base", "aligned", "", "", seed)
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    adapter = LoraAdapter({NAME: LoraModule(A, B, alpha=2.0, scaling=1.0)}, config)
    return adapter, subspace, B.double() @ A.double()


def wanted(method, dW, B, found):
    U, S, V = (X.double() for X in (found.U, found.S, found.V))
    if isinstance(method, Correction):
        return oracle.correct(dW, U, V, method.strengths, method.granularity)
    f = oracle.shares(S, method.strength, found.noise_edge)
    put = method.gamma * (U * S * f) @ V.mT
    reached = oracle._projector(B.double()) @ put if method.form == "same" else put
    return dW - (dW @ V * f) @ V.mT + reached


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize(
    "method", [Correction(), Realignment(), Realignment(form="exact")], ids=str
)
def test_an_update_that_is_what_large_columns_leave_of_each_other(method, size, seed):
    adapter, subspace, dW = cancelling(size, seed)
    corrected, report = csulora.correct(adapter, subspace, method, device="cpu")
    new, want = (
        corrected.modules[NAME],
        wanted(method, dW, adapter.modules[NAME].B, subspace.modules[NAME]),
    )
    error = (new.B.double() @ new.A.double() - want).norm() / want.norm()
    assert error <= FLOAT32
    assert report.totals.relative_change == pytest.approx(
        float((want - dW).norm() / dW.norm()), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_same_finds_what_rank_r_can_hold(seed):
    adapter, subspace, dW = cancelling(1e-5, seed)
    corrected, report = csulora.correct(adapter, subspace, Correction(form="same"), device="cpu")
    new, found = corrected.modules[NAME], subspace.modules[NAME]
    want = wanted(Correction(), dW, None, found)
    S = torch.linalg.svdvals(want)
    error = (new.B.double() @ new.A.double() - want).norm()
    assert error <= 2 * S[2:].norm() + FLOAT32 * want.norm()
    module = report.modules[NAME]
    assert module.rank_error == pytest.approx(float(error / want.norm()), rel=1e-3, abs=1e-7)


NONE = Correction(0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize(
    "method",
    [NONE, Correction(strength_for={"*": 0}), Realignment(0)],
    ids=["none", "own", "shift"],
)
def test_what_is_left_as_it_is_has_its_true_figures(method, size, seed):
    adapter, subspace, dW = cancelling(size, seed)
    found = subspace.modules[NAME]
    inside, outside = (
        oracle.correct(dW, found.U.double(), found.V.double(), strengths, "direction")
        for strengths in ((0, *3 * [torch.inf]), (*3 * [torch.inf], 0))
    )
    energy = float(dW.square().sum())
    wanted = [float(X.square().sum()) / energy for X in (inside, outside)]
    new, report = csulora.correct(adapter, subspace, method, device="cpu")
    for module in (report.modules[NAME], csulora.decompose(adapter, subspace).modules[NAME]):
        shares = module.relative_energy_before
        assert module.energy_before == pytest.approx(energy, rel=1e-5)
        assert [shares["aligned"], shares["off"]] == pytest.approx(wanted, rel=1e-4)
    for side in "AB":
        assert torch.equal(getattr(new.modules[NAME], side), getattr(adapter.modules[NAME], side))
    # Where it is not stored as it was, it has to be in a form that bears that.
    for dtype, portable in ((torch.bfloat16, False), (torch.float16, False), (None, True)):
        new, _ = csulora.correct(
            adapter, subspace, method, dtype=dtype, portable=portable, device="cpu"
        )
        module = new.modules[NAME]
        stored = module.scaling * module.B.double() @ module.A.double()
        assert (stored - dW).norm() <= TOLERANCES[module.B.dtype] * dW.norm()


@pytest.mark.parametrize("form", ["exact", "same"])
@pytest.mark.parametrize("strength", [1e4, 1e8, 1e12, torch.inf])
def test_systems_that_rounding_makes_singular_are_solved_in_float64(strength, form):
    """Alone and in company, which an error would take along."""
    method = Correction(0, strength, strength, strength, form=form)
    for seed in range(16):
        adapter, subspace, dW = cancelling([1e-3, 1e-4][seed % 2], seed)
        (new, report), other = csulora.correct_batch([adapter] * 2, subspace, method, device="cpu")
        assert report.to_dict() == other[1].to_dict()
        want = wanted(Correction(*method.strengths), dW, None, subspace.modules[NAME])
        error = (new.modules[NAME].B.double() @ new.modules[NAME].A.double() - want).norm()
        if form == "exact":
            assert error <= FLOAT32 * want.norm()
        else:
            assert error <= (report.totals.rank_error + FLOAT32) * want.norm() * (1 + 1e-3)
