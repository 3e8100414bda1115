"""Estimation: accuracy against the exact SVD, streaming, orientation, determinism."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import builders
import pytest
import torch
from builders import orthonormal, with_spectrum
from safetensors.torch import save_file

from csulora import CsuloraError, LoraAdapter, LoraModule, SafetySubspace, estimate
from csulora.method import krylov
from csulora.method.krylov import top_triplets


def gaussian(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


MATRICES = {
    "gaussian, tall": lambda: gaussian(1200, 700),
    "gaussian, wide": lambda: gaussian(400, 1100),
    "perfectly flat": lambda: orthonormal(600, 600, 3).float(),
    "slow power law": lambda: with_spectrum(900, 600, lambda i: i**-0.25),
    "power law": lambda: with_spectrum(600, 900, lambda i: i**-1.0),
    "exponential": lambda: with_spectrum(700, 600, lambda i: torch.exp(-i / 30)),
    "two scales": lambda: with_spectrum(700, 600, lambda i: torch.where(i < 9, 1e3, 1.0)),
    "tiny": lambda: gaussian(9, 5),
    "strong ones before noise": lambda: spiked(700, 1100, 8, 8.0),
    "one before noise": lambda: spiked(900, 600, 1, 30.0),
    "many before noise": lambda: spiked(640, 640, 40, 5.0),
}


def spiked(m, n, count, size):
    """Noise, and directions that stand so many times above its edge."""
    strong = size * (m**0.5 + n**0.5) * orthonormal(m, count, 1) @ orthonormal(n, count, 2).mT
    return gaussian(m, n) + strong.float()


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("kind", MATRICES)
def test_top_triplets_hold_the_energy_of_the_exact_svd(kind, rank):
    D = MATRICES[kind]()
    U, S, V, total = top_triplets(D, torch.Generator().manual_seed(0), rank=rank)
    exact = torch.linalg.svdvals(D.double()).square()
    k = min(rank, *D.shape)
    assert S.shape == (k,) and U.shape == (D.shape[0], k) and V.shape == (D.shape[1], k)
    assert total == pytest.approx(float(exact.sum()), rel=1e-5)
    wanted = 0.999 * float(exact[:k].sum())
    assert float((U.double().mT @ D.double()).square().sum()) >= wanted
    assert float((D.double() @ V.double()).square().sum()) >= wanted
    assert float(S.double().square().sum()) >= wanted
    for X in (U, V):
        assert float((X.double().mT @ X.double() - torch.eye(k)).abs().max()) <= 1e-6
    assert bool((S[:-1] >= S[1:]).all())
    # signs belong together: U^T D V is diagonal and positive
    torch.testing.assert_close(
        (U.double().mT @ D.double() @ V.double()).diagonal().float(), S, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["noise", "slow power law"])
def test_a_narrow_matrix_with_a_flat_spectrum_needs_few_products(kind, monkeypatch):
    """Of the shape of a model's key and value projections, at half of their size."""
    n, rank = 520, 32
    D = {
        "noise": lambda: gaussian(2080, n),
        "slow power law": lambda: with_spectrum(1040, n, lambda i: i**-0.25),
    }[kind]()
    monkeypatch.setattr(krylov, "OVERSAMPLING", 8)  # blocks of the same share of the side
    monkeypatch.setattr(krylov, "_dense", None)
    found = krylov.top_triplets(D, torch.Generator().manual_seed(0), rank=rank)
    exact = torch.linalg.svdvals(D.double())[:rank].square().sum()
    assert float(found.S.double().square().sum()) >= (1 - 1e-3) * float(exact)


def test_directions_of_a_low_rank_matrix_end_at_its_rank():
    D = gaussian(300, 5) @ gaussian(5, 200)
    assert top_triplets(D, torch.Generator().manual_seed(0), rank=64).S.shape == (5,)


