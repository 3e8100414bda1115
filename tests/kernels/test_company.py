"""What Triton corrects together is a matter of timing: no bit of a result depends on it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from problems import adapter_of, subspace_of

from csulora import (
    Correction,
    CsuloraError,
    Realignment,
    correct_batch,
)
from csulora.pipeline import by_triton
from csulora_kernels import api

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # NaN is part of one adapter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
F32, B16 = torch.float32, torch.bfloat16
# Tiles chosen for speed cut a side of "long"; "deep" has a K of its own; "odd" allows no vectors.
SHAPES = {"a": (48, 64, 16), "long": (544, 24, 8), "deep": (80, 72, 72), "odd": (33, 35, 5)}
EXACT, SAME = Correction(), Correction(form="same")
OWN = Correction(1, 2, 3, math.inf, strength_for={"a": 3.0})
SHIFT, SHIFT_EXACT = Realignment(edge=False), Realignment(edge=False, form="exact")


@pytest.fixture(scope="module")
def subspace():
    return subspace_of(SHAPES)


lora = partial(adapter_of, SHAPES)


def company(dtype):
    """Adapters that share launches but for the last four, each of which has its own."""
    broken = lora(8, ["long", "a"], 8, dtype)  # an error that names the first of the two
    for module in broken.modules.values():
        module.A[0, 0] = math.nan
    return {
        "one": lora(0, ["a"], 8, dtype),
        "other rank": lora(1, ["a"], 16, dtype),
        "two": lora(2, ["a", "long"], 8, dtype),
        "other order": lora(3, ["long", "a"], 8, dtype),
        "broken": broken,
        "other vectors": lora(4, ["odd"], 5, dtype),
        "other R": lora(5, ["a"], 24, dtype),
        "other K": lora(6, ["deep"], 8, dtype),
        "other type": lora(7, ["a"], 8, F32 if dtype == B16 else B16),
    }


@pytest.fixture
def seen(monkeypatch):
    """What runs: kernels with all that they are compiled for, and sizes of PyTorch's batched products."""
    found = set()

    class Recorded(api.Launcher):
        def __init__(self, kernel, grid, constants, **options):
            name = kernel.fn.__name__
            found.add((name, frozenset(constants.items()), frozenset(options.items())))
            super().__init__(kernel, grid, constants, **options)

    def recorded(name):
        function = getattr(by_triton, name)

        def record(first, *others):
            found.add((name, tuple(tuple(X.shape) for X in first)))
            return function(first, *others)

        return record

    monkeypatch.setattr(api, "Launcher", Recorded)
    for name in ("amplification", "shift_amplification"):
        monkeypatch.setattr(by_triton, name, recorded(name))
    return found


def corrected(adapters, subspace, method, device="cpu"):
    known = list(adapters.values())
    found = correct_batch(known, subspace, method, backend="triton", device=device)
    return dict(zip(adapters, found, strict=True))


def check_bits(found, wanted):
    if isinstance(wanted, CsuloraError):
        assert str(found) == str(wanted)
        return
    assert found[1].to_dict() == wanted[1].to_dict()
    assert found[0].config == wanted[0].config
    for name, X in wanted[0].tensors().items():
        Y = found[0].tensors()[name]
        assert X.dtype == Y.dtype and torch.equal(X.view(torch.uint8), Y.view(torch.uint8)), name


@pytest.mark.parametrize(
    "method, dtype, size",
    [
        (EXACT, B16, 9),
        (EXACT, F32, 5),
        (SAME, B16, 2),
        (SAME, F32, 2),
        (OWN, B16, 5),
        (SHIFT, B16, 5),
        (SHIFT, F32, 5),
        (SHIFT_EXACT, B16, 9),
        (SHIFT_EXACT, F32, 5),
    ],
)
def test_alone_or_in_company_is_the_same_to_the_last_bit(subspace, seen, method, dtype, size):
    """Factors and reports; and what runs for them, where another device might show what this does not."""
    known = dict(list(company(dtype).items())[:size])
    alone = {}
    for name in known.keys() - {"other order"}:  # which is there to be beside "two"
        alone |= corrected({name: known[name]}, subspace, method)
    one_by_one = set(seen)
    assert {"project_kernel", "recompose_kernel"} <= {name for name, *_ in seen}
    seen.clear()
    together = corrected(known, subspace, method)
    assert seen == one_by_one
    for name, wanted in alone.items():
        check_bits(together[name], wanted)
