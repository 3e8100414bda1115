"""Third stage: the corrected factors of all modules and adapters, written in one launch.

With the coefficients that `solve` prepares (W, Z) every case is a product with the basis plus a product
with the factor itself:

    exact    B' = [B_in, B - B_in],  B_in = U P        A'^T = V Z + A^T Y_out^T, in halves of r rows
    same     B' = U W + B X_out                        A'^T = V Z + A^T Y_out^T

A program takes BLOCK_D rows of U (or V), reads them once, and applies them to adapter after adapter:
each factor tile is read once and each output tile written once. With more than BLOCK_K directions the
basis tile does not fit beside the rest and comes again, from the caches, for each adapter.

Both operands of a product are float32. PRECISION says in how many tensor-core products: tf32x3 for
float32 results (2^-21), bf16x3 for 16-bit ones (2^-16, half the work).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def recompose_kernel(
    p_data,  # flat factors
    p_out,  # flat, the same type
    p_basis,  # flat float32
    p_entries,  # (N, M, 3) int64: r, o_B, o_A
    p_out_entries,  # the same of the output
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_work,  # (programs, 5) int32: side, module, d from, adapter from, adapter to
    p_left,  # (N, M, K, R) float32: P (exact) or W (same)
    p_X_out,  # (N, M, R, R) float32, not touched for `exact`
    p_Z,  # (N, M, K, H R) float32, H = 1 (same) or 2 (exact)
    p_Y_out,  # (N, M, H R, R) float32
    n_modules,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,  # columns of the result, and of the factor, at a time
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    p_item = p_work + tl.program_id(0) * 5
    side = tl.load(p_item)
    i_module = tl.load(p_item + 1)
    d_from = tl.multiple_of(tl.load(p_item + 2), BLOCK_D)
    i_from = tl.load(p_item + 3)
    i_to = tl.load(p_item + 4)
    length = tl.multiple_of(tl.load(p_modules + i_module * 5 + side), VEC_D)
    k = tl.load(p_modules + i_module * 5 + 2).to(tl.int32)
    o_basis = tl.multiple_of(tl.load(p_modules + i_module * 5 + 3 + side), 4)
    p_tile = p_basis + o_basis
    # fmt: off
    if side == 0:
        _recompose_B(
            p_data, p_out, p_tile, p_entries, p_out_entries, p_left, p_X_out,
            n_modules, i_module, i_from, i_to, d_from, length, k,
            K, R, T, BLOCK_K, BLOCK_D, VEC_R, VEC_D, SAME, PRECISION,
        )
    else:
        _recompose_A(
            p_data, p_out, p_tile, p_entries, p_out_entries, p_Z, p_Y_out,
            n_modules, i_module, i_from, i_to, d_from, length, k,
            K, R, T, BLOCK_K, BLOCK_D, VEC_D, SAME, PRECISION,
        )
    # fmt: on


@triton.jit
def _recompose_B(
    p_data,
    p_out,
    p_tile,
    p_entries,
    p_out_entries,
    p_left,
    p_X_out,
    n_modules,
    i_module,
    i_from,
    i_to,
    d_from,
    length,
    k,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_D rows of B' of adapters i_from to i_to."""
    H: tl.constexpr = 1 if SAME else 2
    b_d = d_from + tl.arange(0, BLOCK_D)
    m_d = (b_d < length)[:, None]
    b_row = b_d[:, None].to(tl.int64)
    b_t = tl.arange(0, T)
    b_u = _basis_tile(p_tile, d_from, 0, length, k, BLOCK_K, BLOCK_D, VEC_D)
    for i in range(i_from, i_to):
        i_entry = (i * n_modules + i_module).to(tl.int64)
        r = tl.multiple_of(tl.load(p_entries + i_entry * 3), VEC_R)
        o_B = tl.multiple_of(tl.load(p_entries + i_entry * 3 + 1), VEC_R)
        o_out = tl.multiple_of(tl.load(p_out_entries + i_entry * 3 + 1), VEC_R)
        p_B = p_data + (o_B + b_row * r)
        p_new = p_out + (o_out + b_row * (r * H))
        for j in range(0, R, T):
            b_j = j + b_t
            m_tile = m_d & tl.max_constancy(b_j < r, VEC_R)[None, :]
            b_new = _times_basis(
                p_tile, b_u, p_left + i_entry * K * R + j, d_from, length, k,
                R, K, T, BLOCK_K, BLOCK_D, VEC_D, PRECISION,
            )  # fmt: skip
            if SAME:
                for n in tl.range(0, R, T, num_stages=1):
                    b_n = n + b_t
                    m_n = m_d & tl.max_constancy(b_n < r, VEC_R)[None, :]
                    b_B = tl.load(p_B + b_n[None, :], mask=m_n, other=0.0).to(tl.float32)
                    b_X = tl.load(p_X_out + i_entry * R * R + b_n[:, None] * R + b_j[None, :])
                    b_new += tl.dot(b_B, b_X, input_precision=PRECISION)
            else:
                b_B = tl.load(p_B + b_j[None, :], mask=m_tile, other=0.0).to(tl.float32)
                b_rest = (b_B - b_new).to(p_out.dtype.element_ty)
                tl.store(p_new + (r + b_j[None, :]), b_rest, mask=m_tile)
            tl.store(p_new + b_j[None, :], b_new.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _recompose_A(
    p_data,
    p_out,
    p_tile,
    p_entries,
    p_out_entries,
    p_Z,
    p_Y_out,
    n_modules,
    i_module,
    i_from,
    i_to,
    d_from,
    length,
    k,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_D columns of A' of adapters i_from to i_to, computed as rows of A'^T."""
    H: tl.constexpr = 1 if SAME else 2
    b_d = d_from + tl.arange(0, BLOCK_D)
    m_d = tl.max_constancy(b_d < length, VEC_D)[None, :]
    b_t = tl.arange(0, T)
    b_v = _basis_tile(p_tile, d_from, 0, length, k, BLOCK_K, BLOCK_D, VEC_D)
    for i in range(i_from, i_to):
        i_entry = (i * n_modules + i_module).to(tl.int64)
        r = tl.load(p_entries + i_entry * 3)
        o_A = tl.multiple_of(tl.load(p_entries + i_entry * 3 + 2), VEC_D)
        o_out = tl.multiple_of(tl.load(p_out_entries + i_entry * 3 + 2), VEC_D)
        for row in range(0, H * R, T):  # of A', padded; its halves are rows 0 to R and R to 2 R
            half = row // R
            b_j = row % R + b_t
            b_new = _times_basis(
                p_tile, b_v, p_Z + i_entry * (K * H * R) + row, d_from, length, k,
                H * R, K, T, BLOCK_K, BLOCK_D, VEC_D, PRECISION,
            )  # fmt: skip
            for n in tl.range(0, R, T, num_stages=1):
                b_n = n + b_t
                o_n = b_n[:, None].to(tl.int64) * length + b_d[None, :]
                b_A = tl.load(p_data + (o_A + o_n), mask=(b_n < r)[:, None] & m_d, other=0.0)
                o_Y = i_entry * (H * R * R) + (row + b_t)[None, :] * R + b_n[:, None]
                b_Y = tl.load(p_Y_out + o_Y)
                b_new += tl.dot(tl.trans(b_A).to(tl.float32), b_Y, input_precision=PRECISION)
            o_new = (half * r + b_j)[:, None] * length + b_d[None, :]
            b_new = tl.trans(b_new).to(p_out.dtype.element_ty)
            tl.store(p_out + (o_out + o_new), b_new, mask=(b_j < r)[:, None] & m_d)


@triton.jit
def _basis_tile(
    p_tile,
    d_from,
    k_from,
    length,
    k,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """(BLOCK_D, BLOCK_K) of U or V, which lie transposed."""
    b_d = d_from + tl.arange(0, BLOCK_D)
    b_k = k_from + tl.arange(0, BLOCK_K)
    m_d = tl.max_constancy(b_d < length, VEC_D)
    b_w = tl.load(
        p_tile + (b_k[:, None].to(tl.int64) * length + b_d[None, :]),
        mask=(b_k < k)[:, None] & m_d[None, :],
        other=0.0,
    )
    return tl.trans(b_w)


@triton.jit
def _times_basis(
    p_tile,
    b_first,
    p_c,
    d_from,
    length,
    k,
    ROW: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_D, T): U or V times coefficients c (K, T) with rows ROW apart."""
    p_c += tl.arange(0, BLOCK_K)[:, None] * ROW + tl.arange(0, T)[None, :]
    if K == BLOCK_K:
        b_new = tl.dot(b_first, tl.load(p_c), input_precision=PRECISION)
    else:
        b_new = tl.zeros([BLOCK_D, T], tl.float32)
        # One stage: a transposed copy through shared memory would go four bytes at a time.
        for k_from in tl.range(0, K, BLOCK_K, num_stages=1):
            b_w = _basis_tile(p_tile, d_from, k_from, length, k, BLOCK_K, BLOCK_D, VEC_D)
            b_c = tl.load(p_c + k_from * ROW)
            b_new += tl.dot(b_w, b_c, input_precision=PRECISION)
    return b_new
