"""Invariants of the method, for shapes and strengths that hypothesis picks."""

import math

import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import factors, quick, run

from csulora.settings import FORMS, GRANULARITIES, Correction

shapes = st.tuples(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(0, 99),
).map(lambda t: (t[0], t[1], t[2], min(t[3], t[0], t[1]), t[4]))
strength = st.one_of(st.just(0.0), st.floats(1e-3, 1e4), st.just(math.inf))
corrections = st.builds(
    Correction,
    strength,
    strength,
    strength,
    strength,
    granularity=st.sampled_from(GRANULARITIES),
)


def problem(shape):
    *sizes, seed = shape
    return factors(*sizes, seed=seed)


def near(found, wanted, scale, tolerance=1e-10):
    return float((found - wanted).norm()) <= tolerance * float(scale.norm())


@quick
@given(shapes, st.sampled_from(GRANULARITIES), st.sampled_from(FORMS))
def test_lambda_zero_is_the_identity(shape, granularity, form):
    B, A, U, V = problem(shape)
    B_new, A_new, _ = run(B, A, U, V, Correction(0, 0, 0, 0, granularity=granularity, form=form))
    # Gram matrices square the condition of the factors, which the fit of `same` divides by.
    assert near(B_new @ A_new, B @ A, B @ A, 1e-7)


@quick
@given(shapes, st.sampled_from(GRANULARITIES))
def test_lambda_to_infinity_is_the_hard_projection(shape, granularity):
    B, A, U, V = problem(shape)
    projected = U @ (U.mT @ B @ A @ V) @ V.mT
    limit = Correction(0, math.inf, math.inf, math.inf, granularity=granularity)
    B_new, A_new, _ = run(B, A, U, V, limit)
    assert near(B_new @ A_new, projected, B @ A)
    # and it is a limit: huge finite strengths come as near as their size allows
    huge = Correction(0, 1e14, 1e14, 1e14, granularity=granularity)
    B_new, A_new, _ = run(B, A, U, V, huge)
    assert near(B_new @ A_new, projected, B @ A, 1e-4)


@quick
@given(shapes, corrections, st.floats(-4, 4), st.sampled_from(FORMS))
def test_scaling_one_factor_against_the_other_changes_nothing(shape, correction, power, form):
    B, A, U, V = problem(shape)
    correction = Correction(*correction.strengths, correction.granularity, form)
    c = 10.0**power
    one, two = run(B, A, U, V, correction), run(B * c, A / c, U, V, correction)
    assert near(two[0] @ two[1], one[0] @ one[1], B @ A, 1e-6)
    torch.testing.assert_close(two[2].before, one[2].before)


@quick
@given(shapes, corrections)
def test_the_result_scales_with_the_update(shape, correction):
    B, A, U, V = problem(shape)
    one, two = run(B, A, U, V, correction), run(3 * B, A, U, V, correction)
    assert near(two[0] @ two[1], 3 * one[0] @ one[1], B @ A, 1e-9)


@quick
@given(shapes, strength, strength, strength, st.sampled_from(GRANULARITIES))
def test_the_aligned_component_is_kept(shape, left, right, off, granularity):
    B, A, U, V = problem(shape)
    for form in FORMS:
        correction = Correction(0, left, right, off, granularity=granularity, form=form)
        B_new, A_new, _ = run(B, A, U, V, correction)
        kept, before = (oracle.blocks(X, U, V)[0] for X in (B_new @ A_new, B @ A))
        assert near(kept, before, B @ A, 1e-9)


@quick
@given(shapes, corrections)
def test_energy_never_grows(shape, correction):
    B, A, U, V = problem(shape)
    _, _, cores = run(B, A, U, V, correction)
    assert bool((cores.after <= cores.before * (1 + 1e-9) + 1e-12).all())


@quick
@given(shapes, st.floats(0.01, 1e3), st.floats(1.1, 100))
def test_more_strength_never_leaves_more(shape, weak, factor):
    B, A, U, V = problem(shape)
    less = run(B, A, U, V, Correction().with_strength(weak))[2]
    more = run(B, A, U, V, Correction().with_strength(weak * factor))[2]
    assert bool((more.after <= less.after + 1e-9).all())


@quick
@given(shapes, corrections, st.integers(0, 99))
def test_a_rotated_basis_is_the_same_subspace(shape, correction, seed):
    B, A, U, V = problem(shape)
    k = U.shape[1]
    generator = torch.Generator().manual_seed(seed)
    R = (
        torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
        if k
        else U[:0]
    )
    one, two = run(B, A, U, V, correction), run(B, A, U @ R, V, correction)
    assert near(two[0] @ two[1], one[0] @ one[1], B @ A, 1e-8)
