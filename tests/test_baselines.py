"""Controls and published methods, each against its formula on dense float64 matrices."""

import math
from dataclasses import replace

import pytest
import torch
from builders import LAYERS, SHAPES, write_adapter
from tolerances import TOLERANCES

import csulora
from csulora import LoraAdapter, ModuleSubspace, Origin, SafetySubspace, baselines
from csulora.errors import CsuloraError, UsageError

K = 5


def norm(X):
    return float(torch.linalg.matrix_norm(X))


def cosine(X, Y):
    return float((X * Y).sum()) / (norm(X) * norm(Y))


def dense(adapter):
    return {n: m.scaling * (m.B.double() @ m.A.double()) for n, m in adapter.modules.items()}


def subspace_of(D, k):
    """The leading k triplets by a dense decomposition."""
    modules = {}
    for name, X in D.items():
        U, S, Vt = torch.linalg.svd(X, full_matrices=False)
        share = float(S[:k].square().sum() / S.square().sum())
        parts = (Y.float().contiguous() for Y in (U[:, :k], S[:k], Vt[:k].mT))
        modules[name] = ModuleSubspace(*parts, share)
    return SafetySubspace(modules, Origin("base", "aligned", "", "", 0))


def low_rank(subspace):
    """D_k of each module."""
    return {n: (m.U.double() * m.S.double()) @ m.V.double().mT for n, m in subspace.modules.items()}


@pytest.fixture
def adapter(tmp_path):
    return LoraAdapter.load(write_adapter(tmp_path / "lora"))


