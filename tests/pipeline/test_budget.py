"""Budgets: the strength that is found changes the adapter by what was asked for, by dense matrices."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SEVERAL, several, truth, update

from csulora import (
    Correction,
    CsuloraError,
    LoraModule,
    Realignment,
    SafetySubspace,
    correct,
    correct_batch,
    decompose,
)
from csulora.baselines import scaled
from csulora.method import budget as budgets
from csulora.pipeline.plan import Plan
from csulora.settings import FORMS

Q0, UP0, Q1, UP1 = SEVERAL
EXACT = 1e-6  # how near a budget that can be reached is
METHODS = [
    Correction(),
    Correction(granularity="component"),
    Correction(form="same"),
    Correction(form="same", granularity="component"),
    Realignment(),
    Realignment(edge=False, target=0.3),
    Realignment(form="exact"),
    Realignment(opposed=True),
]


def within(method, **budget):
    """The method with a budget in place of its strength."""
    return replace(method, budget=budget)


def change_of(before, after):
    """||dW* - dW|| / ||dW|| over all modules, of dense matrices."""
    change = sum(
        float((update(after.modules[n]) - update(m)).square().sum())
        for n, m in before.modules.items()
    )
    return math.sqrt(change / energy_of(before))


def energy_of(adapter):
    return sum(float(update(module).square().sum()) for module in adapter.modules.values())


def off_of(before, after, subspace):
    """Energy of the off block afterwards over all energy before, of dense matrices."""
    left = sum(
        float(oracle.energies(update(m), subspace.modules[n].U, subspace.modules[n].V)[3])
        for n, m in after.modules.items()
    )
    return left / energy_of(before)


@pytest.mark.parametrize("limit", [1e-3, 0.05, 0.2, 0.3])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_change_is_the_budget(method, limit):
    adapter, subspace = several()
    new, report = correct(adapter, subspace, within(method, change=limit))
    assert change_of(adapter, new) == pytest.approx(limit, abs=EXACT)
    assert report.totals.relative_change == pytest.approx(limit, abs=EXACT)
    assert 0 < report.strength < math.inf and report.settings["budget"] == {"change": limit}
    assert not any("budget" in warning for warning in report.warnings)
    # The strength is the one that gives the same without a budget.
    again, _ = correct(adapter, subspace, method.with_strength(report.strength))
    for name, module in new.modules.items():
        assert torch.equal(module.A, again.modules[name].A)
        assert torch.equal(module.B, again.modules[name].B)


@pytest.mark.parametrize("limit", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Correction)], ids=str)
def test_the_off_block_is_the_budget(method, limit):
    adapter, subspace = several()
    new, report = correct(adapter, subspace, within(method, off=limit))
    assert off_of(adapter, new, subspace) == pytest.approx(limit, abs=EXACT)
    assert report.totals.relative_energy_after["off"] == pytest.approx(limit, abs=EXACT)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[4], METHODS[6]], ids=str)
def test_by_the_dense_truth_at_the_strength_that_was_found(method):
    adapter, subspace = several()
    strength = decompose(adapter, subspace, within(method, change=0.2)).strength

    def change(strength):
        parts = (
            truth(m, subspace.modules[n], method.with_strength(strength)) - update(m)
            for n, m in adapter.modules.items()
        )
        return math.sqrt(sum(float(X.square().sum()) for X in parts) / energy_of(adapter))

    assert change(strength) == pytest.approx(0.2, abs=EXACT)
    assert change(1.01 * strength) > 0.2 + EXACT and change(0.99 * strength) < 0.2 - EXACT


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_budget_beyond_the_limit_takes_the_limit_and_says_so(method):
    adapter, subspace = several()
    new, report = correct(adapter, subspace, within(method, change=1.5))
    limit, expected = correct(adapter, subspace, method.with_strength(math.inf))
    assert report.strength == math.inf and report.totals == expected.totals
    assert all(torch.equal(m.A, limit.modules[n].A) for n, m in new.modules.items())
    (warning,) = [text for text in report.warnings if "budget" in text]
    reached = expected.totals.relative_change
    assert warning == f"the budget change=1.5 is beyond reach: at strength inf it is {reached:.4g}"


def test_an_off_block_within_its_budget_is_left_alone():
    adapter, subspace = several()
    before = decompose(adapter, subspace).totals.relative_energy_before["off"]
    new, report = correct(adapter, subspace, Correction(budget={"off": before + 0.01}))
    assert report.strength == 0 and report.totals.relative_change == 0
    assert all(torch.equal(m.B, adapter.modules[n].B) for n, m in new.modules.items())
    assert f"is kept to by strength 0: it is {before:.4g} before" in report.warnings[-1]


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2], METHODS[4]], ids=str)
def test_modules_with_strengths_of_their_own_keep_them(method):
    adapter, subspace = several()
    patterns = {"q_proj": 0, "layers.0.self_attn.*": 2, "layers.1.mlp.*": "drop"}
    share = float(update(adapter.modules[UP1]).square().sum()) / energy_of(adapter)
    limit = 1.05 * math.sqrt(share)
    asked = replace(within(method, change=limit), strength_for=patterns)
    new, report = correct(adapter, subspace, asked)
    assert change_of(adapter, new) == pytest.approx(limit, abs=EXACT)
    assert torch.equal(new.modules[Q1].A, adapter.modules[Q1].A)
    assert not bool(new.modules[UP1].A.any())
    for name, strength in ((Q0, 2), (UP0, report.strength)):
        alone = replace(adapter, modules={name: adapter.modules[name]})
        wanted = correct(alone, subspace, method.with_strength(strength))[0].modules[name]
        torch.testing.assert_close(update(new.modules[name]), update(wanted), rtol=1e-6, atol=1e-6)
    assert report.correction == asked


def test_strengths_of_their_own_beyond_the_budget_are_refused():
    adapter, subspace = several()
    patterns = {"up_proj": "drop"}
    for method in (Correction(), Realignment()):
        asked = replace(within(method, change=0.1), strength_for=patterns)
        with pytest.raises(
            CsuloraError, match=r"budget change=0\.1 cannot be kept to: .* at strength 0"
        ):
            correct(adapter, subspace, asked)
    asked = Correction(strength_for={"up_proj": 0}, budget={"off": 0.01})
    with pytest.raises(
        CsuloraError, match=r"budget off=0\.01 cannot be kept to: .* at strength inf"
    ):
        correct(adapter, subspace, asked)
    with pytest.raises(CsuloraError, match="lambda_aligned"):
        correct(adapter, subspace, Correction(math.inf, budget={"change": 0.01}))


@pytest.mark.parametrize("form", FORMS)
def test_beside_a_strength_of_the_aligned_block(form):
    adapter, subspace = several()
    settings = Correction(0.5, form=form, budget={"change": 0.4})
    new, report = correct(adapter, subspace, settings)
    assert change_of(adapter, new) == pytest.approx(0.4, abs=EXACT)
    assert report.settings["lambda_aligned"] == 0.5 and "lambda_off" not in report.settings


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_half_types_find_what_their_values_say(method):
    """The change of the update before its rounding; what is written adds that."""
    adapter, subspace = several(torch.bfloat16)
    _, report = correct(adapter, subspace, within(method, change=0.2))
    assert report.totals.relative_change == pytest.approx(0.2, abs=EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Correction, Realignment])
def test_modules_that_float32_would_spoil(kind, form):
    adapter, subspace = several()
    modules = dict(adapter.modules)
    modules[Q0] = replace(modules[Q0], B=1e-17 * modules[Q0].B, A=1e17 * modules[Q0].A)
    B = modules[UP0].B.clone()
    B[:, -1] = B[:, 0] + 1e-6 * B[:, -1]
    modules[UP0] = replace(modules[UP0], B=B)
    adapter = replace(adapter, modules=modules)
    new, report = correct(adapter, subspace, kind(form=form, budget={"change": 0.2}))
    assert change_of(adapter, new) == pytest.approx(0.2, abs=EXACT)
    assert report.totals.relative_change == pytest.approx(0.2, abs=EXACT)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("limit", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_factors_of_lower_rank_than_they_have_columns(method, limit, q):
    adapter, subspace = several()
    modules = {}
    for name, m in adapter.modules.items():
        B = m.B.clone()
        B[:, q:] = B[:, :1] * torch.arange(1, B.shape[1] - q + 1)
        modules[name] = replace(m, B=B)
    adapter = replace(adapter, modules=modules)
    new, report = correct(adapter, subspace, within(method, change=limit))
    assert change_of(adapter, new) <= limit + EXACT
    if report.strength < math.inf:
        assert change_of(adapter, new) == pytest.approx(limit, abs=EXACT)


@pytest.mark.parametrize("method", [Correction(), Realignment()])
def test_every_way_finds_the_same_strength(method):
    adapter, subspace = several()
    asked = within(method, change=0.2)
    found = {decompose(adapter, subspace, asked).strength}
    for dtype in (None, torch.float16):
        for portable in (False, True):
            _, report = correct(adapter, subspace, asked, portable=portable, dtype=dtype)
            found.add(report.strength)
    assert len(found) == 1


def test_each_adapter_of_a_batch_has_its_own():
    (one, subspace), (two, _) = several(), several(seed=7, size=20.0)
    asked = Realignment(budget={"change": 0.1})
    found = correct_batch([one, two], subspace, asked)
    assert found[0][1].strength != found[1][1].strength
    for adapter, (new, report) in zip((one, two), found, strict=True):
        assert change_of(adapter, new) == pytest.approx(0.1, abs=EXACT)
        assert report.strength == correct(adapter, subspace, asked)[1].strength


def test_one_with_nan_is_its_own_error():
    adapter, subspace = several()
    broken = replace(adapter, modules=dict(adapter.modules))
    A = broken.modules[UP0].A.clone()
    A[0, 0] = math.nan
    broken.modules[UP0] = replace(broken.modules[UP0], A=A)
    fine, failed = correct_batch([adapter, broken], subspace, Correction(budget={"change": 0.1}))
    assert isinstance(failed, CsuloraError) and UP0 in str(failed)
    assert not isinstance(fine, CsuloraError)


@pytest.mark.parametrize("method", [Correction(), Correction(form="same"), Realignment()])
def test_adapters_of_zeros_and_modules_without_directions(method):
    adapter, subspace = several()
    zeros = {n: replace(m, B=torch.zeros_like(m.B)) for n, m in adapter.modules.items()}
    report = decompose(replace(adapter, modules=zeros), subspace, within(method, change=0.1))
    assert report.totals.relative_change == 0 and report.strength == math.inf
    empty = replace(
        subspace.modules[Q0],
        U=torch.zeros(40, 0),
        S=torch.zeros(0),
        V=torch.zeros(32, 0),
        energy_share=0.0,
    )
    partly = SafetySubspace(subspace.modules | {Q0: empty}, subspace.origin)
    report = decompose(adapter, partly, within(method, change=0.1))
    assert report.totals.relative_change == pytest.approx(0.1, abs=EXACT)


METHOD = st.sampled_from(METHODS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(METHOD, st.floats(1e-6, 1.2), st.floats(1e-6, 1.2), st.integers(0, 5))
def test_a_larger_budget_takes_a_larger_strength(method, one, two, seed):
    adapter, subspace = several(seed=seed)
    low, high = (
        decompose(adapter, subspace, within(method, change=limit)) for limit in sorted((one, two))
    )
    assert low.strength <= high.strength
    for report, limit in ((low, min(one, two)), (high, max(one, two))):
        assert report.totals.relative_change <= limit + EXACT
        if report.strength < math.inf:
            assert report.totals.relative_change == pytest.approx(limit, abs=EXACT)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(METHOD, st.floats(-3, 3), st.integers(0, 5))
def test_how_an_update_is_split_into_its_factors_does_not_count(method, power, seed):
    adapter, subspace = several(torch.float32, seed=seed)
    c = 2.0 ** round(4 * power)
    turned = {
        n: LoraModule(m.A / c, m.B * c * 2, m.alpha, m.scaling / 2)
        for n, m in adapter.modules.items()
    }
    asked = within(method, change=0.2)
    found = (decompose(a, subspace, asked) for a in (adapter, replace(adapter, modules=turned)))
    one, two = (report.strength for report in found)
    assert one == pytest.approx(two, rel=1e-6)


def test_a_plan_with_a_budget_is_one_without_that_was_looked_up():
    adapter, subspace = several()
    plan = Plan.of(adapter, subspace, Realignment(budget={"change": 0.1}))
    assert {m.correction for m in plan.members} == {Realignment(plan.strength)}


def test_few_looks_find_it(monkeypatch):
    """A fitted form is solved for at every look."""
    looks, found = [], budgets._figure

    def counted(*arguments):
        figure = found(*arguments)
        return lambda strength: looks.append(strength) or figure(strength)

    monkeypatch.setattr(budgets, "_figure", counted)
    adapter, subspace = several()
    for method in METHODS:
        looks.clear()
        decompose(adapter, subspace, within(method, change=0.2))
        assert len(looks) <= 35, method


def test_an_adapter_that_is_next_to_nothing_is_said_to_be():
    adapter, subspace = several()
    tiny = scaled(adapter, 1e-9)
    _, report = correct(tiny, subspace, Realignment())
    assert report.totals.relative_change > 1
    assert "what alignment did is large beside the adapter" in " ".join(report.warnings)
    kept, report = correct(tiny, subspace, Realignment(budget={"change": 1e-12}))
    assert report.strength == 0
    assert "by strength 0 alone" in " ".join(report.warnings)
    assert all(torch.equal(kept.modules[n].A, m.A) for n, m in tiny.modules.items())
