"""Triton behind the package gives what torch gives: adapters, reports, errors, subspaces."""

from dataclasses import replace

import builders
import pytest
import torch

from csulora import (
    Correction,
    CsuloraError,
    LoraAdapter,
    LoraModule,
    Realignment,
    SafetySubspace,
    correct_batch,
    estimate,
)
from csulora.pipeline.backend import pick_solver
from csulora.pipeline.finish import finish
from csulora.pipeline.plan import Plan
from csulora.subspace import ModuleSubspace, Origin

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # NaN and overflow are part of some cases.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
F16, B16, F32 = torch.float16, torch.bfloat16, torch.float32


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--portable", "--form", "same")])
def test_the_command_writes_the_same_by_triton(tmp_path, subspace, capsys, options):
    folder = builders.write_adapter(tmp_path / "in" / "lora", dtype=B16, rank=3)
    for backend in ("torch", "triton"):
        result = builders.run(
            capsys, "correct", folder, "--subspace", subspace, "--out-dir", tmp_path / backend,
            "--backend", backend, "--device", "cpu", *options,
        )  # fmt: skip
        assert result.code == 0, result.err
    pair = [tmp_path / backend / "lora" for backend in ("torch", "triton")]
    wanted, found = (builders.effective(one) for one in pair)
    for name, dW in wanted.items():
        assert float((found[name] - dW).norm() / dW.norm()) <= 2e-2, name
    configs = [(one / builders.CONFIG).read_bytes() for one in pair]
    assert configs[0] == configs[1]
    reports = [(one / builders.REPORT).read_text(encoding="utf-8") for one in pair]
    assert [r.count('"rank_out"') for r in reports] == [len(wanted)] * 2


# --- a batch --------------------------------------------------------------------------------------


SIDES = {"a": (24, 16), "b": (16, 24), "c": (20, 20)}
FEW = ("bfloat16", "float16", "tiny both", "nan")
ERRORS = ("nan", "elsewhere", "huge")
SETTINGS = {
    "all of them": (Correction(1, 2, 3, float("inf")), None),
    "same": (Correction(form="same", lambda_left=100, granularity="component"), FEW),
    "kept": (Correction(0, 0, 0, 0), FEW),
    "realign": (Realignment(strength=float("inf"), edge=False), None),
    "realign, exact": (Realignment(form="exact", opposed=True, edge=False), FEW),
}


def orthonormal(d):
    return torch.linalg.qr(torch.randn(d, 4))[0]


def lora(names, rank=3, B=F32, A=F32, size=(1.0, 1.0), flip=False, **config):
    new = {}
    for n in names:
        o, i = SIDES[n][::-1] if flip else SIDES[n]
        new[f"model.{n}"] = LoraModule(
            (size[1] * torch.randn(rank, i)).to(A), (size[0] * torch.randn(o, rank)).to(B), 6.0, 2.0
        )
    return LoraAdapter(new, {"r": rank, "lora_alpha": 6, **config})


def adapters():
    nan = lora("ab")
    nan.modules["model.a"].A[0, 0] = float("nan")
    zero = lora("ab")
    zero.modules["model.b"].B.zero_()
    embedding = lora("abc", flip=True)
    for name in ("model.b", "model.c"):
        embedding.modules[name] = replace(embedding.modules[name], embedding=True)
    embedding.modules["model.a"] = lora("a").modules["model.a"]
    return {
        "plain": lora("abc"),
        "bfloat16": lora("ca", 5, B16, B16),
        "float16": lora("b", 2, F16, F16),
        "mixed": lora("ab", 2, F16),
        "tiny": lora("abc", size=(1e-30, 1.0)),
        "tiny both": lora("ab", size=(1e-25, 1e-25)),
        "huge": lora("ab", size=(1e25, 1.0)),
        "nan": nan,
        "zero": zero,
        "turned": lora("ab", flip=True, fan_in_fan_out=True),
        "embedding": embedding,
        "wide": lora("a", 130),
        "elsewhere": replace(lora("a"), modules={"x": lora("a").modules["model.a"]}),
    }


@pytest.fixture(scope="module")
def batch():
    """A subspace and adapters by name, the same for every batch: the subspace is packed once."""
    torch.manual_seed(0)
    modules = {
        n: ModuleSubspace(orthonormal(o), torch.ones(4), orthonormal(i), 0.5)
        for n, (o, i) in SIDES.items()
    }
    return SafetySubspace(modules, Origin("b", "a", "0" * 64, "1" * 64, 0)), adapters()


@pytest.mark.parametrize("which", SETTINGS)
def test_a_batch_by_triton_is_what_torch_gives_one_by_one(batch, which):
    """All types, sizes from 1e-30 to 1e25, transposed weights, ranks and errors in one batch."""
    subspace, known = batch
    correction, chosen = SETTINGS[which]
    some = {name: known[name] for name in chosen or known}
    found, expected = (
        correct_batch(list(some.values()), subspace, correction, backend=backend, device="cpu")
        for backend in ("triton", "torch")
    )
    for name, one, two in zip(some, found, expected, strict=True):
        if isinstance(two, CsuloraError):
            assert type(one) is type(two) and str(one) == str(two), (name, one, two)
            assert name in ERRORS, name
        else:
            check_adapter(name, one[0], two[0], correction)
            check_report(name, one[1], two[1])
    assert len(subspace.packed) == 1