@pytest.fixture
def D():
    """Unlike in both modules, so that their cosines differ."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for decay, (name, shape) in enumerate(SHAPES.items(), start=1):
        U, S, Vt = torch.linalg.svd(
            torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
        )
        found[name] = (U * S / torch.arange(1, len(S) + 1) ** decay) @ Vt
    return found


@pytest.fixture
def subspace(D):
    return subspace_of(D, K)


def assert_updates(adapter, expected, dtype=torch.float32):
    found = dense(adapter)
    assert found.keys() == expected.keys()
    for name, X in expected.items():
        assert norm(found[name] - X) <= TOLERANCES[dtype] * max(norm(X), 1e-30), name


def test_scaled_to_equal_norm_and_to_equal_change(adapter, subspace):
    corrected, report = csulora.correct(adapter, subspace)
    before, after = dense(adapter), dense(corrected)
    raw = torch.cat([X.flatten() for X in before.values()])
    new = torch.cat([X.flatten() for X in after.values()])
    factor = baselines.equal_norm_factor(report.totals)
    assert factor == pytest.approx(float(new.norm() / raw.norm()), rel=1e-5)
    assert_updates(baselines.scaled(adapter, factor), {n: factor * X for n, X in before.items()})
    change = float((new - raw).norm() / raw.norm())
    assert baselines.relative_change(adapter, corrected) == pytest.approx(change, rel=1e-6)
    factor = baselines.equal_change_factor(change)
    control = baselines.scaled(adapter, factor)
    assert baselines.relative_change(adapter, control) == pytest.approx(change, rel=1e-6)
    assert baselines.energy(control) == pytest.approx(float((factor * raw).square().sum()), 1e-6)


def test_no_scaling_down_changes_more_than_all():
    assert baselines.equal_change_factor(1.5) == 0


@pytest.mark.parametrize("sides", ["left", "right", "both"])
def test_hard_projections_are_those_of_the_projectors(adapter, subspace, sides):
    expected = {}
    for name, X in dense(adapter).items():
        U, V = subspace.modules[name].U.double(), subspace.modules[name].V.double()
        X = U @ U.mT @ X if sides != "right" else X
        expected[name] = X @ V @ V.mT if sides != "left" else X
    found = baselines.projected(adapter, subspace, sides)
    assert_updates(found, expected)
    assert {m.rank for m in found.modules.values()} == {4}


def test_the_two_sided_projection_is_the_limit_of_the_correction(adapter, subspace):
    limit, _ = csulora.correct(
        adapter, subspace, csulora.Correction(0, math.inf, math.inf, math.inf)
    )
    assert_updates(baselines.projected(adapter, subspace), dense(limit))


def dense_safe_lora(dW, D, threshold, whole=None):
    """By the paper: C = D D^T / ||D||. whole: the D whose norm is meant."""
    found, values = {}, {}
    for name, X in dW.items():
        C = D[name] @ D[name].mT / norm((whole or D)[name])
        values[name] = cosine(X, C @ X)
        found[name] = C @ X if values[name] < threshold else X
    return found, values


@pytest.mark.parametrize("which", ["whole", "subspace"])
def test_safe_lora(adapter, D, subspace, which):
    given, used = (D, D) if which == "whole" else (subspace, low_rank(subspace))
    _, values = dense_safe_lora(dense(adapter), used, 0, D)
    assert baselines.cosines(adapter, given) == pytest.approx(values, rel=1e-5)
    low, high = sorted(values.values())
    assert high - low > 0.05
    for threshold in (low / 2, (low + high) / 2, 1.0):
        expected, _ = dense_safe_lora(dense(adapter), used, threshold, D)
        assert_updates(baselines.safe_lora(adapter, given, threshold), expected)
    expected, _ = dense_safe_lora(dense(adapter), used, (low + high) / 2, D)
    assert_updates(baselines.safe_lora_of(adapter, given, 1), expected)


def test_pruning_takes_the_modules_that_safe_lora_would_project(adapter, D):
    dW = dense(adapter)
    _, values = dense_safe_lora(dW, D, 0)
    first = min(values, key=values.get)
    expected = {n: torch.zeros_like(X) if n == first else X for n, X in dW.items()}
    assert_updates(baselines.prune_lowest_cosine(adapter, D, 1), expected)


def test_e_diem_is_about_a_standard_normal_for_unrelated_matrices(adapter, D):
    """Its scale, by its meaning: distances of unrelated Gaussian matrices of any size and norms."""
    generator = torch.Generator().manual_seed(0)
    for n in (100, 10_000):
        a = torch.randn(1000, n, generator=generator)
        b = 3 * torch.randn(1000, n, generator=generator)
        S = float(a.square().sum(1).mean() + b.square().sum(1).mean())
        z = math.sqrt(2 * n) * ((a - b).norm(dim=1) / math.sqrt(S) - 1)
        # Entries of two norms differ like one Gaussian of both: its distances have this spread.
        assert abs(float(z.mean())) < 0.15
        assert float(z.std()) == pytest.approx(1, abs=0.08)
    found = baselines.e_diem(adapter, D)
    for name, X in dense(adapter).items():
        C = D[name] @ D[name].mT / norm(D[name])
        X = X / adapter.modules[name].scaling
        S = norm(X) ** 2 + norm(C @ X) ** 2
        expected = math.sqrt(2 * X.numel()) * (norm(X - C @ X) / math.sqrt(S) - 1)
        assert found[name] == pytest.approx(expected, rel=1e-9)


def test_pruning_by_e_diem_takes_the_furthest(adapter, D):
    values = baselines.e_diem(adapter, D)
    furthest = max(values, key=values.get)
    pruned = baselines.prune_highest_e_diem(adapter, D, 1)
    assert [n for n, m in pruned.modules.items() if not m.B.any()] == [furthest]


def test_random_pruning_is_seeded(adapter):
    picks = [baselines.prune_random(adapter, 1, seed) for seed in (0, 0, 1, 2, 3, 4)]
    names = [[n for n, m in p.modules.items() if not m.B.any()] for p in picks]
    assert names[0] == names[1]
    assert {len(n) for n in names} == {1}
    assert len({n[0] for n in names}) == 2


@pytest.mark.parametrize("gamma", [0.7, -0.4])
def test_the_safety_vector_added_back(adapter, D, subspace, gamma):
    dW, D_k = dense(adapter), low_rank(subspace)
    found = baselines.add_back(adapter, subspace, gamma)
    assert_updates(found, {n: dW[n] + gamma * D_k[n] for n in dW})
    assert {m.rank for m in found.modules.values()} == {found.config["r"]} == {4 + K}
    found = baselines.add_back(adapter, D, gamma)
    assert_updates(found, {n: dW[n] + gamma * D[n] for n in dW})
    assert {m.rank for m in found.modules.values()} == {4 + 16}
    found = baselines.lox(adapter, subspace, 2, gamma)
    D_2 = low_rank(subspace_of(D, 2))
    assert_updates(found, {n: dW[n] + gamma * D_2[n] for n in dW})


def test_added_back_at_a_chosen_change(adapter, D, subspace):
    for given in (D, subspace):
        gamma = baselines.gamma_for_change(adapter, given, 0.3)
        found = baselines.add_back(adapter, given, gamma)
        assert baselines.relative_change(adapter, found) == pytest.approx(0.3, rel=1e-5)
        start = baselines.dropped(adapter, 0.1)
        gamma = baselines.gamma_for_change(adapter, given, 0.9, start)
        assert gamma > 0
        found = baselines.add_back(start, given, gamma)
        assert baselines.relative_change(adapter, found) == pytest.approx(0.9, rel=1e-5)
    with pytest.raises(UsageError, match="no gamma"):
        baselines.gamma_for_change(adapter, D, 0.001, start)


def test_drop_and_rescale(adapter):
    rate, dW = 0.5, dense(adapter)
    once = baselines.dropped(adapter, rate)
    assert_updates(baselines.dropped(adapter, rate), dense(once))
    for name, m in once.modules.items():
        for new, old in ((m.B, adapter.modules[name].B), (m.A, adapter.modules[name].A)):
            kept = new != 0
            assert 0.25 < float(kept.float().mean()) < 0.75
            torch.testing.assert_close(new[kept], old[kept] / (1 - rate))
    many = [dense(baselines.dropped(adapter, rate, seed)) for seed in range(400)]
    for name, X in dW.items():
        mean = torch.stack([d[name] for d in many]).mean(0)
        # 400 draws, each about twice as far from dW as dW is long.
        assert norm(mean - X) < 0.15 * norm(X)


def test_a_random_subspace_has_the_sizes_and_the_spectrum(subspace):
    found = baselines.random_subspace(subspace, 3)
    for name, m in found.modules.items():
        old = subspace.modules[name]
        assert m.U.shape == old.U.shape and m.V.shape == old.V.shape
        spectrum = torch.linalg.svdvals((m.U * m.S) @ m.V.mT)[:K]
        torch.testing.assert_close(spectrum, old.S, rtol=1e-5, atol=1e-6)
        for new, real in ((m.U, old.U), (m.V, old.V)):
            assert norm(real.mT @ new) < 0.9 * math.sqrt(K)
    again, other = (baselines.random_subspace(subspace, seed) for seed in (3, 4))
    assert torch.equal(again.modules[LAYERS[0]].U, found.modules[LAYERS[0]].U)
    assert not torch.equal(other.modules[LAYERS[0]].U, found.modules[LAYERS[0]].U)
    assert found.sha256 != subspace.sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_types_of_the_factors(tmp_path, D, subspace, dtype):
    adapter = LoraAdapter.load(write_adapter(tmp_path / "half", dtype=dtype))
    dW, D_k = dense(adapter), low_rank(subspace)
    tiny = {n: 1e-6 * X for n, X in D.items()}  # C dW of which float16 would hold no digit
    for found, expected in (
        (baselines.add_back(adapter, subspace, 0.5), {n: dW[n] + 0.5 * D_k[n] for n in dW}),
        (baselines.safe_lora(adapter, tiny, 1.1), dense_safe_lora(dW, tiny, 1.1)[0]),
    ):
        assert {m.B.dtype for m in found.modules.values()} == {dtype}
        assert_updates(found, expected, dtype)


def test_the_written_folder_is_what_peft_loads(tmp_path, adapter, subspace):
    """A model of two linear layers under PEFT: its merged weights tell the update."""
    peft = pytest.importorskip("peft")
    dW, D_k = dense(adapter), low_rank(subspace)
    for name, found, expected in (
        (
            "added",
            baselines.add_back(adapter, subspace, 0.7),
            {n: dW[n] + 0.7 * D_k[n] for n in dW},
        ),
        (
            "pruned",
            baselines.pruned(adapter, {LAYERS[0]}),
            {n: 0.0 * dW[n] if n == LAYERS[0] else dW[n] for n in dW},
        ),
    ):
        found.save(tmp_path / name)
        wrapped = peft.PeftModel.from_pretrained(nested(), tmp_path / name)
        merged = wrapped.merge_and_unload()
        for module, X in expected.items():
            weight = merged.get_submodule(module).weight.detach().double()
            assert norm(weight - X) <= 1e-5 * norm(dW[module]), (name, module)


def nested():
    """A model whose linear weights, all zero, have the names and shapes of SHAPES."""
    root = torch.nn.Module()
    for name, (d_out, d_in) in SHAPES.items():
        place = root
        *parents, leaf = name.split(".")
        for part in parents:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        linear = torch.nn.Linear(d_in, d_out, bias=False)
        torch.nn.init.zeros_(linear.weight)
        place.add_module(leaf, linear)
    return root


def test_zero_updates_and_modules_that_alignment_left_alone_stay(adapter, D):
    still = D | {LAYERS[0]: torch.zeros(SHAPES[LAYERS[0]])}
    nothing = baselines.pruned(adapter, {LAYERS[1]})
    assert baselines.cosines(nothing, still) == dict.fromkeys(adapter.modules, 1.0)
    assert baselines.e_diem(nothing, still) == dict.fromkeys(adapter.modules)
    assert_updates(baselines.safe_lora(nothing, still), dense(nothing))
    assert baselines.relative_change(nothing, nothing) == 0


def test_what_cannot_be_done_is_said(adapter, D, subspace):
    calls = (
        (UsageError, "sides must be", lambda: baselines.projected(adapter, subspace, "top")),
        (UsageError, "count must be", lambda: baselines.prune_random(adapter, 3)),
        (UsageError, "count must be", lambda: baselines.prune_lowest_cosine(adapter, D, -1)),
        (UsageError, "rate must be", lambda: baselines.dropped(adapter, 1.0)),
        (UsageError, "other modules", lambda: baselines.relative_change(adapter, one(adapter))),
        (CsuloraError, "does not fit float32", lambda: baselines.scaled(adapter, 1e39)),
        (CsuloraError, "D of .* is", lambda: baselines.cosines(adapter, turned(D))),
        (CsuloraError, "give a D for", lambda: baselines.cosines(adapter, {})),
        (CsuloraError, "scaling is 0", lambda: baselines.add_back(silent(adapter), D, 1.0)),
    )
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()


def turned(D):
    return {n: X.mT for n, X in D.items()}


def one(adapter):
    return replace(adapter, modules={LAYERS[0]: adapter.modules[LAYERS[0]]})


def silent(adapter):
    modules = {n: replace(m, alpha=0.0, scaling=0.0) for n, m in adapter.modules.items()}
    return replace(adapter, modules=modules)
