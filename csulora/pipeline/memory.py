"""Memory for the corrected factors of an adapter: one buffer, filled module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csulora.errors import CsuloraError
from csulora.files.safetensors import is_finite

HUGE_PAGE = 1 << 21


class Layout(NamedTuple):
    """Shapes and types of one module's two factors."""

    B: tuple[int, int]  # (d_out, r)
    A: tuple[int, int]  # (r, d_in)
    B_dtype: torch.dtype
    A_dtype: torch.dtype


def allocate(layouts: Mapping[str, Layout]) -> dict[str, tuple[Tensor, Tensor]]:
    """Uninitialised B and A of every module, on the CPU, as views of one buffer.

    One large buffer from NumPy, which asks the kernel to back it with huge pages: the first writes to
    small ones would cost as much time as the arithmetic. A lies before B and modules follow each
    other as they do in a safetensors file.
    """
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, layout in layouts.items():
        starts = []
        for shape, dtype in ((layout.A, layout.A_dtype), (layout.B, layout.B_dtype)):
            start = -(-end // dtype.itemsize) * dtype.itemsize
            end = start + math.prod(shape) * dtype.itemsize
            starts.append(start)
        spans[name] = (starts[1], starts[0])
    memory = np.empty(end, dtype=np.uint8)
    memory[::HUGE_PAGE] = (
        0  # by one thread: several at once would wait for each other in the kernel
    )
    buffer = torch.from_numpy(memory)
    return {
        name: (
            _view(buffer, start_B, layouts[name].B, layouts[name].B_dtype),
            _view(buffer, start_A, layouts[name].A, layouts[name].A_dtype),
        )
        for name, (start_B, start_A) in spans.items()
    }


def store(
    name: str, B: Tensor, A: Tensor, into: tuple[Tensor, Tensor], *, scaled: bool = False
) -> None:
    """Copy factors into the memory and type kept for them, unless they are there already.

    scaled: they have been multiplied by a number from outside, which may be of any size. Without that
    only float16 reaches less far than the computation did.

    Raises CsuloraError if a value does not fit the type.
    """
    for side, X, target in (("B", B, into[0]), ("A", A, into[1])):
        if X is not target:
            target.copy_(X)
        check = scaled or target.dtype == torch.float16
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


def _view(buffer: Tensor, start: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(shape)
