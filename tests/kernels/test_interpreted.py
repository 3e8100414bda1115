"""The kernels under the interpreter, stage by stage against float64."""

import cases
import pytest
import torch

import csulora_kernels as kernels

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # NaN and overflow are part of some cases.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_stage_is_as_exact_as_promised(name):
    cases.check(cases.CASES[name])


@pytest.mark.parametrize("form", kernels.FORMS)
def test_every_granularity_has_a_case(form):
    found = {case.granularity for case in cases.CASES.values() if case.form == form}
    assert found == set(kernels.GRANULARITIES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", cases.SLOW)
def test_large_ranks_are_as_exact(name):
    cases.check(cases.SLOW[name])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (70, 45, 7)),
        (torch.float16, (33, 130, 20)),
        (torch.float32, (64, 32, 65)),
    ],
    ids=str,
)
def test_the_product_with_a_difference_is_exact(dtype, shape, transposed):
    m, n, columns = shape
    generator = torch.Generator().manual_seed(0)
    base, aligned = (torch.randn(m, n, generator=generator).to(dtype) for _ in range(2))
    X = torch.randn(m if transposed else n, columns, generator=generator)
    Y = kernels.displacement_product(base, aligned, X, transposed=transposed)
    D = aligned.double() - base.double()
    wanted = (D.mT if transposed else D) @ X.double()
    assert Y.shape == wanted.shape
    assert float((Y.double() - wanted).norm() / wanted.norm()) <= 1e-6
    assert torch.equal(Y, kernels.displacement_product(base, aligned, X, transposed=transposed))
