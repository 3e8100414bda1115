"""Realignment through `csulora.correct` by the dense oracle: types, precision, B's bytes, the report."""

import json
import math

import pytest
import torch
from problems import factors, truth, update
from tolerances import TOLERANCES

import csulora
from csulora import Correction, Realignment
from csulora.settings import FORMS
from csulora.subspace import Origin

NAME = "model.layers.0.mlp.down_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALING = 2.0


def basis_of(U, V, share=0.9, size=1.0):
    S = size * (1 / (1 + torch.arange(U.shape[1], dtype=torch.float64))).float()
    return csulora.ModuleSubspace(U.float(), S, V.float(), share)


def module_of(B, A, scaling=SCALING):
    return csulora.LoraModule(A=A, B=B, alpha=scaling * B.shape[1], scaling=scaling)


def run(B, A, basis, settings, scaling=SCALING, **options):
    """The new module and the report, of an adapter of one module."""
    module = module_of(B, A, scaling)
    subspace = csulora.SafetySubspace({NAME: basis}, Origin("base", "aligned", "", "", 0))
    config = {"peft_type": "LORA", "r": B.shape[1], "lora_alpha": module.alpha}
    adapter = csulora.LoraAdapter({NAME: module}, config)
    corrected, report = csulora.correct(adapter, subspace, settings, **options)
    return corrected.modules[NAME], report


def wanted_of(B, A, basis, settings):
    return truth(module_of(B, A), basis, settings)


def relative_error(module, wanted):
    return float((update(module) - wanted).norm() / wanted.norm())


def ill_conditioned(B, ratio):
    """B with its last column all but a combination of the others, `ratio` away."""
    B = B.clone()
    B[:, -1] = B[:, :-1].sum(1) + ratio * B[:, -1]
    return B


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1e-2, 3.0, 1e4, math.inf])
@pytest.mark.parametrize("shape", [(48, 40, 1, 3), (96, 64, 8, 16), (300, 260, 16, 64)])
def test_every_type_within_its_tolerance_and_b_as_it_was(shape, strength, form, dtype):
    B, A, U, V = factors(*shape, inside=1.0)
    B, A, basis = B.to(dtype), A.to(dtype), basis_of(U, V, size=20.0)
    settings = Realignment(strength, form=form, edge=strength != 1e4)
    module, report = run(B, A, basis, settings)
    assert relative_error(module, wanted_of(B, A, basis, settings)) <= TOLERANCES[dtype]
    assert module.A.dtype == module.B.dtype == dtype
    entry = report.modules[NAME]
    r, k = shape[2:]
    assert (entry.rank_in, entry.rank_out) == (r, r if form == "same" else r + k)
    if form == "same":
        assert torch.equal(module.B, B)
        assert module.alpha == SCALING * r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_columns_of_b_that_are_nearly_dependent(ratio, form, dtype):
    for seed in range(3):
        B, A, U, V = factors(96, 64, 6, 12, seed=seed)
        B, A = ill_conditioned(B, ratio).to(dtype), A.to(dtype)
        basis, settings = basis_of(U, V, size=30.0), Realignment(10, form=form)
        module, _ = run(B, A, basis, settings)
        assert relative_error(module, wanted_of(B, A, basis, settings)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_all_but_vanishes_is_as_exact(dtype):
    """The update lies in D's inputs and is taken away: the result is small beside what it came from."""
    for left in (1e-1, 1e-3):
        B, A, U, V = factors(64, 48, 4, 12)
        A = (A @ V) @ V.mT + left * A
        B, A, basis = B.to(dtype), A.to(dtype), basis_of(U, V)
        settings = Realignment(math.inf, target=0.01, edge=False)
        module, _ = run(B, A, basis, settings)
        assert relative_error(module, wanted_of(B, A, basis, settings)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("size", [1e-13, 1e13])
@pytest.mark.parametrize("form", FORMS)
def test_factors_of_very_different_size(size, form):
    B, A, U, V = factors(64, 48, 4, 12)
    B, A, basis = (size * B).float(), (A / size).float(), basis_of(U, V, size=20.0)
    module, _ = run(B, A, basis, Realignment(form=form))
    wanted = wanted_of(B, A, basis, Realignment(form=form))
    assert relative_error(module, wanted) <= TOLERANCES[torch.float32]


def test_float16_moves_b_only_where_a_would_not_fit():
    B, A, U, V = factors(64, 48, 4, 12)
    B, A, basis = (1e-4 * B).half(), (1e-3 * A).half(), basis_of(U, V, size=1e-6)
    settings = Realignment(edge=False)
    module, _ = run(B, A, basis, settings)
    error = relative_error(module, wanted_of(B, A, basis, settings))
    assert error <= TOLERANCES[torch.float16]
    basis = basis_of(U, V, size=200.0)  # A' beside this B would be beyond 65504
    module, _ = run(B, A, basis, settings)
    assert not torch.equal(module.B, B)
    error = relative_error(module, wanted_of(B, A, basis, settings))
    assert error <= TOLERANCES[torch.float16]


@pytest.mark.parametrize("size", [1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "settings", [Realignment(edge=False), Realignment(0), Correction(0, 0, 0, 0)], ids=str
)
def test_a_small_b_that_stays_keeps_its_digits_in_float16(settings, dtype, size):
    """Also where the portable form multiplies it by a small scaling."""
    B, A, U, V = factors(64, 48, 4, 12)
    B, A, basis = (size * B).to(dtype), (1e-2 * A).to(dtype), basis_of(U, V, size=1e-3 * size)
    for scaling, options in ((1.0, {"dtype": torch.float16}), (1 / 16, {"portable": True})):
        module, _ = run(B, A, basis, settings, scaling, **options)
        old = module_of(B, A, scaling)
        wanted = update(old) if settings.is_identity else truth(old, basis, settings)
        assert relative_error(module, wanted) <= TOLERANCES[module.B.dtype]


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"portable": True}])
@pytest.mark.parametrize("form", FORMS)
def test_options_of_the_form(form, options):
    B, A, U, V = factors(64, 48, 4, 12)
    B, A, basis = B.float(), A.float(), basis_of(U, V, size=20.0)
    settings = Realignment(form=form)
    module, report = run(B, A, basis, settings, **options)
    tolerance = TOLERANCES[module.B.dtype]
    assert relative_error(module, wanted_of(B, A, basis, settings)) <= tolerance
    if "portable" in options:
        assert module.alpha == module.rank and module.scaling == 1
    assert report.settings["method"] == "realign" and report.correction == settings


