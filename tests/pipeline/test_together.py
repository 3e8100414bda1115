"""Small adapters are solved together; no result depends on which came together."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import adapter_of, subspace_of

from csulora import (
    Correction,
    CsuloraError,
    Realignment,
    correct,
)
from csulora.correction import correct_batch
from csulora.pipeline import by_torch

# The last two are no whole numbers of cache lines.
SHAPES = {
    "a": (64, 32, 16),
    "b": (32, 64, 16),
    "c": (64, 32, 16),
    "d": (25, 31, 7),
    "e": (18, 32, 5),
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = (
    Correction(),
    Correction(form="same"),
    Correction(1, 2, 3, math.inf, granularity="component"),
    Correction(strength_for={"a": 3.0}),
    Realignment(edge=False),
    Realignment(edge=False, form="exact"),
)


SUBSPACE = subspace_of(SHAPES)
_adapter = partial(adapter_of, SHAPES)


ADAPTERS = st.builds(
    _adapter,
    st.integers(0, 99),
    st.sampled_from(["abcde", "a", "edcba", "ad"]),
    st.sampled_from([1, 4, 7, 8, 16]),
    st.sampled_from(TYPES),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ADAPTERS, min_size=2, max_size=6), st.sampled_from(METHODS))
# Of module e, r x k is a whole number of cache lines and k x k is not.
@example([_adapter(seed, "abcde", 16, torch.float32) for seed in (0, 52)], METHODS[-1])
def test_alone_or_together_is_the_same_to_the_last_bit(adapters, method):
    together = correct_batch(adapters, SUBSPACE, method)
    for adapter, found in zip(adapters, together, strict=True):
        alone, report = correct(adapter, SUBSPACE, method)
        assert found[1].to_dict() == report.to_dict()
        assert found[0].config == alone.config
        for name, X in alone.tensors().items():
            assert torch.equal(X, found[0].tensors()[name]), name


def test_one_that_cannot_be_solved_leaves_the_others_as_they_are():
    good, bad, other = (_adapter(i, "ab", 8, torch.float32) for i in range(3))
    bad.modules["b"].B.fill_(1e30)
    found = correct_batch([good, bad, other], SUBSPACE)
    with pytest.raises(CsuloraError) as alone:
        correct(bad, SUBSPACE)
    assert str(found[1]) == str(alone.value)
    for adapter, one in ((good, found[0]), (other, found[2])):
        assert torch.equal(one[0].modules["a"].B, correct(adapter, SUBSPACE)[0].modules["a"].B)


@pytest.mark.parametrize("small", [True, False])
def test_small_ones_are_solved_in_one_call_and_large_ones_one_by_one(monkeypatch, small):
    adapters = [_adapter(i, "abc", 8, torch.float32) for i in range(3)]
    solved = []
    solve = by_torch.solve_with_amplification

    def counted(projection, correction):
        solved.append(projection.P.shape[0])
        return solve(projection, correction)

    monkeypatch.setattr(by_torch, "solve_with_amplification", counted)
    if not small:
        monkeypatch.setattr(by_torch, "TOGETHER", 1)
    expected = [correct(adapter, SUBSPACE)[0].modules["a"].A for adapter in adapters]
    solved.clear()
    found = correct_batch(adapters, SUBSPACE)
    assert solved == ([9] if small else [3, 3, 3])
    for X, (adapter, _) in zip(expected, found, strict=True):
        assert torch.allclose(X, adapter.modules["a"].A, rtol=1e-5, atol=1e-6)