def test_small_directions_of_a_large_vocabulary_are_no_rounding():
    spectrum = torch.full((24,), 1e-3)
    spectrum[0] = 1
    D = (orthonormal(60_000, 24, 1).float() * spectrum) @ orthonormal(24, 24, 2).float().mT
    S = top_triplets(D, torch.Generator().manual_seed(0), rank=8).S
    torch.testing.assert_close(S, spectrum[:8], rtol=1e-3, atol=0)
    S = top_triplets(D, torch.Generator().manual_seed(0), rank=8, energy_share=1 - 5.5e-6).S
    assert len(S) == 19


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "kind",
    ["gaussian, tall", "slow power law", "power law", "exponential", "strong ones before noise"],
)
def test_energy_share_takes_as_many_directions_as_needed(kind, share, rank):
    D = MATRICES[kind]()
    U, S, _, _ = top_triplets(D, torch.Generator().manual_seed(0), rank=rank, energy_share=share)
    exact = torch.linalg.svdvals(D.double()).square()
    needed = int((exact.cumsum(0) / exact.sum() < share).sum()) + 1
    # The estimate errs only by directions whose energy it has to within 0.1 %.
    assert abs(S.shape[0] - needed) <= max(1, 0.01 * needed)
    held = float((U.double().mT @ D.double()).square().sum())
    assert held >= 0.999 * float(exact[: len(S)].sum())


def test_an_adapter_that_names_no_modules_is_told_by_name(tmp_path):
    folders = [write_checkpoint(tmp_path / name, layer(i)) for i, name in enumerate("ab")]
    adapter = builders.write_adapter(tmp_path / "adapter", use_dora=True)
    with pytest.raises(CsuloraError, match="adapter: none of its tensors is a LoRA update"):
        estimate(*folders, like=adapter)


