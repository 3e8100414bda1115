"""Strengths that leave nothing of a block, finite or not: the result is the limit, for any factors."""

import math

import oracle
import pytest
import torch
from builders import orthonormal
from problems import corrected, update

from csulora import Correction
from csulora_kernels.settings import REMOVES

INF = math.inf
ENORMOUS = [REMOVES, 1e17, 1e20, 1e30, 1e100, 1e300, INF]


def problem(d_out, d_in, r, k, *, deficient=False, whole=False):
    """B, A, U, V; whole: factors of small integers, whose systems are singular to the last bit."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    B, A = randn(d_out, r), randn(r, d_in)
    if deficient:
        B[:, r // 2 :] = B[:, : r - r // 2]
    U, V = (torch.eye(d)[:, :k] if whole else orthonormal(d, k, d).float() for d in (d_out, d_in))
    return B, A, U, V


@pytest.mark.parametrize("granularity", ["direction", "component"])
@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(12, 16, 8, 3), (9, 5, 4, 2), (6, 6, 6, 6)], ids=str)
def test_exact_is_the_limit(shape, whole, deficient, granularity):
    B, A, U, V = problem(*shape, deficient=deficient, whole=whole)
    dW = B.double() @ A.double()
    for strength in ENORMOUS:
        for sides in ((0, 1, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0)):
            strengths = [strength if removed else 1.0 for removed in sides]
            module, report = corrected(B, A, U, V, Correction(*strengths, granularity=granularity))
            limit = oracle.correct(
                dW, U, V, [INF if removed else 1.0 for removed in sides], granularity
            )
            assert float((update(module) - limit).norm()) <= 1e-6 * float(dW.norm()), (
                strength,
                sides,
            )
            for removed, after in zip(sides, report.relative_energy_after.values(), strict=True):
                assert not removed or after == 0


@pytest.mark.parametrize("strength", [1e6, 1e7, 1e8, 1e10, 1e12, *ENORMOUS])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(12, 16, 4, 3), (12, 16, 8, 3), (40, 30, 6, 5)], ids=str)
def test_same_has_the_one_block_that_is_left(shape, whole, kept, strength):
    """It has rank r at most: no more is lost than the others have left, whichever block is pinned."""
    B, A, U, V = problem(*shape, whole=whole)
    strengths = [strength] * 4
    strengths[kept] = 1.0
    module, report = corrected(B, A, U, V, Correction(*strengths, form="same"))
    dW = B.double() @ A.double()
    wanted = oracle.correct(dW, U, V, strengths, "direction")
    error = float((update(module) - wanted).norm() / wanted.norm())
    left = (
        3 * shape[2] ** 0.5 * float(dW.norm() / wanted.norm()) / (2 * min(strength, REMOVES) ** 0.5)
    )
    assert error <= 1e-6 + left
    assert abs(error - report.rank_error) <= 1e-4


@pytest.mark.parametrize("k", [6, 30])  # beside input directions of every kind, or of all of them
def test_same_has_the_largest_block_where_none_can_be_pinned(k):
    B, A, U, V = problem(40, 30, 4, k)
    for strengths in ((INF, 1, 1, INF), (1e7, 0, 3, 1e9), (INF, 3, 0, INF), (1e7, INF, INF, 1e9)):
        module, report = corrected(B, A, U, V, Correction(*strengths, form="same"))
        parts = oracle.blocks(
            oracle.correct(B.double() @ A.double(), U, V, strengths, "direction"), U, V
        )
        largest = max(parts, key=torch.linalg.norm)
        assert float((update(module) - largest).norm()) <= 1e-6 * float(largest.norm())
        missed = float((sum(parts) - largest).norm() / sum(parts).norm())
        # Energies of blocks that are empty are differences of float32 squares.
        assert abs(report.rank_error - missed) <= (1e-6 if k < 30 else 5e-4)


def test_from_there_on_a_strength_leaves_less_than_float32_resolves():
    """Of a direction s, s / (1 + lambda s^2 / E), which is largest at s^2 = E / lambda."""
    for dtype, units in ((torch.float32, 2), (torch.bfloat16, 1)):
        assert 1 / (2 * math.sqrt(REMOVES)) <= units * torch.finfo(dtype).eps
