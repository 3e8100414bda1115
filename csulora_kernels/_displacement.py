"""The product of a difference of two weights with a thin matrix; the difference exists in registers only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def displacement_kernel(
    p_base,  # (rows, n) row-major
    p_aligned,  # the same
    p_x,  # (n, c) float32, or (rows, c) if TRANSPOSED
    p_y,  # (splits, rows, c) float32, or (splits, n, c)
    rows,
    n,
    c,
    split_length,
    BLOCK_I: tl.constexpr,  # of the result's rows
    BLOCK_L: tl.constexpr,  # of what the product sums over
    BLOCK_C: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """y = D x or D^T x with D = aligned - base in float32, over one stretch of the sum."""
    # Hints on arguments are lost; products say the same.
    n = n // VEC_N * VEC_N
    c = c // VEC_C * VEC_C
    n_i = n if TRANSPOSED else rows
    n_l = rows if TRANSPOSED else n
    b_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    b_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = tl.max_constancy(b_c < c, VEC_C)
    l_from = tl.program_id(2) * (split_length // BLOCK_L * BLOCK_L)
    l_to = tl.minimum(l_from + split_length, n_l)
    b_y = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for l in range(l_from, l_to, BLOCK_L):
        b_l = l + tl.arange(0, BLOCK_L)
        if TRANSPOSED:
            o_w = b_l[:, None].to(tl.int64) * n + b_i[None, :]
            m_w = (b_l < l_to)[:, None] & tl.max_constancy(b_i < n_i, VEC_N)[None, :]
        else:
            o_w = b_i[:, None].to(tl.int64) * n + b_l[None, :]
            m_w = (b_i < n_i)[:, None] & tl.max_constancy(b_l < l_to, VEC_N)[None, :]
        b_d = tl.load(p_aligned + o_w, mask=m_w, other=0.0).to(tl.float32)
        b_d -= tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32)
        if TRANSPOSED:
            b_d = tl.trans(b_d)
        o_x = b_l[:, None].to(tl.int64) * c + b_c[None, :]
        b_x = tl.load(p_x + o_x, mask=(b_l < l_to)[:, None] & m_c[None, :], other=0.0)
        b_y += tl.dot(b_d, b_x, input_precision="tf32x3", max_num_imprecise_acc=16)
    o_y = (tl.program_id(2).to(tl.int64) * n_i + b_i)[:, None] * c + b_c[None, :]
    tl.store(p_y + o_y, b_y, mask=(b_i < n_i)[:, None] & m_c[None, :])