def write_checkpoint(folder, weights, model_type="llama", **config):
    folder.mkdir()
    save_file(
        {f"{k}.weight": v.contiguous() for k, v in weights.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return folder


def layer(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (48, 48), "k_proj": (16, 48), "down_proj": (48, 80)}
    return {
        f"model.layers.0.{name}": torch.randn(*shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def pair(tmp_path):
    return (
        write_checkpoint(tmp_path / "base", layer(0)),
        write_checkpoint(tmp_path / "aligned", layer(1)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_estimate_reads_every_float_type_and_subtracts_in_float32(tmp_path, dtype):
    base, aligned = layer(0, dtype), layer(1, torch.float32)
    subspace = estimate(
        write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", aligned), rank=4
    )
    for name, module in subspace.modules.items():
        D = aligned[name] - base[name].float()
        exact = torch.linalg.svdvals(D.double())[:4]
        torch.testing.assert_close(module.S.double(), exact, rtol=1e-3, atol=0)
        assert module.U.shape[0] == D.shape[0] and module.V.shape[0] == D.shape[1]
        share = float(exact.square().sum() / D.double().square().sum())
        assert module.energy_share == pytest.approx(share, rel=1e-3)


def test_same_seed_same_bytes_and_a_smaller_rank_is_a_prefix(pair, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        estimate(*pair, rank=8, seed=3).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    loaded = SafetySubspace.load(paths[0])
    assert loaded.sha256 == estimate(*pair, rank=8, seed=3).sha256
    for name, module in SafetySubspace.load(paths[0], rank=3).modules.items():
        assert torch.equal(module.U, loaded.modules[name].U[:, :3])
        assert torch.equal(module.S, loaded.modules[name].S[:3])


def test_a_module_does_not_depend_on_what_else_is_selected(pair):
    everything = estimate(*pair, rank=4)
    alone = estimate(*pair, rank=4, modules=["k_proj"])
    assert list(alone.modules) == ["model.layers.0.k_proj"]
    name = "model.layers.0.k_proj"
    assert torch.equal(everything.modules[name].U, alone.modules[name].U)


def test_embeddings_and_head_are_left_out_unless_named(tmp_path):
    extra = {"model.embed_tokens": torch.randn(30, 48), "lm_head": torch.randn(30, 48)}
    base = write_checkpoint(tmp_path / "b", layer(0) | extra)
    aligned = write_checkpoint(tmp_path / "a", layer(1) | {k: v + 1 for k, v in extra.items()})
    assert "lm_head" not in estimate(base, aligned, rank=2).modules
    assert list(estimate(base, aligned, rank=2, modules=["lm_head"]).modules) == ["lm_head"]


def lora(shapes, fan_in_fan_out, seed=5):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraModule(
            A=torch.randn(2, d_in, generator=generator),
            B=torch.randn(d_out, 2, generator=generator),
            alpha=2,
            scaling=1.0,
        )
        for name, (d_out, d_in) in shapes.items()
    }
    return LoraAdapter(modules, {"fan_in_fan_out": fan_in_fan_out, "r": 2, "lora_alpha": 2})


@pytest.mark.parametrize("model_type", ["gpt2", "unheard-of"])
def test_conv1d_weights_are_turned_whoever_knows_about_it(tmp_path, model_type):
    """Square and oblong weights stored as (d_in, d_out): by model type, by --like, by the adapter."""
    from csulora import correct

    shapes = {"h.0.attn.c_proj": (40, 40), "h.0.mlp.c_fc": (96, 40)}
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(i, o, generator=generator) for n, (o, i) in shapes.items()}
    aligned = {n: W + torch.randn(W.shape, generator=generator) for n, W in base.items()}
    folders = (
        write_checkpoint(tmp_path / "b", base, model_type),
        write_checkpoint(tmp_path / "a", aligned, model_type),
    )
    adapter = lora({f"transformer.{n}": s for n, s in shapes.items()}, fan_in_fan_out=True)
    results = []
    for like in (None, adapter):
        subspace = estimate(*folders, rank=8, like=like)
        new, _ = correct(adapter, subspace)
        results.append({n: m.B @ m.A for n, m in new.modules.items()})
    import oracle

    for name, (d_out, d_in) in shapes.items():
        D = (aligned[name] - base[name]).double().mT
        assert D.shape == (d_out, d_in)
        left, _, right = torch.linalg.svd(D)
        module = adapter.modules[f"transformer.{name}"]
        wanted = oracle.correct(
            module.B @ module.A, left[:, :8], right[:8].mT, (0, 10, 10, 10), "direction"
        )
        for result in results:
            error = (result[f"transformer.{name}"].double() - wanted).norm() / wanted.norm()
            assert float(error) <= 2e-2  # the two subspaces differ by what the estimate may miss


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "unheard-of"])
def test_a_square_weight_beside_others_of_both_layouts(tmp_path, model_type, flag):
    """PEFT leaves in `fan_in_fan_out` what the last module wanted, so it may be untrue of all others."""
    from csulora import correct

    # As stored: two Conv1D layers, a linear one, and an output head, which says nothing of the others.
    shapes = {"c_fc": (40, 96), "c_proj": (40, 40), "up": (64, 40), "lm_head": (120, 40)}
    turned = {"c_fc", "c_proj"}
    base = {n: gaussian(*shape) for n, shape in shapes.items()}
    aligned = {n: W + gaussian(*W.shape) for n, W in base.items()}
    folders = (
        write_checkpoint(tmp_path / "b", base, model_type),
        write_checkpoint(tmp_path / "a", aligned, model_type),
    )

    def adapter(*names):
        own = {n: shapes[n][::-1] if n in turned else shapes[n] for n in names}
        return lora(own, fan_in_fan_out=flag)

    mixed, known = adapter(*shapes), model_type == "gpt2"
    if known:
        found = estimate(*folders, rank=4, like=mixed).modules
        assert {n for n, m in found.items() if m.fan_in_fan_out} == turned
    else:
        with pytest.raises(
            CsuloraError, match=r"c_proj.weight is square, and whether it is stored"
        ):
            estimate(*folders, rank=4, like=mixed)
    plain = estimate(*folders, rank=4, modules=list(shapes))
    if known or not flag:
        assert (len(correct(adapter("up", "lm_head", "c_proj"), plain)[0].modules)) == 3
    else:
        with pytest.raises(CsuloraError, match=r"c_proj: .* that of c_fc is, that of up is not"):
            correct(mixed, plain)
        # Alone with what is turned as it is, or with the head, it can be told.
        assert len(correct(adapter("c_fc", "c_proj", "lm_head"), plain)[0].modules) == 3


def test_an_embedding_is_estimated_as_it_is_stored_and_has_to_be_of_its_size(tmp_path):
    """Whoever asks for it, square or not; a vocabulary that training resized fits no checkpoint."""
    shapes = {"tokens": (40, 12), "square": (12, 12)}
    base = {n: gaussian(*shape) for n, shape in shapes.items()}
    folders = (
        write_checkpoint(tmp_path / "b", base),
        write_checkpoint(tmp_path / "a", {n: W + gaussian(*W.shape) for n, W in base.items()}),
    )
    adapter = lora({n: shape[::-1] for n, shape in shapes.items()}, fan_in_fan_out=True)
    for name, module in adapter.modules.items():
        adapter.modules[name] = replace(module, embedding=True)
    by_name = estimate(*folders, rank=2, modules=list(shapes))
    assert {n: (len(m.U), len(m.V)) for n, m in by_name.modules.items()} == shapes
    assert estimate(*folders, rank=2, like=adapter).sha256 == by_name.sha256
    for d_out, d_in in ((12, 41), (40, 12)):
        factors = {"B": torch.zeros(d_out, 2), "A": torch.zeros(2, d_in)}
        module = replace(adapter.modules["tokens"], **factors)
        other = replace(adapter, modules={"tokens": module})
        with pytest.raises(CsuloraError, match=r"tokens.weight is \(40, 12\), but the adapter"):
            estimate(*folders, rank=2, like=other)


def test_equal_modules_have_no_directions_and_equal_models_are_an_error(tmp_path):
    base, aligned = layer(0), layer(1)
    aligned["model.layers.0.k_proj"] = base["model.layers.0.k_proj"]
    first = write_checkpoint(tmp_path / "b", base)
    subspace = estimate(first, write_checkpoint(tmp_path / "a", aligned), rank=4)
    assert subspace.modules["model.layers.0.k_proj"].U.shape == (16, 0)
    subspace.save(tmp_path / "s.safetensors")
    assert SafetySubspace.load(tmp_path / "s.safetensors").modules.keys() == base.keys()
    with pytest.raises(CsuloraError, match="equal"):
        estimate(first, first, rank=4)


def test_peak_memory_is_a_few_modules(tmp_path):
    """Two models of 24 x 4 MB stay on disk: the resident set grows by far less than one of them."""
    for name, seed in (("b", 0), ("a", 1)):
        weights = {
            f"model.layers.{i}.q_proj": gaussian(1024, 1024) * (seed + i + 1) for i in range(24)
        }
        write_checkpoint(tmp_path / name, weights)
    code = f"""
import resource, torch
from csulora import estimate
torch.linalg.svd(torch.randn(64, 64)); torch.linalg.eigh(torch.randn(64, 64).double())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
estimate({str(tmp_path / "b")!r}, {str(tmp_path / "a")!r}, rank=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 60 * 1024  # kB; both models are 192 MB


def test_the_reader_is_one_module_ahead_and_its_error_comes_through(pair, monkeypatch):
    from csulora import estimation

    events = []
    read = estimation._read
    done = threading.Event()

    def recorded(checkpoint, name, digest):
        events.append(("read", name))
        if len([e for e in events if e[0] == "read"]) == 4:
            done.set()
        return read(checkpoint, name, digest)

    def worked(D, name, *rest):
        assert name != sorted(layer(0))[0] or done.wait(60), "the next pair was not being read"
        events.append(("work", name))
        return subspace(D, name, *rest)

    subspace = estimation._module_subspace
    monkeypatch.setattr(estimation, "_read", recorded)
    monkeypatch.setattr(estimation, "_module_subspace", worked)
    estimate(*pair, rank=2)
    assert [name for kind, name in events if kind == "work"] == sorted(layer(0))

    def broken(checkpoint, name, digest):
        raise CsuloraError(f"{name}: gone")

    monkeypatch.setattr(estimation, "_read", broken)
    with pytest.raises(CsuloraError, match="gone"):
        estimate(*pair, rank=2)
