"""What a plan says, before anything is computed."""

from dataclasses import replace

import pytest
import torch

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    LoraModule,
    ModuleSubspace,
    Origin,
    SafetySubspace,
)
from csulora.pipeline.plan import Plan

SHAPES = {"q_proj": (12, 8), "o_proj": (8, 12), "k_proj": (10, 10)}  # d_out, d_in
RANKS = {"q_proj": 2, "o_proj": 3, "k_proj": 2}


def orthonormal(rows):
    return torch.linalg.qr(torch.randn(rows, 4))[0]


@pytest.fixture
def subspace():
    modules = {
        f"layers.0.{name}": ModuleSubspace(orthonormal(d), torch.ones(4), orthonormal(n), 0.5)
        for name, (d, n) in SHAPES.items()
    }
    return SafetySubspace(modules, Origin("base", "aligned", "", "", 0))


def lora(turned=False, **config):
    modules = {}
    for name, shape in SHAPES.items():
        d_out, d_in = shape[::-1] if turned else shape
        r = RANKS[name]
        modules[f"model.layers.0.{name}"] = LoraModule(
            torch.randn(r, d_in), torch.randn(d_out, r), alpha=r, scaling=1.0
        )
    return LoraAdapter(modules, {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config)


def test_members_are_the_modules_in_order_with_their_bases(subspace):
    adapter, correction = lora(), Correction(lambda_off=3)
    plan = Plan.of(adapter, subspace, correction)
    assert [member.name for member in plan.members] == list(adapter.modules)
    for member in plan.members:
        found = subspace.modules[member.target]
        assert member.name == f"model.{member.target}" and not member.transposed
        assert member.U is found.U and member.V is found.V
        assert member.correction == correction


def test_bases_change_places_where_the_weights_are_stored_the_other_way(subspace):
    plan = Plan.of(lora(turned=True, fan_in_fan_out=True), subspace, Correction())
    for member in plan.members:
        found = subspace.modules[member.target]
        # The square k_proj does not tell by its shape; it is stored like the others.
        assert member.transposed and member.U is found.V and member.V is found.U
    with pytest.raises(CsuloraError, match="estimated for another model"):
        Plan.of(lora(turned=True), subspace, Correction())


@pytest.mark.parametrize("config", [{}, {"fan_in_fan_out": True}])
@pytest.mark.parametrize("stored_turned", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_an_embedding_is_known_by_its_kind_not_by_its_shape(subspace, name, config, stored_turned):
    """Its weight lies as (d_in, d_out), square or not, and says nothing about other modules."""
    adapter, key = lora(**config), f"layers.0.{name}"
    modules, bases = adapter.modules, subspace.modules
    old = modules[f"model.{key}"]
    if not stored_turned:
        old = replace(old, A=old.B.mT, B=old.A.mT)
    modules[f"model.{key}"] = replace(old, embedding=True)
    bases[key] = replace(bases[key], fan_in_fan_out=stored_turned)
    for member in Plan.of(adapter, subspace, Correction()).members:
        assert member.transposed == (member.target == key and not stored_turned)
        found = bases[member.target]
        bases_in_order = (found.V, found.U) if member.transposed else (found.U, found.V)
        assert member.U is bases_in_order[0] and member.V is bases_in_order[1]


@pytest.mark.parametrize(
    ("correction", "ranks", "portable"),
    [
        (Correction(), [4, 6, 4], 6),
        (Correction(form="same"), [2, 3, 2], 3),
        (Correction(0, 0, 0, 0), [2, 3, 2], 3),
    ],
)
def test_ranks_of_the_result(subspace, correction, ranks, portable):
    plan = Plan.of(lora(), subspace, correction, portable=True)
    assert [member.rank for member in plan.members] == ranks
    assert plan.portable_rank == portable
    assert plan._replace(portable=False).portable_rank is None


def test_types_of_the_result(subspace):
    adapter = lora()
    name = "model.layers.0.q_proj"
    module = adapter.modules[name]
    adapter.modules[name] = replace(module, A=module.A.bfloat16())
    plan = Plan.of(adapter, subspace, Correction())
    assert plan.dtypes(plan.members[0]) == (torch.float32, torch.bfloat16)
    plan = plan._replace(dtype=torch.float16)
    assert plan.dtypes(plan.members[0]) == (torch.float16, torch.float16)


def test_what_the_portable_form_cannot_hold(subspace):
    extra = replace(lora(), passed_through={"x": torch.ones(1)})
    with pytest.raises(CsuloraError, match="cannot hold passed-through tensors: x"):
        Plan.of(extra, subspace, Correction(), portable=True)
    with pytest.raises(CsuloraError, match="needs at least one module"):
        Plan.of(replace(lora(), modules={}), subspace, Correction(), portable=True)
    embedding = replace(lora().modules["model.layers.0.q_proj"], embedding=True)
    for passed in ({}, {"x": torch.ones(1)}):
        adapter = LoraAdapter({"wte": embedding}, lora().config, passed)
        with pytest.raises(CsuloraError, match="cannot hold LoRA on embeddings: wte"):
            Plan.of(adapter, subspace, Correction(), portable=True)
