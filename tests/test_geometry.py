"""Where an update lies by number of directions, against dense float64 matrices."""

import json
import math
from dataclasses import replace

import builders
import pytest
import torch
from builders import LAYERS, SHAPES

from csulora import LoraAdapter, SafetySubspace
from csulora.baselines import pruned
from csulora.geometry import geometry

BLOCKS = ("aligned", "partial_left", "partial_right", "off")
K = 5


@pytest.fixture
def loaded(tmp_path, adapter):
    """Gains and overlaps that differ: the update of one module holds a part of minus D."""
    file = tmp_path / "five.safetensors"
    subspace = SafetySubspace.load(builders.write_subspace(file, builders.subspace_tensors(rank=K)))
    return against(LoraAdapter.load(adapter), subspace), subspace


def against(adapter, subspace):
    name = LAYERS[0]
    m, found = adapter.modules[name], subspace.modules[name]
    new = replace(m, B=-found.U[:, :4] * found.S[:4] + m.B, A=found.V[:, :4].mT + 0.1 * m.A)
    return replace(adapter, modules={**adapter.modules, name: new})


def dense(m):
    return m.scaling * (m.B.double() @ m.A.double())


def figures(dW, D, U, V):
    """Shares, read gain and overlap, from their definitions; dW and D are lists of one matrix or many."""
    energies = torch.zeros(4, dtype=torch.float64)
    reads = random = inner = displacement = 0.0
    for X, Y, u, v in zip(dW, D, U, V, strict=True):
        P_U, P_V = u @ u.mT, v @ v.mT
        I_out, I_in = (torch.eye(len(P), dtype=P.dtype) for P in (P_U, P_V))
        blocks = (P_U @ X @ P_V, P_U @ X @ (I_in - P_V), (I_out - P_U) @ X @ P_V)
        blocks = (*blocks, (I_out - P_U) @ X @ (I_in - P_V))
        energies += torch.stack([block.square().sum() for block in blocks])
        reads += float((X @ v).square().sum())
        random += float(X.square().sum()) * v.shape[1] / v.shape[0]
        inner += float((X * Y).sum())
        displacement += float(Y.square().sum())
    E = float(energies.sum())
    return (energies / E).tolist(), reads / random, inner / math.sqrt(E * displacement)


def by_definition(adapter, subspace, names, k):
    found = [subspace.modules[n].leading(k) for n in names]
    U, V = [f.U.double() for f in found], [f.V.double() for f in found]
    D = [(u * f.S.double()) @ v.mT for u, v, f in zip(U, V, found, strict=True)]
    return figures([dense(adapter.modules[n]) for n in names], D, U, V)


def assert_places(places, expected):
    shares, gain, overlap = expected
    assert list(places.relative_energy) == list(BLOCKS)
    assert list(places.relative_energy.values()) == pytest.approx(shares, abs=1e-6)
    assert places.read_gain == pytest.approx(gain, rel=1e-6)
    assert places.overlap == pytest.approx(overlap, abs=1e-6)


def test_every_figure_is_that_of_its_definition_at_every_k(loaded):
    adapter, subspace = loaded
    found = geometry(adapter, subspace)
    assert [place.k for place in found.totals] == [2, 4, 5]
    for names, places in [([n], p) for n, p in found.modules.items()] + [
        (list(SHAPES), found.totals)
    ]:
        assert [place.k for place in places] == [2, 4, 5]
        for place in places:
            assert_places(place, by_definition(adapter, subspace, names, place.k))
    assert found.modules[LAYERS[0]][-1].overlap < -0.5
    assert found.modules[LAYERS[0]][0].read_gain > 2


def test_modules_with_fewer_directions_count_with_all_they_have(loaded):
    adapter, subspace = loaded
    for rank in (1, 0, 2):
        modules = {**subspace.modules, LAYERS[1]: subspace.modules[LAYERS[1]].leading(rank)}
        other = replace(subspace, modules=modules)
        found = geometry(adapter, other)
        assert [place.k for place in found.modules[LAYERS[1]]] == [rank]
        for place in found.totals:
            expected = by_definition(adapter, other, list(SHAPES), place.k)
            assert_places(place, expected)


