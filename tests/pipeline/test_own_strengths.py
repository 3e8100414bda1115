"""Strengths of single modules through `csulora.correct`, by the dense oracle; what is dropped."""

import math
from dataclasses import replace

import pytest
import torch
from problems import SEVERAL, factors, several, truth, update
from tolerances import TOLERANCES

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    LoraModule,
    ModuleSubspace,
    Origin,
    Realignment,
    Report,
    SafetySubspace,
    correct,
    correct_batch,
    decompose,
)
from csulora.pipeline.plan import Plan
from csulora.settings import FORMS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q0, UP0, Q1, UP1 = SEVERAL
# Of q_proj of layer 0 the first and the last pattern are for it, and the last counts.
PATTERNS = {"q_proj": 0, "layers.0.mlp.*": "drop", "layers.1.mlp.*": math.inf, "layers.0.self*": 40}
MIXED = {
    Q0: lambda kind: kind.with_strength(40),
    UP0: None,
    Q1: lambda kind: kind.with_strength(0),
    UP1: lambda kind: kind.with_strength(math.inf),
}
METHODS = [
    Correction(strength_for=PATTERNS),
    Correction(granularity="component", strength_for=PATTERNS),
    Realignment(form="exact", strength_for=PATTERNS),
    Realignment(form="same", strength_for=PATTERNS),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_every_module_has_its_own_strength(settings, portable, dtype):
    adapter, subspace = several(dtype)
    new, report = correct(adapter, subspace, settings, portable=portable)
    plain = replace(settings, strength_for={})
    for name, own in MIXED.items():
        old, found = adapter.modules[name], new.modules[name]
        assert found.A.dtype == found.B.dtype == dtype
        wanted = torch.zeros_like(update(old))
        if own is not None:
            wanted = truth(old, subspace.modules[name], own(plain))
        error = float((update(found) - wanted).norm())
        # Multiplying the scaling into a half type rounds once more.
        assert error <= TOLERANCES[dtype] * float(wanted.norm()), name
        change = float((wanted - update(old)).norm() / update(old).norm())
        assert report.modules[name].relative_change == pytest.approx(change, abs=1e-6), name
    assert report.settings["strength_for"] == {**PATTERNS, "layers.1.mlp.*": "inf"}
    assert report.correction == settings and Report.from_dict(report.to_dict()) == report
    if not portable:
        assert torch.equal(new.modules[Q1].B, adapter.modules[Q1].B)
        assert torch.equal(new.modules[Q1].A, adapter.modules[Q1].A)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Correction, Realignment])
def test_each_is_what_it_would_be_alone(kind, form):
    """In the form `same` of CSULoRA too, which has no dense truth."""
    adapter, subspace = several()
    settings = kind(form=form, strength_for=PATTERNS)
    new, report = correct(adapter, subspace, settings)
    for name, own in MIXED.items():
        if own is None:
            continue
        alone = replace(adapter, modules={name: adapter.modules[name]})
        method = own(kind(form=form))
        wanted, expected = correct(alone, subspace, method)
        torch.testing.assert_close(
            update(new.modules[name]), update(wanted.modules[name]), rtol=1e-5, atol=1e-5
        )
        assert new.modules[name].rank == wanted.modules[name].rank
        assert report.modules[name].relative_change == pytest.approx(
            expected.modules[name].relative_change, abs=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Correction, Realignment])
def test_a_dropped_module_is_zero_at_its_rank(kind, form, dtype):
    adapter, subspace = several(dtype)
    settings = kind(form=form, strength_for={"up_proj": "drop"})
    for portable in (False, True):
        new, report = correct(adapter, subspace, settings, portable=portable)
        for name in (UP0, UP1):
            module, old, entry = new.modules[name], adapter.modules[name], report.modules[name]
            assert not bool(module.B.any()) and not bool(module.A.any())
            assert module.A.dtype == module.B.dtype == dtype
            widest = max(m.rank for m in new.modules.values())
            assert module.rank == entry.rank_out == (widest if portable else old.rank)
            assert entry.energy_after == 0 and set(entry.relative_energy_after.values()) == {0}
            assert entry.relative_change == 1 and entry.rank_error == 0
            energy = float(update(old).square().sum())
            assert entry.energy_before == pytest.approx(energy, rel=1e-5)
            assert sum(entry.relative_energy_before.values()) == pytest.approx(1)
        assert report.modules[Q0].relative_change < 1
        changed = sum(m.energy_before * m.relative_change**2 for m in report.modules.values())
        assert report.totals.relative_change == pytest.approx(
            math.sqrt(changed / report.totals.energy_before)
        )


def test_all_dropped_and_nothing_to_drop():
    adapter, subspace = several()
    new, report = correct(adapter, subspace, Realignment(strength_for={"*": "drop"}))
    assert report.totals.relative_change == 1 and report.totals.energy_after == 0
    assert new.config == adapter.config
    adapter.modules[Q0].B.zero_()
    _, report = correct(adapter, subspace, Correction(strength_for={"q_proj": "drop"}))
    assert report.modules[Q0].relative_change == 0 and report.modules[Q1].relative_change == 1


