"""The factor form against the dense float64 oracle."""

import itertools
import math

import oracle
import pytest
import torch
from problems import factors, run
from tolerances import TOLERANCES

from csulora.settings import FORMS, GRANULARITIES, Correction

SHAPES = [  # d_out, d_in, r, k
    (48, 40, 1, 3),
    (96, 64, 8, 16),
    (64, 96, 40, 16),  # r above k
    (33, 70, 3, 7),
    (300, 260, 16, 64),
    (40, 24, 8, 24),  # the subspace spans the whole input side
    (20, 30, 4, 0),  # no subspace at all
]
STRENGTHS = [
    (0, 10, 10, 10),
    (0, 1e4, 1e4, 1e4),
    (0, 0, 0, 1e4),
    (10, 0, 10, 0),
    (1e4, 1, 1e2, 0),
    (3, 3, 3, 3),
    (0, math.inf, math.inf, math.inf),
]


def relative_error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_equals_oracle(shape, strengths, granularity, dtype):
    B, A, U, V = factors(*shape, dtype=dtype)
    wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
    B_new, A_new, figures = run(B, A, U, V, Correction(*strengths, granularity=granularity))
    assert B_new.shape == (shape[0], 2 * shape[2]) and A_new.shape == (2 * shape[2], shape[1])
    # Factors of an update that is all but removed still carry the rounding of the update itself.
    floor = 2 * torch.finfo(dtype).eps * float((B @ A).norm())
    error = float((B_new.double() @ A_new.double() - wanted).norm())
    assert error <= max(TOLERANCES[dtype] * float(wanted.norm()), floor)
    assert float(figures.rank_error) == 0


@pytest.mark.parametrize("inside", [1.0, 3.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("strengths", STRENGTHS[:6])
def test_exact_float32_where_the_update_lies_mostly_inside(strengths, granularity, inside):
    B, A, U, V = factors(300, 260, 16, 8, dtype=torch.float32, inside=inside)
    wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
    B_new, A_new, _ = run(B, A, U, V, Correction(*strengths, granularity=granularity))
    assert relative_error(B_new.double() @ A_new.double(), wanted) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("strengths", STRENGTHS[:6])
@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_keeps_the_pinned_block_and_reports_its_error(shape, strengths, granularity, dtype):
    B, A, U, V = factors(*shape, dtype=dtype)
    correction = Correction(*strengths, granularity=granularity, form="same")
    B_new, A_new, figures = run(B, A, U, V, correction)
    assert B_new.shape == B.shape and A_new.shape == A.shape
    dW, found = B.double() @ A.double(), B_new.double() @ A_new.double()
    wanted = oracle.correct(dW, U, V, strengths, granularity)
    pinned = 0 if strengths[0] <= strengths[3] else 3
    kept = oracle.blocks(found, U, V)[pinned]
    truth = oracle.blocks(wanted, U, V)[pinned]
    assert relative_error(kept, truth) <= TOLERANCES[dtype]
    assert relative_error(found, wanted) == pytest.approx(float(figures.rank_error), abs=2e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_same_is_near_the_best_rank_r_matrix(granularity):
    """Never past twice the best rank-r error (which need not keep any block) at the defaults."""
    for seed, shape in itertools.product(range(3), SHAPES[1:2] + SHAPES[4:5]):
        B, A, U, V = factors(*shape, seed=seed)
        correction = Correction(granularity=granularity, form="same")
        _, _, figures = run(B, A, U, V, correction)
        wanted = oracle.correct(B @ A, U, V, correction.strengths, granularity)
        singular = torch.linalg.svdvals(wanted)
        best = float(singular[shape[2] :].norm() / singular.norm())
        assert float(figures.rank_error) <= 2 * best + 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_energies_and_change_are_those_of_the_matrices(granularity, form):
    B, A, U, V = factors(96, 64, 8, 16)
    correction = Correction(1, 2, 30, 400, granularity=granularity, form=form)
    B_new, A_new, figures = run(B, A, U, V, correction)
    E = (B @ A).square().sum()
    torch.testing.assert_close(figures.energy, E)
    torch.testing.assert_close(figures.before, oracle.energies(B @ A, U, V) / E)
    torch.testing.assert_close(figures.after, oracle.energies(B_new @ A_new, U, V) / E)
    change = (B_new @ A_new - B @ A).norm() / E.sqrt()
    torch.testing.assert_close(figures.relative_change, change)


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_solved_like_its_modules(form):
    """Batched and one by one agree, whatever else is in the batch."""
    correction = Correction(0, 5, 50, 500, form=form)
    alone = [factors(40, 30, 5, 6, seed=seed) for seed in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*alone, strict=True)]
    B_all, A_all, _ = run(*stacked, correction)
    for i, one in enumerate(alone):
        B_one, A_one, _ = run(*one, correction)
        assert relative_error(B_all[i] @ A_all[i], B_one @ A_one) <= 1e-6


def test_zero_update_stays_zero_without_nan():
    B, A, U, V = factors(20, 30, 4, 5)
    for form in FORMS:
        B_new, A_new, figures = run(0 * B, A, U, V, Correction(form=form))
        assert float((B_new @ A_new).abs().max()) == 0
        assert all(bool(torch.isfinite(X).all()) for X in figures)


@pytest.mark.parametrize("strength", [1e6, 1e9, 1e12])
def test_huge_strengths_do_not_blow_up_on_rounding(strength):
    """A factor inside the subspace leaves G - G_in as rounding noise of either sign."""
    B, A, U, V = factors(300, 260, 16, 24, dtype=torch.float32)
    B, A = U @ (U.mT @ B), (A @ V) @ V.mT
    for granularity in GRANULARITIES:
        correction = Correction(0, strength, strength, strength, granularity=granularity)
        B_new, A_new, _ = run(B, A, U, V, correction)
        assert relative_error(B_new.double() @ A_new.double(), B.double() @ A.double()) <= 1e-5


@pytest.mark.parametrize("r", [2, 6])
def test_rank_deficient_factors(r):
    B, A, U, V = factors(40, 30, r, 5)
    B[:, -1], A[-1] = B[:, 0], 0
    for form in FORMS:
        B_new, A_new, figures = run(B, A, U, V, Correction(form=form))
        wanted = oracle.correct(B @ A, U, V, (0, 10, 10, 10), "direction")
        error = relative_error(B_new @ A_new, wanted)
        assert error <= float(figures.rank_error) + 1e-9


@pytest.mark.parametrize("shape", [(29, 5, 12, 4), (12, 2, 7, 0), (34, 6, 12, 0), (2, 3, 11, 1)])
def test_same_returns_the_update_at_strength_zero_where_the_rank_exceeds_a_side(shape):
    """Every system of the fit is singular here, and an error in its null space would grow."""
    for seed in range(20):
        B, A, U, V = factors(*shape, seed=seed)
        B_new, A_new, _ = run(B, A, U, V, Correction(0, 0, 0, 0, form="same"))
        assert relative_error(B_new @ A_new, B @ A) <= 1e-7


def test_same_keeps_a_block_that_fills_the_space_beside_an_empty_pinned_one():
    """A subspace of every direction leaves the pinned off block without energy; the fit has to start."""
    B, A, U, V = factors(2, 2, 1, 2)
    correction = Correction(1, 0, math.inf, 0, form="same")
    B_new, A_new, _ = run(B, A, U, V, correction)
    wanted = oracle.correct(B @ A, U, V, correction.strengths, "direction")
    assert relative_error(B_new @ A_new, wanted) <= 1e-9