def test_where_nothing_stands_out_of_noise_all_is_left_and_said():
    B, A, U, V = factors(64, 48, 4, 12)
    basis = csulora.ModuleSubspace(U.float(), torch.ones(12), V.float(), 0.3)
    module, report = run(B.float(), A.float(), basis, Realignment())
    assert torch.equal(module.A, A.float()) and torch.equal(module.B, B.float())
    assert any("stands out" in warning for warning in report.warnings)
    _, report = run(B.float(), A.float(), basis, Realignment(edge=False))
    assert not any("stands out" in warning for warning in report.warnings)


def test_zero_factors_in_an_adapter():
    B, A, U, V = factors(64, 48, 4, 12)
    for form in FORMS:
        module, report = run(0 * B.float(), A.float(), basis_of(U, V), Realignment(form=form))
        assert float((module.B @ module.A).abs().max()) == 0
        assert report.modules[NAME].relative_change == 0


def test_sweep_and_decompose_take_it():
    B, A, U, V = factors(64, 48, 4, 12)
    module = csulora.LoraModule(A=A.float(), B=B.float(), alpha=4, scaling=1.0)
    basis = basis_of(U, V, size=20.0)
    subspace = csulora.SafetySubspace({NAME: basis}, Origin("base", "aligned", "", "", 0))
    adapter = csulora.LoraAdapter({NAME: module}, {"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    found = csulora.decompose(adapter, subspace, Realignment())
    made = csulora.correct(adapter, subspace, Realignment())[1]
    assert found.totals == made.totals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", [1e-30, 1e-36, 1e-40, -1e-60, 1e-100, 1e-150, 1e-155, 1e-170])
def test_a_scaling_that_leaves_no_room_for_the_result_is_an_error(scaling, form, dtype):
    """What alignment did is divided by it; a result that fits is as written, figures and all."""
    B, A, U, V = factors(48, 40, 3, 4, inside=1.0)
    basis, settings = basis_of(U, V, size=20.0), Realignment(form=form, edge=False)
    if abs(scaling) < 1e-37:
        with pytest.raises(csulora.CsuloraError, match=r"does not fit|more than a report can hold"):
            run(B, A, basis, settings, scaling, dtype=dtype)
        return
    new, report = run(B, A, basis, settings, scaling, dtype=dtype)
    assert torch.isfinite(new.A).all() and torch.isfinite(new.B).all()
    assert report.totals.relative_change > 1e25
    assert csulora.Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