@pytest.mark.parametrize("own", [0, 3, "drop"])
@pytest.mark.parametrize("kind", [Correction, Realignment])
def test_modules_that_float32_would_spoil(kind, own):
    """Factors whose squares vanish in float32, and columns of B that it cannot tell apart."""
    adapter, subspace = several()
    modules = dict(adapter.modules)
    modules[Q0] = replace(modules[Q0], B=1e-25 * modules[Q0].B, A=1e-3 * modules[Q0].A)
    B = modules[UP0].B.clone()
    B[:, -1] = B[:, 0]
    modules[UP0] = replace(modules[UP0], B=B)
    adapter = replace(adapter, modules=modules)
    settings = kind(strength_for={"layers.0.*": own})
    new, report = correct(adapter, subspace, settings)
    for name in (Q0, UP0):
        old = modules[name]
        wanted = torch.zeros_like(update(old))
        if own != "drop":
            method = kind(0, 0, 0, 0) if kind is Correction and own == 0 else kind()
            wanted = truth(old, subspace.modules[name], method.with_strength(own))
        error = float((update(new.modules[name]) - wanted).norm())
        assert error <= TOLERANCES[torch.float32] * float(wanted.norm())
        assert report.modules[name].energy_before == pytest.approx(
            float(update(old).square().sum()), rel=1e-5
        )


def test_a_pattern_that_fits_nothing_is_the_adapters_own_error():
    adapter, subspace = several()
    attention = replace(adapter, modules={n: adapter.modules[n] for n in (Q0, Q1)})
    settings = Realignment(strength_for={"mlp.*": 0})
    fine, failed = correct_batch([adapter, attention], subspace, settings)
    assert isinstance(failed, CsuloraError) and not isinstance(fine, CsuloraError)
    assert str(failed) == f"no module matches strength_for mlp.*; its modules have names like {Q0}"
    with pytest.raises(CsuloraError, match="no module matches strength_for down_proj"):
        decompose(adapter, subspace, Correction(strength_for={"down_proj": 0, "*": 2}))


def tied(values=None):
    """An embedding and a head that share their factors, as PEFT's `ensure_weight_tying` has it."""
    B, A, U, V = (X.float() for X in factors(40, 24, 3, 5, inside=1.0))
    head = LoraModule(A, B, alpha=3, scaling=1.0)
    embedding = LoraModule(B.mT.contiguous(), A.mT.contiguous(), 3, 1.0, embedding=True)
    names = {"model.embed_tokens": embedding, "lm_head": head}
    basis = ModuleSubspace(U, torch.arange(5.0, 0, -1), V, 0.5)
    subspace = SafetySubspace(dict.fromkeys(names, basis), Origin("b", "a", "", "", 0))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3}
    return LoraAdapter(names, config | {"ensure_weight_tying": True}), subspace


@pytest.mark.parametrize("patterns", [{"*": 5}, {"lm_head": 7, "embed_tokens": 7}, {"*": "drop"}])
def test_a_tied_pair_stays_one(patterns):
    adapter, subspace = tied()
    new, report = correct(adapter, subspace, Correction(strength_for=patterns))
    head, embedding = new.modules["lm_head"], new.modules["model.embed_tokens"]
    torch.testing.assert_close(update(head), update(embedding).mT, rtol=1e-5, atol=1e-6)
    figures = [m.relative_change for m in report.modules.values()]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0] > 0


@pytest.mark.parametrize("patterns", [{"lm_head": 5}, {"*": 5, "embed_tokens": 6}, {"lm_head": 0}])
def test_a_tied_pair_with_two_strengths_is_refused(patterns):
    adapter, subspace = tied()
    for kind in (Correction, Realignment):
        with pytest.raises(CsuloraError, match="embed_tokens: shares its factors with lm_head"):
            correct(adapter, subspace, kind(strength_for=patterns))


def test_realignment_leaves_a_tied_pair_alone_or_drops_it():
    adapter, subspace = tied()
    with pytest.raises(CsuloraError, match="strength 0 for both"):
        correct(adapter, subspace, Realignment(strength_for={"*": 2}))
    for own, change in ((0, 0), ("drop", 1)):
        _, report = correct(adapter, subspace, Realignment(strength_for={"*": own}))
        assert report.totals.relative_change == change


def test_a_plan_says_what_becomes_of_each_module():
    adapter, subspace = several()
    plan = Plan.of(adapter, subspace, Correction(strength_for=PATTERNS))
    assert {m.name: m.dropped for m in plan.members} == {
        Q0: False,
        UP0: True,
        Q1: False,
        UP1: False,
    }
    assert [m.rank for m in plan.members] == [8, 4, 4, 6]
    assert not any(m.correction.strength_for for m in plan.members)
    assert plan.strength is None
