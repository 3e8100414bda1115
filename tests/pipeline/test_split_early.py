"""Of a large adapter the wide factor of `exact` is written before the systems are solved."""

import math

import pytest
import torch
from problems import subspace_of

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    LoraModule,
    Realignment,
    correct,
)
from csulora.correction import correct_batch
from csulora.pipeline import by_torch
from csulora.pipeline.plan import Plan

# The wide factor is B, A, and neither.
SHAPES = {"a": (96, 32, 16), "b": (32, 64, 16), "c": (48, 48, 16)}
METHODS = (
    Correction(),
    Correction(form="same"),
    Correction(1, 2, 3, math.inf, granularity="component"),
    Correction(strength_for={"a": 0.0, "b": "drop"}),
    Correction(1e6, 1e6, 1e6, 0),  # float32 would spoil module b
    Realignment(edge=False),
    Realignment(edge=False, form="exact"),
)
TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
    "half mixed": (torch.float16, torch.float32),
}


@pytest.fixture(autouse=True)
def every_adapter_is_large(monkeypatch):
    monkeypatch.setattr(by_torch, "TOGETHER", 0)


SUBSPACE = subspace_of(SHAPES)


def _adapter(types="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (d_out, d_in, _) in SHAPES.items():
        B, A = (torch.randn(s, generator=generator) for s in ((d_out, 8), (8, d_in)))
        if name == "b":  # lies mostly inside, so that little is left where that is removed
            U, V = SUBSPACE.modules[name].U, SUBSPACE.modules[name].V
            B, A = B + 30 * U @ U.mT @ B, A + 30 * A @ V @ V.mT
        B_dtype, A_dtype = TYPES[types]
        modules[name] = LoraModule(A.to(A_dtype), B.to(B_dtype), alpha=16, scaling=2.0)
    return LoraAdapter(modules, {"peft_type": "LORA", "r": 8, "lora_alpha": 16})


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("types", TYPES)
def test_the_result_is_the_same_to_the_last_bit(types, method, portable, monkeypatch):
    early, report = correct(_adapter(types), SUBSPACE, method, portable=portable)
    monkeypatch.setattr(by_torch, "_splits", lambda *_: False)
    late, other = correct(_adapter(types), SUBSPACE, method, portable=portable)
    assert report.to_dict() == other.to_dict()
    for name, X in late.tensors().items():
        assert torch.equal(X, early.tensors()[name]), name


@pytest.fixture
def steps(monkeypatch):
    """The names of the steps that are taken, in their order."""
    taken = []
    for name in ("split_wide", "solve_with_amplification"):
        step = getattr(by_torch, name)
        monkeypatch.setattr(
            by_torch, name, lambda *x, step=step, name=name: taken.append(name) or step(*x)
        )
    return taken


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
def test_it_is_written_before_the_systems_are_solved(types, steps):
    correct(_adapter(types), SUBSPACE)
    assert steps == [*["split_wide"] * 3, "solve_with_amplification"]


def test_nothing_is_written_of_modules_that_stay_or_go(steps):
    """Their memory is of another rank."""
    correct(_adapter(), SUBSPACE, METHODS[3])
    assert steps.count("split_wide") == 1


def test_float64_takes_the_place_of_what_was_written():
    plan = Plan.of(_adapter(), SUBSPACE, METHODS[4])
    (solved,) = by_torch.solve([plan], torch.device("cpu"))
    assert solved.needs_float64.tolist() == [False, True, False]
    adapter, report = correct(_adapter(), SUBSPACE, METHODS[4])
    for name, module in adapter.modules.items():
        energy = float((module.B.double() @ module.A.double()).square().sum()) * module.scaling**2
        assert energy == pytest.approx(report.modules[name].energy_after, rel=1e-5)


def test_an_overflow_in_the_last_module_stops_the_adapter_alone():
    good, bad = _adapter(), _adapter(seed=1)
    bad.modules["c"].B.fill_(1e30)
    first, failed, last = correct_batch([good, bad, good], SUBSPACE)
    assert isinstance(failed, CsuloraError) and "c: " in str(failed)
    for (found, _), name in ((first, "a"), (last, "b")):
        assert torch.equal(found.modules[name].B, correct(good, SUBSPACE)[0].modules[name].B)
