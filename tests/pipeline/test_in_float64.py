"""Modules whose result float32 would spoil, through `csulora.correct`, against the dense oracle."""

import math

import oracle
import pytest
import torch
from problems import corrected, factors
from tolerances import TOLERANCES

import csulora
from csulora.method.precision import COMPUTING_LIMIT, solve_with_amplification
from csulora.method.stages import project, solve
from csulora.settings import FORMS, GRANULARITIES

NAME = "model.layers.0.mlp.down_proj"
ALL = (1e4, 1e4, 1e4, 1e4)
REST = (0, 1e4, 1e4, 1e4)
CASES = [  # d_out, d_in, r, k, strengths
    ((64, 64, 4, 64), ALL),  # the subspace is everything
    ((64, 64, 4, 63), ALL),
    ((64, 128, 16, 60), ALL),
    ((16, 32, 4, 16), ALL),
    ((32, 32, 4, 24), (1e3, 1e3, 1e3, 1e3)),
    ((32, 16, 4, 16), (1e3, 0, 0, 0)),
    ((64, 64, 8, 4), ALL),
    ((32, 32, 3, 1), REST),
    ((300, 260, 16, 64), REST),
    ((20, 30, 4, 0), ALL),
]


def relative_error(module, wanted):
    found = module.B.double() @ module.A.double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "strengths"), CASES)
def test_small_results_are_as_exact_as_large_ones(shape, strengths, granularity, dtype):
    for seed in range(3):
        B, A, U, V = factors(*shape, seed=seed)
        B, A, U, V = B.to(dtype), A.to(dtype), U.float(), V.float()
        wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
        module, report = corrected(B, A, U, V, csulora.Correction(*strengths, granularity))
        assert module.B.dtype == module.A.dtype == dtype
        assert relative_error(module, wanted) <= TOLERANCES[dtype]
        left = float(wanted.square().sum() / (B.double() @ A.double()).square().sum())
        assert sum(report.relative_energy_after.values()) == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(64, 48, 64, 8), (32, 32, 32, 8), (16, 64, 20, 4), (8, 32, 16, 3)]
)
@pytest.mark.parametrize("strengths", [(0, 1e3, 1e3, 1e3), (0, 0, 0, 1e4), (1, 1000, math.inf, 10)])
def test_same_with_a_rank_near_or_above_the_sides(shape, strengths, dtype):
    for seed in range(3):
        B, A, U, V = factors(*shape, seed=seed)
        if shape[2] > 8:
            B[:, 1], A[1] = B[:, 0], 0
        B, A, U, V = B.to(dtype), A.to(dtype), U.float(), V.float()
        dW = B.double() @ A.double()
        wanted = oracle.correct(dW, U, V, strengths, "direction")
        module, report = corrected(B, A, U, V, csulora.Correction(*strengths, form="same"))
        kept, truth = (
            oracle.blocks(X, U, V)[0] for X in (module.B.double() @ module.A.double(), wanted)
        )
        assert float((kept - truth).norm() / wanted.norm()) <= TOLERANCES[dtype]
        slack = TOLERANCES[dtype] if dtype == torch.bfloat16 else 2e-5
        assert relative_error(module, wanted) == pytest.approx(report.rank_error, abs=slack)


@pytest.mark.parametrize("span", [2, 4])
def test_a_lopsided_gauge_changes_nothing(span):
    for seed in range(3):
        B, A, U, V = factors(32, 48, 16, 17, dtype=torch.float32, seed=seed)
        t = torch.logspace(-span, span, 16)
        B, A = B * t, A / t[:, None]
        wanted = oracle.correct(B.double() @ A.double(), U, V, (0, 10, 10, 10), "direction")
        module, _ = corrected(B, A, U, V, csulora.Correction())
        assert relative_error(module, wanted) <= TOLERANCES[torch.float32]


def test_an_ordinary_module_takes_the_fast_path():
    for seed in range(3):
        projection = project(*factors(300, 260, 16, 64, dtype=torch.float32, seed=seed))
        for form in FORMS:
            correction = csulora.Correction(form=form)
            *_, amplification = solve_with_amplification(projection, correction)
            assert max(map(float, amplification)) < COMPUTING_LIMIT / 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("outside", [3e-3, 1e-3, 5e-4])
@pytest.mark.parametrize("shape", [(64, 64, 1, 1), (16, 64, 2, 1), (64, 16, 1, 4), (16, 16, 4, 1)])
def test_cores_follow_energies_that_float32_holds_no_digits_of(shape, outside, granularity):
    """A lies nearly in the subspace, and what is outside of it decides about the strength there."""
    for seed in range(12):
        B, A, U, V = factors(*shape, seed=seed)
        U, V = U.float(), V.float()
        A = (A @ V.double()) @ V.double().mT + outside * A
        strengths = (0, 1e3, [1e2, 1e4][seed % 2], 1e4)
        B, A = B.float(), A.float()
        wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
        module, _ = corrected(B, A, U, V, csulora.Correction(*strengths, granularity))
        assert relative_error(module, wanted) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("outside", [3e-4, 1e-4, 3e-5])
@pytest.mark.parametrize("off", [1e4, 1e6, 1e8, 1e12])
def test_a_block_that_float32_loses_is_attenuated_all_the_same(off, outside, granularity):
    """Beyond the strengths for which 1e-5 is promised it would stay as it is: as large as `outside`."""
    for seed in range(6):
        B, A, U, V = (X.float() for X in factors(60, 50, 2, 5, seed=seed))
        A = (A @ V) @ V.mT + outside * A
        strengths = (0, 10, 10, off)
        wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
        module, _ = corrected(B, A, U, V, csulora.Correction(*strengths, granularity))
        assert relative_error(module, wanted) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("strengths", [(0, 3, 3, 3), (0, 1e3, 1e3, 1e3), (1e3, 3, 3, 0)])
@pytest.mark.parametrize("r", [4, 8, 16])
@pytest.mark.parametrize("kind", ["double", "zero"])
def test_same_uses_the_rank_that_dependent_columns_leave(kind, r, strengths):
    """As well as the fit does that knows nothing of them, in float64."""
    for seed in range(4):
        B, A, U, V = (X.float() for X in factors(64, 48, r, 2, seed=seed))
        B[:, -1] = B[:, 0] if kind == "double" else 0
        method = csulora.Correction(*strengths, form="same")
        module, report = corrected(B, A, U, V, method)
        plain = project(*(X.double() for X in (B, A, U, V)))
        wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, "direction")
        known = float(solve(plain, method)[1].rank_error)
        assert report.rank_error == pytest.approx(
            relative_error(module, wanted), rel=1e-2, abs=1e-5
        )
        assert report.rank_error <= 1.2 * known + 1e-6
