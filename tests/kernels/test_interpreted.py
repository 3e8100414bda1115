"""The kernels under the interpreter, stage by stage against float64.

Each case runs in its own type; all cases in every type, as on a GPU, by -m exhaustive.
"""

from dataclasses import replace

import cases
import pytest
import shifted
import torch

import csulora_kernels as kernels

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # NaN and overflow are part of some cases.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def in_every_type(own, slow=()):
    """(name, type) of each case, given the types that they have of themselves."""
    found = []
    for name, dtype in own.items():
        for other in cases.TYPES:
            usual = other == dtype and name not in slow
            found.append(pytest.param(name, other, marks=() if usual else pytest.mark.exhaustive))
    return found


OWN = {name: case.dtype for name, case in (cases.CASES | cases.SLOW).items()}
SHIFTED = {name: one.case.dtype for name, one in shifted.CASES.items()}


@pytest.mark.parametrize(("name", "dtype"), in_every_type(OWN, cases.SLOW), ids=str)
def test_every_stage_is_as_exact_as_promised(name, dtype):
    cases.check(replace((cases.CASES | cases.SLOW)[name], dtype=dtype))


@pytest.mark.parametrize(("name", "dtype"), in_every_type(SHIFTED), ids=str)
def test_every_stage_of_realignment_is_as_exact(name, dtype):
    one = shifted.CASES[name]
    shifted.check(replace(one, case=replace(one.case, dtype=dtype)))


@pytest.mark.parametrize("form", kernels.FORMS)
def test_every_granularity_has_a_case(form):
    found = {case.granularity for case in cases.CASES.values() if case.form == form}
    assert found == set(kernels.GRANULARITIES)


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


@pytest.mark.parametrize("form", kernels.FORMS)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_not_finite_stays_in_its_adapter_and_module(form, factor):
    """Also with no direction, where nothing but the factor itself has it; adapters share programs."""
    ranks = (8, 8, 3, 8, 1, 5)  # more than one strip of adapters that share a product
    case = cases.Case(((40, 36, 7), (33, 50, 0)), ranks, cases.B16, form=form)
    made = cases.problem(case, "cpu")
    basis = kernels.pack_basis(made.bases, "cpu")
    clean, spoilt = (kernels.pack(made.adapters, basis) for _ in range(2))
    spoilt.B(1, 0)[1, 1] = spoilt.A(1, 0)[1, 1] = 1e30  # whose squares overflow
    getattr(spoilt, factor)(1, 1)[0, 0] = float("nan")
    wanted, found = (
        kernels.correct(table, basis, case.correction).table for table in (clean, spoilt)
    )
    for i in set(range(len(ranks))) - {1}:
        for m in (0, 1):
            assert torch.equal(found.A(i, m), wanted.A(i, m))
            assert torch.equal(found.B(i, m), wanted.B(i, m))
    assert bool(getattr(found, factor)(1, 1).isnan().any())


def test_without_the_lessons_of_the_fixture_products_are_the_same(monkeypatch):
    """Outside of these tests the interpreter multiplies no bfloat16: kernels upcast what they split."""
    case = cases.Case(((40, 36, 7), (33, 50, 1)), (8, 3), cases.B16)
    made = cases.problem(case, "cpu")
    basis = kernels.pack_basis(made.bases, "cpu")
    table = kernels.pack(made.adapters, basis)
    first = kernels.correct(table, basis, case.correction).table
    monkeypatch.setattr("csulora_kernels.api.interpreted", lambda kernel: True)
    second = kernels.correct(table, basis, case.correction).table
    for X, Y in zip(cases.table_views(first), cases.table_views(second), strict=True):
        assert torch.equal(X, Y)