def check_adapter(name, new, wanted, correction):
    assert list(new.modules) == list(wanted.modules) and new.config == wanted.config
    for key, module in wanted.modules.items():
        got = new.modules[key]
        assert (got.A.dtype, got.B.dtype) == (module.A.dtype, module.B.dtype), name
        assert (got.A.shape, got.B.shape) == (module.A.shape, module.B.shape), name
        assert (got.alpha, got.scaling) == (module.alpha, module.scaling), name
        assert got.embedding == module.embedding, name
        X, Y = (m.B.double() @ m.A.double() for m in (got, module))
        limit = 2e-5 if module.A.dtype == module.B.dtype == F32 else 2e-2
        if correction.form == "same":
            limit += 2e-3  # two fits that stop when a step gains little
        assert float((X - Y).norm()) <= limit * float(Y.norm()), (name, key)


def check_report(name, report, expected):
    assert report.settings == expected.settings and report.source == expected.source
    assert report.subspace == expected.subspace, name
    if name == "wide":
        assert "130 is above 128" in report.warnings[-1]
    else:
        assert len(report.warnings) == len(expected.warnings), (name, report.warnings)
    for key, wanted in expected.modules.items():
        check_figures(name, report.modules[key], wanted)


def check_figures(name, found, wanted):
    for field in ("rank_in", "rank_out", "subspace_rank"):
        assert getattr(found, field) == getattr(wanted, field), (name, field)
    for field in ("energy_before", "energy_after", "relative_change", "rank_error"):
        x, y = getattr(found, field), getattr(wanted, field)
        assert abs(x - y) <= 2e-3 * abs(y) + 1e-5 * (field[0] == "r"), (name, field, x, y)
    for field in ("relative_energy_before", "relative_energy_after"):
        for block, y in getattr(wanted, field).items():
            assert abs(getattr(found, field)[block] - y) <= 1e-3, (name, field, block)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_modules_of_one_adapter_may_have_strengths_of_their_own(batch, backend):
    """Each comes out as if all had its strengths, its form too; what is kept keeps its very values."""
    subspace, known = batch
    adapter = known["plain"]
    own = {
        "model.a": Correction(1, 2, 3, float("inf")),
        "model.b": Correction(0, 0, 0, 0),
        "model.c": Correction(form="same", lambda_off=50),
    }
    plan = Plan.of(adapter, subspace, Correction())
    mixed = tuple(m._replace(correction=own[m.name]) for m in plan.members)
    solve = pick_solver(backend, torch.device("cpu"))
    (solved,) = solve([plan._replace(members=mixed)], torch.device("cpu"))
    new, report = finish(plan._replace(members=mixed), solved)
    for name, correction in own.items():
        alone = replace(adapter, modules={name: adapter.modules[name]})
        (result,) = correct_batch([alone], subspace, correction, backend=backend, device="cpu")
        wanted, expected = result[0].modules[name], result[1].modules[name]
        found = new.modules[name]
        assert (found.rank, found.alpha, found.scaling) == (wanted.rank, wanted.alpha, 2.0)
        torch.testing.assert_close(found.B @ found.A, wanted.B @ wanted.A, rtol=1e-4, atol=1e-5)
        assert report.modules[name].relative_change == pytest.approx(
            expected.relative_change, rel=1e-5
        )
    assert torch.equal(new.modules["model.b"].B, adapter.modules["model.b"].B)
    assert new.config["rank_pattern"] == {"a": 6}


@pytest.mark.parametrize("dtype", [B16, F16])
@pytest.mark.parametrize("settings", [Realignment(form="same", edge=False), Correction(0, 0, 0, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_scaling_is_folded_into_a_b_that_stays_before_anything_is_rounded(
    batch, backend, settings, dtype
):
    """Written as float32, it has every digit of the product, and its range."""
    subspace, _ = batch
    scaling = 4096 * 1.7  # with entries of B above 10, out of float16's range
    small = lora("ab", B=dtype, A=dtype, size=(10.0, 1e-3))
    modules = {n: replace(m, alpha=3 * scaling, scaling=scaling) for n, m in small.modules.items()}
    config = {"r": 3, "lora_alpha": 3 * scaling}
    plan = Plan.of(LoraAdapter(modules, config), subspace, settings, dtype=F32, portable=True)
    (solved,) = pick_solver(backend, torch.device("cpu"))([plan], torch.device("cpu"))
    new, _ = finish(plan, solved)
    for name, module in modules.items():
        assert torch.equal(new.modules[name].B, module.B.float() * scaling)


# --- estimation -----------------------------------------------------------------------------------


def test_the_triton_product_finds_the_same_subspace(tmp_path):
    """Weights of two types, one of them turned."""
    shapes = {"h.0.attn.c_proj": (64, 64), "h.0.mlp.c_fc": (48, 90)}
    generator = torch.Generator().manual_seed(0)
    base = {f"{n}.weight": torch.randn(s, generator=generator).to(B16) for n, s in shapes.items()}
    aligned = {
        n: W.float() + builders.with_spectrum(*W.shape, lambda i: 3.0**-i) for n, W in base.items()
    }
    folders = (
        builders.write_checkpoint(tmp_path / "b", base, model_type="gpt2"),
        builders.write_checkpoint(tmp_path / "a", aligned, model_type="gpt2"),
    )
    subspaces = []
    for backend in ("torch", "triton"):
        path = tmp_path / f"{backend}.safetensors"
        estimate(*folders, rank=2, seed=3, device="cpu", backend=backend).save(path)
        subspaces.append(SafetySubspace.load(path))
    one, two = subspaces
    assert one.origin == two.origin and list(one.modules) == list(shapes)
    for name, module in one.modules.items():
        found = two.modules[name]
        torch.testing.assert_close(found.S, module.S, rtol=1e-4, atol=0)
        for X, Y in ((found.U, module.U), (found.V, module.V)):
            assert float((X - Y).abs().max()) <= 1e-3, name
