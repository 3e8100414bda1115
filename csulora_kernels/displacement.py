"""(W_aligned - W_base) times a thin matrix, as estimating a subspace needs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csulora_kernels.buffers import hardware, unavailable
from csulora_kernels.launch import Launcher
from csulora_kernels.layout import ALIGNMENT, DTYPES

BLOCK_I, BLOCK_L = 64, 32


def displacement_product(
    base: Tensor, aligned: Tensor, X: Tensor, *, transposed: bool = False
) -> Tensor:
    """D X, or D^T X if transposed, for D = aligned - base in float32, which is never stored.

    base, aligned: (m, n) contiguous, of one type (float32, bfloat16 or float16); X: (n, c), or (m, c)
    if transposed, float32. Returns (m, c) or (n, c) in float32, as accurate as float32 products are;
    the same input gives the same bits. Raises ValueError for other shapes and types and RuntimeError
    where the kernels cannot run.
    """
    _check(base, aligned, X, transposed)
    from csulora_kernels._displacement import displacement_kernel

    rows, n = base.shape
    X = X.contiguous()
    c = X.shape[1]
    n_i, n_l = (n, rows) if transposed else (rows, n)
    block_c = columns(c)
    grid = (-(-n_i // BLOCK_I), -(-c // block_c))
    length = split_length(n_l, grid[0] * grid[1], hardware(base.device)[1])
    splits = max(1, -(-n_l // length))
    partial = X.new_empty(splits, n_i, c)
    if partial.numel() == 0:
        return partial[0]
    constants = {
        "BLOCK_I": BLOCK_I,
        "BLOCK_L": BLOCK_L,
        "BLOCK_C": block_c,
        "VEC_N": math.gcd(n, ALIGNMENT // base.element_size()),
        "VEC_C": math.gcd(c, ALIGNMENT // 4),
        "TRANSPOSED": transposed,
    }
    launch = Launcher(displacement_kernel, (*grid, splits), constants, warps=4, stages=1)
    launch(base, aligned, X, partial, rows, n, c, length)
    # In float64 and in a fixed order.
    return partial[0] if splits == 1 else partial.double().sum(0).float()


def columns(c: int) -> int:
    """Columns of X at a time: the fewest padded ones, and of those the widest tile."""
    return min((64, 32, 16), key=lambda width: -(-c // width) * width)


def split_length(n_l: int, tiles: int, processors: int) -> int:
    """Length of the stretches that a sum over n_l is cut into, where the tiles leave the chip idle."""
    length = max(BLOCK_L, 1 << (n_l - 1).bit_length()) if n_l > 0 else BLOCK_L
    while length > 1024 and tiles * -(-n_l // length) < 4 * processors:
        length //= 2
    return length


def _check(base: Tensor, aligned: Tensor, X: Tensor, transposed: bool) -> None:
    if base.ndim != 2 or base.shape != aligned.shape or base.dtype != aligned.dtype:
        raise ValueError(
            f"base and aligned must be alike, not {base.dtype} {tuple(base.shape)} and "
            f"{aligned.dtype} {tuple(aligned.shape)}"
        )
    if base.dtype not in DTYPES or X.dtype != torch.float32:
        raise ValueError(f"weights must be one of {DTYPES} and X float32, not {X.dtype}")
    if X.ndim != 2 or X.shape[0] != base.shape[0 if transposed else 1]:
        raise ValueError(f"X is {tuple(X.shape)}, which does not fit {tuple(base.shape)}")
    for W in (base, aligned):
        if not W.is_contiguous() or W.data_ptr() % ALIGNMENT:
            raise ValueError("weights must be contiguous and begin at a multiple of 16 bytes")
    reason = unavailable(base.device)
    if reason is not None:
        raise RuntimeError(reason)
