"""The Triton kernels under the interpreter against the dense oracle and the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, torch
import csulora_kernels, oracle
from csulora import reference
from csulora.settings import Correction

rank, granularity = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
# ragged sides, no directions at all, and (where it is quick) two adapters of different rank
shapes = {"a": (40, 36, 7)} if rank == "same" else {"a": (70, 45, 7), "b": (20, 24, 0)}
bases = {
    n: tuple(torch.linalg.qr(torch.randn(d, k))[0] if k else torch.zeros(d, 0) for d in (o, i))
    for n, (o, i, k) in shapes.items()
}
ranks = (3,) if rank == "same" else (3, 8)
adapters = [
    {n: (torch.randn(o, r), torch.randn(r, i)) for n, (o, i, _) in shapes.items()} for r in ranks
]
basis = csulora_kernels.pack_basis(bases)
table = csulora_kernels.pack(adapters, basis)
strengths = (0, 10, 5, 100)
penalties = csulora_kernels.Penalties(*strengths, granularity=granularity, rank=rank)
result = csulora_kernels.correct(table, basis, penalties)
for i, adapter in enumerate(adapters):
    for m, (name, (B, A)) in enumerate(adapter.items()):
        U, V = bases[name]
        if rank == "exact":
            wanted = oracle.correct(B.double() @ A.double(), U, V, strengths, granularity)
        else:
            projection = reference.project(B, A, U, V)
            cores = reference.solve(projection, Correction(*strengths, granularity, rank))
            left, right = reference.recompose(B, A, U, V, projection, cores)
            wanted = left.double() @ right.double()
        found = result.table.B(i, m).double() @ result.table.A(i, m).double()
        error = float((found - wanted).norm() / wanted.norm())
        print(name, i, error)
        assert error <= 1e-5, (name, i, error)
"""


@pytest.mark.parametrize(
    ("rank", "granularity"), [("exact", "direction"), ("exact", "component"), ("same", "direction")]
)
def test_the_chain_of_kernels_equals_the_oracle(rank, granularity):
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, rank, granularity],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") >= 1


def test_importing_the_kernels_imports_no_triton():
    code = "import sys, csulora_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
