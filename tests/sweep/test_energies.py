"""Energies from one projection: those that csulora.correct reports for each setting, one by one."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import factors, quick

import csulora
from csulora import CsuloraError, LoraAdapter, LoraModule, ModuleSubspace, Origin, SafetySubspace
from csulora.sweep import Energies, families

STRENGTHS = (0.3, 3.0, 1000.0, math.inf)


def problem(shapes=((24, 16, 3, 8), (16, 30, 3, 8), (20, 20, 5, 4)), change=None, seed=0):
    """An adapter and a subspace of modules of (d_out, d_in, r, k), of one rank and k or several."""
    modules, bases = {}, {}
    for i, (d_out, d_in, r, k) in enumerate(shapes):
        B, A, U, V = factors(d_out, d_in, r, k, torch.float32, seed + i, inside=0.5)
        if change is not None:
            B, A = change(B, A)
        S = torch.linspace(2, 0.5, k)
        modules[f"m{i}"] = LoraModule(A=A, B=B, alpha=2 * r, scaling=1.5)
        bases[f"m{i}"] = ModuleSubspace(U, S, V, 0.6)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    return LoraAdapter(modules, config), SafetySubspace(bases, Origin("b", "a", "", "", 0))


def compare(adapter, subspace, chosen, tolerance=1e-6):
    energies = Energies(adapter, subspace, chosen)
    for family in chosen:
        leading = subspace.leading(family.k)
        for strength, found in zip(STRENGTHS, energies.totals(family, STRENGTHS), strict=True):
            truth = csulora.correct(adapter, leading, family.at(strength))[1].totals
            name = f"{family} {strength}"
            assert found.modules == truth.modules
            assert found.energy_before == pytest.approx(truth.energy_before, rel=1e-6), name
            for which in ("relative_energy_before", "relative_energy_after"):
                a, b = getattr(found, which), getattr(truth, which)
                assert a == pytest.approx(b, abs=tolerance), (name, which)
            assert found.energy_after == pytest.approx(
                truth.energy_after, abs=tolerance * max(truth.energy_before, truth.energy_after)
            ), name
            assert found.relative_change == pytest.approx(truth.relative_change, abs=tolerance), (
                name
            )
            assert found.rank_error == pytest.approx(truth.rank_error, abs=1e-4), name


ALL = {"granularities": ("direction", "component"), "forms": ("exact", "same")}


def test_every_setting_and_k_as_correct_reports_it():
    adapter, subspace = problem()
    compare(adapter, subspace, families(8, **ALL, ranks=[1, 2, 3, 5, 8]))


def half(dtype):
    return lambda B, A: (B.to(dtype), A.to(dtype))


def dependent(B, A):
    """Two columns of B are one, and one is nothing."""
    B = B.clone()
    B[:, 1], B[:, 2] = 2 * B[:, 0], 0
    return B, A


def nearly_dependent(B, A):
    """As far apart as float32 Gram matrices cannot tell."""
    B = B.clone()
    B[:, 1] = B[:, 0] + 1e-5 * B[:, 1]
    return B, A


@pytest.mark.parametrize(
    "change",
    [
        half(torch.bfloat16),
        dependent,
        nearly_dependent,
        lambda B, A: (0 * B, A),
        lambda B, A: (1e-15 * B, 1e15 * A),
    ],
    ids=["bfloat16", "dependent", "nearly dependent", "zero", "uneven"],
)
def test_factors_that_are_hard(change):
    adapter, subspace = problem(change=change)
    compare(adapter, subspace, families(8, ranks=[2, 8]), tolerance=3e-6)


def test_modules_that_alignment_did_not_change():
    adapter, subspace = problem(((12, 10, 3, 0), (10, 12, 3, 4)))
    compare(adapter, subspace, families(4, **ALL, ranks=[2, 4]))


@quick
@given(
    sides=st.tuples(st.integers(8, 30), st.integers(8, 30)),
    r=st.integers(1, 6),
    K=st.integers(1, 8),
    k=st.integers(1, 8),
    strength=st.sampled_from([0.1, 2.0, 50.0, math.inf]),
    seed=st.integers(0, 1000),
)
def test_change_and_energy_are_those_of_the_dense_update(sides, r, K, k, strength, seed):
    K = min(K, *sides)
    k = min(k, K)
    adapter, subspace = problem(((*sides, r, K),), seed=seed)
    module, basis = adapter.modules["m0"], subspace.modules["m0"]
    dW = 1.5 * module.B.double() @ module.A.double()
    U, S, V = basis.U[:, :k], basis.S[:k], basis.V[:, :k]
    chosen = families(K, granularities=("direction", "component"), ranks=[k])
    energies = Energies(adapter, subspace, chosen)
    for family in chosen:
        if family.method == "csulora":
            strengths = (0, strength, strength, strength)
            dense = oracle.correct(dW, U, V, strengths, family.granularity)
        else:
            start = family.start
            dense = oracle.realign(
                dW,
                U,
                S,
                V,
                strength=strength,
                gamma=start.gamma,
                edge=subspace.leading(k).modules["m0"].noise_edge,
                B=module.B if start.form == "same" else None,
            )
        (found,) = energies.totals(family, [strength])
        norm = float(dW.norm())
        # Energies are right to about 1e-7 of the whole, a tiny change only to the root of that.
        change = float((dense - dW).norm()) / norm
        assert abs(found.relative_change**2 - change**2) < 1e-6, family
        assert abs(found.energy_after / norm**2 - float(dense.square().sum()) / norm**2) < 1e-5
        blocks = oracle.energies(dense, U, V) / norm**2
        after = torch.tensor(list(found.relative_energy_after.values()))
        assert float((after - blocks).abs().max()) < 1e-5, family


def test_what_does_not_fit_is_named():
    adapter, subspace = problem(((12, 10, 3, 4),))
    other = LoraAdapter({"n": adapter.modules["m0"]}, adapter.config)
    with pytest.raises(CsuloraError, match="n"):
        Energies(other, subspace, families(4))
    big = replace(adapter.modules["m0"], B=torch.full((12, 3), 1e30), A=torch.full((3, 10), 1e30))
    with pytest.raises(CsuloraError, match=r"m0: .*out of range"):
        Energies(
            LoraAdapter({"m0": replace(big, scaling=1e100)}, adapter.config), subspace, families(4)
        )


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-6])
def test_columns_that_cancel_each_other(size):
    """An update that `size` of one column is left of; systems for it as it is would be singular."""

    def change(B, A):
        B[:, 1], A[1] = -B[:, 0], A[0] + size * A[1]
        return B, A

    adapter, subspace = problem(((60, 50, 2, 5), (40, 30, 2, 5)), change)
    chosen = families(5, ranks=[5], methods=("csulora",), forms=("exact", "same"))
    compare(adapter, subspace, chosen, tolerance=1e-5)
    [same] = families(5, ranks=[5], methods=("csulora",), forms=("same",))
    [found] = Energies(adapter, subspace, [same]).totals(same, [1e8])
    assert math.isfinite(found.relative_change) and found.relative_change <= 1
