"""The cases of the interpreter tests on a real GPU, in every type, and what only a GPU can show.

pytest -m gpu tests/kernels/test_gpu.py
compute-sanitizer --tool memcheck python -m pytest -m gpu tests/kernels/test_gpu.py
"""

import os
from dataclasses import replace

import cases
import pytest
import shifted
import test_company
import torch
from cases import CASES, SLOW
from problems import subspace_of

import csulora_kernels as kernels
from csulora import Realignment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device, and Triton without its interpreter",
    ),
]
LARGE = {  # real sizes, for what small ones cannot show: several waves of programs, and their order
    "layer": cases.Case(
        ((4096, 4096, 64), (1024, 4096, 64), (4096, 14336, 64)), (16, 8, 16, 64, 16), processors=132
    ),
    "same, layer": cases.Case(
        ((4096, 4096, 64), (1024, 4096, 64)), (16, 16, 16), form="same", processors=132
    ),
}


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *SLOW, *LARGE])
def test_every_stage_is_as_exact_on_the_gpu(name, dtype):
    case = replace((CASES | SLOW | LARGE)[name], dtype=dtype, again=True)
    cases.check(case, "cuda")


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize("name", shifted.CASES)
def test_every_stage_of_realignment_is_as_exact_on_the_gpu(name, dtype):
    one = shifted.CASES[name]
    shifted.check(replace(one, case=replace(one.case, dtype=dtype)), "cuda")


@pytest.mark.parametrize("form", kernels.FORMS)
def test_realignment_at_real_sizes(form):
    case = cases.Case(((4096, 4096, 64), (1024, 4096, 64)), (16, 8, 16, 16, 16), torch.bfloat16)
    shifted.check(shifted.Shifted(replace(case, processors=132), Realignment(form=form)), "cuda")


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize("method", ["EXACT", "SAME", "OWN", "SHIFT", "SHIFT_EXACT"])
def test_alone_or_in_company_is_the_same_on_the_gpu(method, dtype):
    subspace, settings = subspace_of(test_company.SHAPES), getattr(test_company, method)
    known = test_company.company(dtype)
    together = test_company.corrected(known, subspace, settings, "cuda")
    for name, one in known.items():
        alone = test_company.corrected({name: one}, subspace, settings, "cuda")
        test_company.check_bits(together[name], alone[name])


def batch(form="exact"):
    made = cases.problem(cases.Case(((512, 384, 16), (256, 512, 16)), (8, 16)), "cuda")
    basis = kernels.pack_basis(made.bases, "cuda")
    table = kernels.pack(made.adapters, basis, "cuda")
    penalties = kernels.Penalties(form=form)
    return table, basis, penalties


@pytest.mark.parametrize("form", kernels.FORMS)
def test_a_graph_replays_new_data_without_allocating(form):
    table, basis, penalties = batch(form)
    out, ws = kernels.empty_like(table, penalties), kernels.workspace(table, basis, penalties)
    kernels.correct(table, basis, penalties, out=out, workspace=ws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.correct(table, basis, penalties, out=out, workspace=ws)
    table.data.mul_(2)
    wanted = kernels.correct(table, basis, penalties).table
    graph.replay()
    for i in range(2):
        for m in range(2):
            assert torch.equal(out.B(i, m), wanted.B(i, m))
            assert torch.equal(out.A(i, m), wanted.A(i, m))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kernels.correct(table, basis, penalties, out=out, workspace=ws)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_nothing_waits_for_the_device():
    table, basis, penalties = batch()
    out, ws = kernels.empty_like(table, penalties), kernels.workspace(table, basis, penalties)
    kernels.correct(table, basis, penalties, out=out, workspace=ws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.correct(table, basis, penalties, out=out, workspace=ws)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_with_a_difference_is_exact(dtype, transposed):
    base, aligned = (torch.randn(1000, 4096, device="cuda").to(dtype) for _ in range(2))
    D = aligned.double() - base.double()
    D = D.mT if transposed else D
    X = torch.randn(D.shape[1], 80, device="cuda")
    Y = kernels.displacement_product(base, aligned, X, transposed=transposed)
    wanted = D @ X.double()
    assert float((Y.double() - wanted).norm() / wanted.norm()) <= 1e-6
    assert torch.equal(Y, kernels.displacement_product(base, aligned, X, transposed=transposed))
