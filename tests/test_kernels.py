"""The Triton kernels under the interpreter, stage by stage against float64, and their interface."""

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch

import csulora_kernels as kernels

HERE = Path(__file__).parent


def interpreted(*arguments):
    """A Python process in which Triton runs on the CPU: that is chosen before Triton is imported."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_every_stage_is_as_exact_as_promised(name):
    pytest.importorskip("triton")
    assert interpreted(str(HERE / "kernel_cases.py"), name).startswith(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", kernel_cases.SLOW)
def test_large_ranks_are_as_exact(name):
    pytest.importorskip("triton")
    assert interpreted(str(HERE / "kernel_cases.py"), name).startswith(name)


def test_importing_the_kernels_imports_no_triton():
    code = "import sys, csulora_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


def test_public_names():
    """The stages stay functions after the files of their kernels have been imported, too."""
    code = """
import csulora_kernels as k, torch
basis = k.pack_basis({"m": (torch.eye(4)[:, :2], torch.eye(4)[:, :2])})
k.correct(k.pack([{"m": (torch.ones(4, 1), torch.ones(1, 4))}], basis), basis, k.Penalties())
print([name for name in k.__all__ if not hasattr(k, name)], callable(k.project), callable(k.solve))
"""
    assert interpreted("-c", code).split() == ["[]", "True", "True"]


def bases(**shapes):
    return {
        name: tuple(torch.linalg.qr(torch.randn(d, k))[0] for d in (o, i))
        for name, (o, i, k) in shapes.items()
    }


def factors(o, r, i, dtype=torch.float32):
    return torch.randn(o, r).to(dtype), torch.randn(r, i).to(dtype)


def test_one_body_is_one_copy_and_keeps_its_order():
    """Tensors that lie in one storage, as those of a safetensors file do, are packed as they lie."""
    basis = kernels.pack_basis(bases(a=(8, 16, 2), b=(16, 8, 2)))
    body = torch.randn(4 * (8 + 16) * 2)
    A1, B1, A2, B2 = (
        body[start : start + size].view(shape)
        for start, size, shape in (
            (0, 64, (4, 16)),
            (64, 32, (8, 4)),
            (96, 32, (4, 8)),
            (128, 64, (16, 4)),
        )
    )
    table = kernels.pack([{"a": (B1, A1), "b": (B2, A2)}], basis)
    assert torch.equal(table.data, body)
    for m, (B, A) in enumerate(((B1, A1), (B2, A2))):
        assert torch.equal(table.B(0, m), B) and torch.equal(table.A(0, m), A)


def test_every_offset_is_a_whole_vector():
    basis = kernels.pack_basis(bases(a=(7, 5, 3), b=(9, 11, 1)))
    adapters = [{"a": factors(7, 3, 5, torch.bfloat16)}, {"b": factors(9, 1, 11, torch.bfloat16)}]
    table = kernels.pack(adapters, basis)
    for tensor in (table, kernels.empty_like(table, 2)):
        offsets = [o for row in tensor.slots for slot in row for o in slot[1:]]
        assert all(o * 2 % 16 == 0 for o in offsets) and tensor.data.data_ptr() % 16 == 0
    assert table.slots[0][1].r == 0 and table.max_rank == 3 and table.vec_r == 1


def test_a_part_of_a_basis_shares_its_memory_and_may_be_transposed():
    whole = kernels.pack_basis(bases(a=(8, 5, 3), b=(9, 11, 1)))
    part = whole.take({"x": ("b", True), "a": ("a", False)})
    assert part.data is whole.data and part.shapes == ((11, 9, 1), (8, 5, 3))
    assert torch.equal(part.U(0), whole.V(1)) and torch.equal(part.V(0), whole.U(1))
    assert torch.equal(part.U(1), whole.U(0))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"a": (torch.ones(8, 2), torch.ones(3, 5))}, r"adapter 0, a: B and A are \(8, 2\)"),
        ({"z": (torch.ones(8, 2), torch.ones(2, 5))}, "module z is not in the basis"),
        ({"a": (torch.ones(8, 2), torch.ones(2, 5).half())}, "must share one of"),
    ],
)
def test_what_does_not_fit_is_refused(adapter, message):
    basis = kernels.pack_basis(bases(a=(8, 5, 3)))
    with pytest.raises(ValueError, match=message):
        kernels.pack([adapter], basis)


def test_without_a_device_or_the_interpreter_there_is_a_reason():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under the interpreter")
    reason = kernels.unavailable(torch.device("cpu"))
    assert "CUDA" in reason
    basis = kernels.pack_basis(bases(a=(8, 5, 3)))
    table = kernels.pack([{"a": factors(8, 2, 5)}], basis)
    with pytest.raises(RuntimeError, match="CUDA"):
        kernels.correct(table, basis, kernels.Penalties())


def test_ranks_above_the_limit_are_refused_by_name():
    code = """
import csulora_kernels as k, torch
basis = k.pack_basis({"m": (torch.eye(4)[:, :2], torch.eye(4)[:, :2])})
table = k.pack([{"m": (torch.ones(4, 129), torch.ones(129, 4))}], basis)
try:
    k.correct(table, basis, k.Penalties())
except ValueError as error:
    print(error)
"""
    assert "rank 129" in interpreted("-c", code)


def test_nothing_is_allocated_or_read_back_with_out_and_workspace():
    """No operator of PyTorch runs at all: the three launches are everything."""
    code = """
import csulora_kernels as k, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        seen.append(str(function))
        return function(*arguments, **(keywords or {}))

basis = k.pack_basis({"m": (torch.eye(64)[:, :2], torch.eye(48)[:, :2])})
table = k.pack([{"m": (torch.ones(64, 2), torch.ones(2, 48))}], basis)
for rank, factor in (("exact", 2), ("same", 1)):
    penalties = k.Penalties(rank=rank)
    out, ws = k.empty_like(table, factor), k.workspace(table, basis, penalties)
    k.correct(table, basis, penalties, out=out, workspace=ws)
    seen = []
    import triton.runtime.interpreter as interpreter
    launch = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = lambda self, *a, **kw: seen.append("launch")
    with Seen():
        k.correct(table, basis, penalties, out=out, workspace=ws)
    interpreter.GridExecutor.__call__ = launch
    print(rank, sorted(set(seen)), len(seen))
"""
    lines = interpreted("-c", code).splitlines()
    for line in lines:
        rest = line.partition(" ")[2]
        views = "['aten.select.int', 'launch']"  # slot 0 of the partial sums
        assert rest.startswith(views), line
