"""Which implementation runs, and that both mean the same: adapters, reports, errors."""

import os
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import torch

from csulora import UsageError
from csulora.backend import pick_backend

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def interpreted(code, *arguments, check=True):
    """Run code in a process in which Triton works on the CPU."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_cpu_takes_torch_and_an_explicit_triton_says_why_not():
    assert pick_backend("auto", CPU) == "torch" and pick_backend("torch", CPU) == "torch"
    with pytest.raises(UsageError, match="backend must be"):
        pick_backend("cuda", CPU)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(UsageError, match="backend triton cannot run: Triton needs a CUDA"):
            pick_backend("triton", CPU)


def test_cuda_takes_triton(monkeypatch):
    import csulora_kernels

    monkeypatch.setattr(csulora_kernels, "unavailable", lambda device: None)
    assert pick_backend("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(csulora_kernels, "unavailable", lambda device: "no reason")
    assert pick_backend("auto", torch.device("cuda")) == "torch"
    with pytest.raises(UsageError, match="no reason"):
        pick_backend("triton", torch.device("cuda"))


def test_the_command_refuses_triton_in_one_line(adapter, subspace, out, capsys):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under the interpreter it runs")
    result = builders.run(
        capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out,
        "--backend", "triton", "--device", "cpu",
    )  # fmt: skip
    assert result.code == 2 and len(result.complaints) == 1 and "CUDA" in result.err
    assert not out.exists()


COMMAND = "import sys; from csulora.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("options", [(), ("--portable", "--rank", "same")])
def test_the_command_writes_the_same_by_triton(tmp_path, subspace, options):
    folder = builders.write_adapter(tmp_path / "in" / "lora", dtype=torch.bfloat16, rank=3)
    for backend in ("torch", "triton"):
        interpreted(
            COMMAND, "correct", folder, "--subspace", subspace, "--out-dir", tmp_path / backend,
            "--backend", backend, "--device", "cpu", *options,
        )  # fmt: skip
    pair = [tmp_path / backend / "lora" for backend in ("torch", "triton")]
    wanted, found = (builders.effective(one) for one in pair)
    for name, dW in wanted.items():
        assert float((found[name] - dW).norm() / dW.norm()) <= 2e-2, name
    configs = [(one / builders.CONFIG).read_bytes() for one in pair]
    assert configs[0] == configs[1]
    reports = [(one / builders.REPORT).read_text(encoding="utf-8") for one in pair]
    assert [r.count('"rank_out"') for r in reports] == [len(wanted)] * 2


BATCH = """
import torch
from dataclasses import replace
import builders
from csulora import Correction, CsuloraError, LoraAdapter, LoraModule, SafetySubspace
from csulora.correction import correct, correct_batch
from csulora.subspace import ModuleSubspace, Origin

torch.manual_seed(0)
torch.set_num_threads(1)
sides = {"a": (24, 16), "b": (16, 24), "c": (20, 20)}
modules = {
    n: ModuleSubspace(
        torch.linalg.qr(torch.randn(o, 4))[0], torch.ones(4), torch.linalg.qr(torch.randn(i, 4))[0], 0.5
    )
    for n, (o, i) in sides.items()
}
subspace = SafetySubspace(modules, Origin("b", "a", "0" * 64, "1" * 64, 0))

def lora(names, rank=3, B=torch.float32, A=torch.float32, size=(1.0, 1.0), flip=False, **config):
    new = {}
    for n in names:
        o, i = sides[n][::-1] if flip else sides[n]
        new[f"model.{n}"] = LoraModule(
            (size[1] * torch.randn(rank, i)).to(A), (size[0] * torch.randn(o, rank)).to(B), 6.0, 2.0
        )
    return LoraAdapter(new, {"r": rank, "lora_alpha": 6, **config})

F16, B16 = torch.float16, torch.bfloat16
nan = lora("ab")
nan.modules["model.a"].A[0, 0] = float("nan")
zero = lora("ab")
zero.modules["model.b"].B.zero_()
adapters = {
    "plain": lora("abc"), "bfloat16": lora("ca", 5, B16, B16), "float16": lora("b", 2, F16, F16),
    "mixed": lora("ab", 2, F16), "tiny": lora("abc", size=(1e-30, 1.0)),
    "tiny both": lora("ab", size=(1e-25, 1e-25)), "huge": lora("ab", size=(1e25, 1.0)),
    "nan": nan, "zero": zero, "turned": lora("ab", flip=True, fan_in_fan_out=True),
    "wide": lora("a", 130), "elsewhere": replace(lora("a"), modules={"x": lora("a").modules["model.a"]}),
}
few = {name: adapters[name] for name in ("bfloat16", "float16", "tiny both", "nan")}
for settings, some in (
    (Correction(1, 2, 3, float("inf")), adapters),
    (Correction(rank="same", lambda_left=100, granularity="component"), few),
    (Correction(0, 0, 0, 0), few),
):
    found = correct_batch(list(some.values()), subspace, settings, backend="triton", device="cpu")
    again = correct_batch(list(some.values()), subspace, settings, backend="torch", device="cpu")
    for (name, adapter), one, two in zip(some.items(), found, again, strict=True):
        if isinstance(two, CsuloraError):
            assert type(one) is type(two) and str(one) == str(two), (name, one, two)
            assert name in ("nan", "elsewhere", "huge"), name
            continue
        new, report = one
        wanted, expected = two
        assert report.settings == expected.settings and report.source == expected.source
        assert report.subspace == expected.subspace, name
        if name == "wide":
            assert "130 is above 128" in report.warnings[-1]
        else:
            assert len(report.warnings) == len(expected.warnings), (name, report.warnings)
        assert list(new.modules) == list(wanted.modules) and new.config == wanted.config
        for key, module in wanted.modules.items():
            got = new.modules[key]
            assert (got.A.dtype, got.B.dtype) == (module.A.dtype, module.B.dtype), name
            assert (got.A.shape, got.B.shape) == (module.A.shape, module.B.shape), name
            assert (got.alpha, got.scaling) == (module.alpha, module.scaling), name
            X, Y = (m.B.double() @ m.A.double() for m in (got, module))
            limit = 2e-5 if torch.float32 == module.A.dtype == module.B.dtype else 2e-2
            if settings.rank == "same":
                limit += 2e-3  # two fits that stop when a step gains little
            assert float((X - Y).norm()) <= limit * float(Y.norm()), (name, key)
            a, b = report.modules[key], expected.modules[key]
            for field in ("rank_in", "rank_out", "subspace_rank"):
                assert getattr(a, field) == getattr(b, field), (name, field)
            for field in ("energy_before", "energy_after", "relative_change", "rank_error"):
                x, y = getattr(a, field), getattr(b, field)
                assert abs(x - y) <= 2e-3 * abs(y) + 1e-5 * (field[0] == "r"), (name, field, x, y)
            for field in ("relative_energy_before", "relative_energy_after"):
                for block, y in getattr(b, field).items():
                    assert abs(getattr(a, field)[block] - y) <= 1e-3, (name, field, block)
assert len(subspace.packed) == 1
print("done")
"""


def test_a_batch_by_triton_is_what_torch_gives_one_by_one():
    """All types, sizes from 1e-30 to 1e25, transposed weights, ranks and errors in one batch."""
    assert interpreted(BATCH).stdout.split() == ["done"]


def test_importing_the_package_imports_no_triton():
    code = "import sys, csulora; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)
