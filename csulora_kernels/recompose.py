"""Third stage: the corrected factors of all modules and adapters, written in one launch.

With the coefficients that `solve` prepares (W, Z) every case is a product with the basis plus a product
with the factor itself:

    exact    B' = [B_in, B - B_in],  B_in = U P        A'^T = V Z + A^T Y_out^T, in halves of r rows
    same     B' = U W + B X_out                        A'^T = V Z + A^T Y_out^T

A program takes BLOCK_D rows of U (or V), reads them once, and applies them to adapter after adapter:
each factor tile is read once and each output tile written once. With more than BLOCK_K directions the
basis tile does not fit beside the rest and comes again, from L2, for each adapter.

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
            K, R, BLOCK_K, BLOCK_D, VEC_R, VEC_D, SAME, PRECISION,
        )
    else:
        _recompose_A(
            p_data, p_out, p_tile, p_entries, p_out_entries, p_Z, p_Y_out,
            n_modules, i_module, i_from, i_to, d_from, length, k,
            K, R, BLOCK_K, BLOCK_D, VEC_D, SAME, PRECISION,
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
    b_j = tl.arange(0, R)
    b_u = _basis_tile(p_tile, d_from, 0, length, k, BLOCK_K, BLOCK_D, VEC_D)
    for i in range(i_from, i_to):
        i_entry = (i * n_modules + i_module).to(tl.int64)
        r = tl.multiple_of(tl.load(p_entries + i_entry * 3), VEC_R)
        o_B = tl.multiple_of(tl.load(p_entries + i_entry * 3 + 1), VEC_R)
        o_out = tl.multiple_of(tl.load(p_out_entries + i_entry * 3 + 1), VEC_R)
        m_tile = (b_d < length)[:, None] & tl.max_constancy(b_j < r, VEC_R)[None, :]
        b_B = tl.load(
            p_data + (o_B + b_d[:, None].to(tl.int64) * r + b_j[None, :]), mask=m_tile, other=0.0
        ).to(tl.float32)
        b_new = _times_basis(
            p_tile, b_u, p_left + i_entry * K * R, d_from, length, k,
            R, K, R, BLOCK_K, BLOCK_D, VEC_D, PRECISION,
        )  # fmt: skip
        o_new = o_out + b_d[:, None].to(tl.int64) * (r * H) + b_j[None, :]
        if SAME:
            b_X = tl.load(p_X_out + i_entry * R * R + b_j[:, None] * R + b_j[None, :])
            b_new += tl.dot(b_B, b_X, input_precision=PRECISION)
            tl.store(p_out + o_new, b_new.to(p_out.dtype.element_ty), mask=m_tile)
        else:
            tl.store(p_out + o_new, b_new.to(p_out.dtype.element_ty), mask=m_tile)
            b_rest = b_B - b_new
            tl.store(p_out + (o_new + r), b_rest.to(p_out.dtype.element_ty), mask=m_tile)


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
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_D columns of A' of adapters i_from to i_to, computed as rows of A'^T."""
    H: tl.constexpr = 1 if SAME else 2
    b_d = d_from + tl.arange(0, BLOCK_D)
    b_j = tl.arange(0, R)
    m_d = tl.max_constancy(b_d < length, VEC_D)
    b_v = _basis_tile(p_tile, d_from, 0, length, k, BLOCK_K, BLOCK_D, VEC_D)
    for i in range(i_from, i_to):
        i_entry = (i * n_modules + i_module).to(tl.int64)
        r = tl.load(p_entries + i_entry * 3)
        o_A = tl.multiple_of(tl.load(p_entries + i_entry * 3 + 2), VEC_D)
        o_out = tl.multiple_of(tl.load(p_out_entries + i_entry * 3 + 2), VEC_D)
        m_tile = (b_j < r)[:, None] & m_d[None, :]
        o_row = b_j[:, None].to(tl.int64) * length
        b_A = tl.load(p_data + (o_A + o_row + b_d[None, :]), mask=m_tile, other=0.0)
        b_At = tl.trans(b_A).to(tl.float32)
        for half in range(H):
            b_new = _times_basis(
                p_tile, b_v, p_Z + i_entry * (K * H * R) + half * R, d_from, length, k,
                H * R, K, R, BLOCK_K, BLOCK_D, VEC_D, PRECISION,
            )  # fmt: skip
            o_Y = (i_entry * H + half) * (R * R) + b_j[None, :] * R + b_j[:, None]
            b_new += tl.dot(b_At, tl.load(p_Y_out + o_Y), input_precision=PRECISION)
            o_new = tl.multiple_of(o_out + half * r * length, VEC_D) + o_row + b_d[None, :]
            tl.store(p_out + o_new, tl.trans(b_new).to(p_out.dtype.element_ty), mask=m_tile)


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
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_D, R): the basis tile times coefficients c (K, R) with rows ROW apart."""
    b_j = tl.arange(0, R)
    b_k = tl.arange(0, BLOCK_K)
    b_c = tl.load(p_c + b_k[:, None] * ROW + b_j[None, :])
    b_new = tl.dot(b_first, b_c, input_precision=PRECISION)
    for k_from in range(BLOCK_K, K, BLOCK_K):
        b_w = _basis_tile(p_tile, d_from, k_from, length, k, BLOCK_K, BLOCK_D, VEC_D)
        b_c = tl.load(p_c + (k_from + b_k)[:, None] * ROW + b_j[None, :])
        b_new += tl.dot(b_w, b_c, input_precision=PRECISION)
    return b_new