def test_figures_do_not_depend_on_how_the_update_is_split(loaded):
    adapter, subspace = loaded
    expected = geometry(adapter, subspace)
    generator = torch.Generator().manual_seed(0)
    for c in (1e-6, 1e6, None):
        modules = {}
        for name, m in adapter.modules.items():
            # None: a number for each column of its own, and another scaling.
            t = torch.exp2(torch.randint(-9, 9, (m.rank,), generator=generator).float())
            t = t if c is None else torch.full_like(t, c)
            s = 1.0 if c is None else m.scaling
            modules[name] = replace(m, B=m.B * t * (m.scaling / s), A=m.A / t[:, None], scaling=s)
        found = geometry(replace(adapter, modules=modules), subspace)
        for new, old in zip(found.totals, expected.totals, strict=True):
            assert_places(new, (list(old.relative_energy.values()), old.read_gain, old.overlap))


def test_a_zero_update_has_no_figures(loaded):
    adapter, subspace = loaded
    found = geometry(pruned(adapter, set(SHAPES)), subspace)
    assert found.hints == [h for h in found.hints if h.startswith("k is above")]
    for place in (*found.totals, *found.modules[LAYERS[0]]):
        assert set(place.relative_energy.values()) == {0.0}
        assert (place.read_gain, place.overlap) == (0.0, 0.0)


def test_an_embedding_reads_tokens(tmp_path):
    """Its U and V are given the other way round, as the weight is stored (tokens, width)."""
    tensors = builders.subspace_tensors({"model.embed_tokens": (32, 16)})
    subspace = SafetySubspace.load(builders.write_subspace(tmp_path / "s.safetensors", tensors))
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in ((4, 32), (16, 4)))
    adapter = LoraAdapter.from_tensors(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": A,
            "base_model.model.model.embed_tokens.lora_embedding_B": B,
        },
        {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens"]},
    )
    U, S, V = (tensors[f"model.embed_tokens.{x}"].double() for x in "USV")
    D = (U * S) @ V.mT
    expected = figures([(B @ A).double()], [D.mT], [V], [U])
    assert_places(geometry(adapter, subspace).totals[-1], expected)


def test_hints_come_above_their_limits_only(loaded, tmp_path):
    adapter, subspace = loaded
    wide, overlap = geometry(adapter, subspace).hints
    assert "above 5% of the smaller side of 2 module(s)" in wide and LAYERS[0] in wide
    assert "works against" in overlap
    m = adapter.modules[LAYERS[0]]
    repeats = replace(adapter, modules={**adapter.modules, LAYERS[0]: replace(m, B=-m.B)})
    assert "repeats" in geometry(repeats, subspace).hints[1]
    name, shape = "model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj": (40, 80)}
    large = LoraAdapter.load(builders.write_adapter(tmp_path / "large", shapes=shape))
    for k, hints in ((2, 0), (3, 1)):
        tensors = builders.subspace_tensors(shape, rank=k)
        file = builders.write_subspace(tmp_path / f"{k}.safetensors", tensors)
        found = geometry(large, SafetySubspace.load(file))
        assert abs(found.totals[-1].overlap) < 0.1
        assert [h for h in found.hints if name in h] == found.hints and len(found.hints) == hints


def test_inspect_tells_them_and_gives_no_verdict(capsys, adapter, subspace):
    call = ("inspect", adapter, "--subspace", subspace)
    result = builders.run(capsys, *call)
    assert result.code == 0
    (line,) = [x for x in result.out.splitlines() if "no verdict on safety" in x]
    assert "docs/evidence.md" in line
    assert "read gain" in result.out and "hint: k is above 5%" in result.out
    found = json.loads(builders.run(capsys, *call, "--json").out)
    expected = geometry(LoraAdapter.load(adapter), SafetySubspace.load(subspace))
    assert found["geometry"] == json.loads(json.dumps(expected.to_dict()))
    assert found["geometry"]["verdict"] in line
    shares = found["totals"]["relative_energy_before"]
    assert found["geometry"]["totals"][-1]["relative_energy"] == pytest.approx(shares, abs=1e-6)
