"""Memory for the corrected factors of an adapter: one buffer, filled module by module."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.safetensors import is_finite
from csulora.pipeline.plan import Plan

HUGE_PAGE = 1 << 21


class _Wanted(NamedTuple):
    """One factor's place in the buffer, in bytes."""

    start: int
    end: int
    shape: tuple[int, int]
    dtype: torch.dtype


def allocate(plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Uninitialised memory for B and A of every member's result, on the CPU, as views of one buffer.

    One large buffer from NumPy, which asks the kernel to back it with huge pages: the first writes to
    small ones would cost as much time as the arithmetic. A lies before B and modules follow each
    other as they do in a safetensors file.
    """
    wanted: list[_Wanted] = []
    end = 0
    portable_rank = plan.portable_rank
    for member in plan.members:
        rank = portable_rank or member.rank
        B, A = member.module.B, member.module.A
        B_dtype, A_dtype = plan.dtypes(member)
        for shape, dtype in (((rank, A.shape[1]), A_dtype), ((B.shape[0], rank), B_dtype)):
            start = -(-end // dtype.itemsize) * dtype.itemsize
            end = start + math.prod(shape) * dtype.itemsize
            wanted.append(_Wanted(start, end, shape, dtype))
    memory = np.empty(end, dtype=np.uint8)
    memory[::HUGE_PAGE] = (
        0  # by one thread: several at once would wait for each other in the kernel
    )
    buffer = torch.from_numpy(memory)
    views = [buffer[w.start : w.end].view(w.dtype).view(w.shape) for w in wanted]
    return list(zip(views[1::2], views[::2], strict=True))


def store(
    name: str, B: Tensor, A: Tensor, into: tuple[Tensor, Tensor], *, scaled: str = ""
) -> None:
    """Copy factors into the memory and type kept for them, unless they are there already.

    scaled: the sides that have been multiplied by a number from outside, which may be of any size.
    Without that only float16 reaches less far than the computation did.

    Raises CsuloraError if a value does not fit the type.
    """
    for side, X, target in (("B", B, into[0]), ("A", A, into[1])):
        if X is not target:
            target.copy_(X)
        check = side in scaled or target.dtype == torch.float16
        if check and not is_finite(target):
            remedy = "; choose dtype bfloat16 or float32" * (target.dtype == torch.float16)
            raise CsuloraError(
                f"{name}: the corrected lora_{side} does not fit {target.dtype}{remedy}"
            )


def fits_float16(X: Tensor) -> bool:
    """Whether float16 holds every row of X (r, d) about as well as larger types of its precision do."""
    largest = X.abs().amax(1)
    # From here on what the smallest entries of a row lose is below the rounding of the others.
    return bool(((largest == 0) | ((largest >= 2.0**-10) & (largest < 65504))).all())


def balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Even out the magnitudes of B (d_out, r) and A (r, d_in) column by column, by powers of two.

    float16 has few exponents: parts of a small B fall among its subnormal numbers and lose digits.
    Powers of two leave the product, and every digit of the result, as they are.
    """
    left, right = B.abs().amax(0), A.abs().amax(1)
    usable = (left > 0) & (right > 0)
    shift = torch.where(usable, (0.5 * (right / left).log2()).round(), torch.zeros_like(left))
    return B * torch.exp2(shift), A * torch.exp2(-shift)[:, None]
