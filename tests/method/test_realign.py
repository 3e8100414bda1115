"""Realignment in factor form against dense float64 matrices, and its invariants."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import factors, quick
from tolerances import TOLERANCES

from csulora.method import in_float64, realign, stages
from csulora.settings import FORMS, Realignment

SHAPES = [  # d_out, d_in, r, k
    (48, 40, 1, 3),
    (96, 64, 8, 16),
    (64, 96, 40, 16),  # r above k
    (33, 70, 3, 7),
    (300, 260, 16, 64),
    (40, 24, 8, 24),  # the subspace spans the whole input side
    (20, 30, 4, 0),  # no subspace at all
]
SETTINGS = [
    Realignment(0.3),
    Realignment(),
    Realignment(1e4, target=0.25),
    Realignment(math.inf),
    Realignment(5, target=0),
    Realignment(5, opposed=True),
    Realignment(5, edge=False),
]


def problem(shape, dtype=torch.float64, seed=0, inside=1.0):
    """B, A, U, S, V and the spectrum of a D as large as the update, an edge amid its values."""
    B, A, U, V = factors(*shape, dtype=dtype, seed=seed, inside=inside)
    k = U.shape[1]
    S = (2.0 ** -torch.arange(k, dtype=torch.float64) + 0.2).to(dtype)
    S = S * float((B @ A).norm()) / max(float(S.norm()), 1e-9) / 2
    edge = float(S[k // 2]) if k else 0.0
    values = (torch.tensor(x, dtype=torch.float64) for x in (edge, 2.0))
    return B, A, U, S, V, realign.Spectrum(S.double(), *values)


def run(B, A, U, S, V, spectrum, settings):
    projection = stages.project(B, A, U, V)
    shift, figures = realign.solve(projection, spectrum, settings)
    return (*realign.recompose(B, A, U, V, shift), figures)


def wanted_of(B, A, U, S, V, spectrum, settings):
    s = float(spectrum.scaling)
    truth = oracle.realign(
        s * B.double() @ A.double(),
        U,
        S,
        V,
        strength=settings.strength,
        gamma=settings.gamma,
        edge=float(spectrum.edge) if settings.edge else 0.0,
        opposed=settings.opposed,
        B=B if settings.form == "same" else None,
    )
    return truth / s


def with_form(settings, form):
    return Realignment(
        settings.strength, settings.target, settings.edge, settings.opposed, form=form
    )


def relative_error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_oracle(shape, settings, form, dtype):
    settings = with_form(settings, form)
    parts = problem(shape, dtype)
    B = parts[0]
    B_new, A_new, figures = run(*parts, settings)
    d_out, d_in, r, k = shape
    rank = r if form == "same" else r + k
    assert B_new.shape == (d_out, rank) and A_new.shape == (rank, d_in)
    wanted = wanted_of(*parts, settings)
    assert relative_error(B_new.double() @ A_new.double(), wanted) <= TOLERANCES[dtype]
    if form == "same":
        assert B_new is B
    else:
        assert float(figures.rank_error) == 0


@pytest.mark.parametrize("strength", [0.5, 3.0, 100.0])
def test_exact_is_the_minimiser_and_same_its_least_squares_fit(strength):
    """The definitions of docs/method.md, by their gradients; no share of directions is computed here."""
    B, A, U, S, V, spectrum = problem((40, 30, 4, 6))
    dW, gamma, s = 2 * B @ A, 0.7, 2.0
    D = (U * S) @ V.mT
    settings = Realignment(strength, gamma, edge=False, form="exact")
    B_new, A_new, _ = run(B, A, U, S, V, spectrum, settings)
    X = s * B_new @ A_new
    gradient = X - dW + strength / float(S[0]) ** 2 * (X - gamma * D) @ D.mT @ D
    assert float(gradient.norm()) <= 1e-11 * float(dW.norm())
    same = Realignment(strength, gamma, edge=False)
    B_same, A_same, _ = run(B, A, U, S, V, spectrum, same)
    rest = X - s * B_same @ A_same
    # The best fit B can give to what is put in place: what is left over is orthogonal to B.
    assert float((B.mT @ rest).norm()) <= 1e-11 * float(B.norm() * X.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_energies_and_change_are_those_of_the_matrices(settings, form):
    settings = with_form(settings, form)
    parts = problem((96, 64, 8, 16))
    B, A, U, _, V, _ = parts
    B_new, A_new, figures = run(*parts, settings)
    careful, again = in_float64.realign(B, A, U, V, parts[-1], settings, 25.0)
    before, after = B @ A, B_new @ A_new
    E = before.square().sum()
    exact = wanted_of(*parts, with_form(settings_at_gamma(settings), "exact"))
    for known in (figures, again):
        torch.testing.assert_close(known.energy, E)
        torch.testing.assert_close(known.before, oracle.energies(before, U, V) / E)
        torch.testing.assert_close(known.after, oracle.energies(after, U, V) / E)
        torch.testing.assert_close(known.relative_change, (after - before).norm() / E.sqrt())
        distance = relative_error(after, exact)
        assert float(known.rank_error) == pytest.approx(distance, rel=1e-9, abs=1e-9)
    B_careful, A_careful = careful.factors(B_new.shape[1])
    assert relative_error(B_careful @ A_careful, after) <= 1e-12


def settings_at_gamma(settings):
    """The same, with the target that stands for None written out."""
    return Realignment(settings.strength, settings.gamma, settings.edge, settings.opposed)


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_solved_like_its_modules(form):
    alone = [problem((40, 30, 5, 6), seed=seed) for seed in range(3)]
    settings = Realignment(form=form)
    stacked = [torch.stack(parts) for parts in zip(*(p[:5] for p in alone), strict=True)]
    spectra = realign.Spectrum(*(torch.stack(x) for x in zip(*(p[5] for p in alone), strict=True)))
    B, A, U, _, V = stacked
    shift, figures = realign.solve(stages.project(B, A, U, V), spectra, settings)
    for i, (one, part) in enumerate(zip(shift.unbind(), alone, strict=True)):
        B_new, A_new = realign.recompose(part[0], part[1], part[2], part[4], one)
        B_one, A_one, own = run(*part, settings)
        assert relative_error(B_new @ A_new, B_one @ A_one) <= 1e-12
        torch.testing.assert_close(figures.after[i], own.after)


# --- the noise edge ---------------------------------------------------------------------------------


def leading(D, k):
    """S of the k leading triplets, and the share of the energy that they hold."""
    S = torch.linalg.svdvals(D)
    return S[:k], float(S[:k].square().sum() / S.square().sum())


@pytest.mark.parametrize("k", [16, 64])
@pytest.mark.parametrize("shape", [(200, 160), (90, 400)])
def test_edge_is_where_noise_ends(shape, k):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    noise = 0.3 * randn(*shape)
    X, Y = (torch.linalg.qr(randn(d, 5)).Q for d in shape)
    largest = float(torch.linalg.svdvals(noise)[0])
    for planted in (1.5, 8.0):
        D = noise + planted * largest * X @ Y.mT
        S, share = leading(D, k)
        edge = realign.noise_edge(S, share, *shape)
        assert edge == pytest.approx(largest, rel=0.05)
        assert int((edge < S).sum()) == 5
    S, share = leading(noise, k)
    assert int((realign.noise_edge(S, share, *shape) < S).sum()) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0, 1.0000001])
def test_no_edge_where_no_remainder_is_known(share):
    assert realign.noise_edge(torch.tensor([3.0, 2.0]), share, 8, 9) == 0.0


def test_no_edge_of_nothing():
    assert realign.noise_edge(torch.zeros(3), 0.5, 8, 9) == 0.0
    assert realign.noise_edge(torch.zeros(0), 0.5, 8, 9) == 0.0


# --- invariants -------------------------------------------------------------------------------------

shapes = st.tuples(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(0, 99),
).map(lambda t: ((*t[:2], t[2], min(t[3], t[0], t[1])), t[4]))
strengths = st.one_of(st.floats(1e-3, 1e4), st.just(math.inf))
any_settings = st.builds(
    Realignment,
    strengths,
    st.one_of(st.none(), st.floats(0, 2)),
    st.booleans(),
    st.booleans(),
    form=st.sampled_from(FORMS),
)


def careful(parts, settings):
    """The update through the float64 path, which takes any B, as a matrix; and its figures."""
    B, A, U, _, V, spectrum = parts
    found, figures = in_float64.realign(B, A, U, V, spectrum, settings, 25.0)
    r, k = B.shape[1], U.shape[1]
    B_new, A_new = found.factors(r if settings.form == "same" else r + k)
    return B_new @ A_new, figures


@quick
@given(shapes, any_settings)
def test_the_float64_path_equals_oracle_for_any_rank(shape, settings):
    parts = problem(shape[0], seed=shape[1])
    found, figures = careful(parts, settings)
    wanted = wanted_of(*parts, settings)
    assert float((found - wanted).norm()) <= 1e-9 * float((parts[0] @ parts[1]).norm())
    assert all(bool(torch.isfinite(X).all()) for X in figures)


@quick
@given(shapes, st.sampled_from(FORMS))
def test_strength_zero_is_the_identity(shape, form):
    parts = problem(shape[0], seed=shape[1])
    found, figures = careful(parts, Realignment(0, form=form))
    assert relative_error(found, parts[0] @ parts[1]) <= 1e-12
    assert float(figures.relative_change) <= 1e-12


@quick
@given(shapes, any_settings)
def test_target_zero_only_takes_away(shape, settings):
    """No output direction gains: the update shrinks as a quadratic form."""
    settings = Realignment(settings.strength, 0.0, settings.edge, settings.opposed, settings.form)
    parts = problem(shape[0], seed=shape[1])
    before = parts[0] @ parts[1]
    found, figures = careful(parts, settings)
    gain = torch.linalg.eigvalsh(found @ found.mT - before @ before.mT)
    assert float(gain.max()) <= 1e-10 * float(before.square().sum())
    assert float(figures.after.sum()) <= 1 + 1e-12


@quick
@given(shapes, any_settings)
def test_an_adapter_that_does_what_alignment_did_is_left_alone(shape, settings):
    B, A, U, S, V, spectrum = problem(shape[0], seed=shape[1])
    # gamma D on D's inputs, anything outside of them.
    outside = A - (A @ V) @ V.mT
    D = settings.gamma / float(spectrum.scaling) * (U * S)
    B = torch.cat([B, D], dim=1)
    A = torch.cat([outside, V.mT])
    found, _ = careful((B, A, U, S, V, spectrum), settings)
    assert float((found - B @ A).norm()) <= 1e-9 * max(float((B @ A).norm()), 1e-12)


@quick
@given(shapes, any_settings, st.integers(-8, 8))
def test_scaling_b_against_a_changes_nothing(shape, settings, exponent):
    B, A, *rest = problem(shape[0], seed=shape[1])
    found, _ = careful((B, A, *rest), settings)
    moved, _ = careful((B * 10.0**exponent, A / 10.0**exponent, *rest), settings)
    assert float((found - moved).norm()) <= 1e-9 * float((B @ A).norm())


@pytest.mark.parametrize("form", FORMS)
def test_zero_update_stays_zero_without_nan(form):
    B, A, U, S, V, spectrum = problem((20, 30, 4, 5))
    nothing = torch.zeros((), dtype=torch.float64)
    for parts in (
        (0 * B, A, U, S, V, spectrum),
        (B, 0 * A, U, S, V, spectrum),
        (B, A, U, S, V, spectrum._replace(scaling=nothing)),
    ):
        B_new, A_new, figures = run(*parts, Realignment(form=form))
        assert torch.equal(B_new @ A_new, parts[0] @ parts[1])
        found, again = careful(parts, Realignment(form=form))
        torch.testing.assert_close(found, parts[0] @ parts[1])
        for known in (figures, again):
            assert float(known.relative_change) <= 1e-12
            assert all(bool(torch.isfinite(X).all()) for X in known)


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_rank_deficient_b(settings):
    """Columns that others give, that are zero, and more columns than rows."""
    B, A, U, S, V, spectrum = problem((40, 30, 6, 5))
    B[:, 5], B[:, 4] = B[:, 0] - 2 * B[:, 1], 0
    wide = problem((6, 30, 9, 4))
    for parts in ((B, A, U, S, V, spectrum), wide):
        found, _ = careful(parts, settings)
        assert relative_error(found, wanted_of(*parts, settings)) <= 1e-10
        projection = stages.project(*parts[:3], parts[4])
        shift, _ = realign.solve(projection, spectrum if parts is not wide else wide[-1], settings)
        assert torch.isinf(shift.inverse_diagonal).all()  # so that no float32 result of it is used
