"""What recompose writes of a realignment of form `exact` without a product: A' = [... ; V^T], B' = [B, U c]."""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._tables import place_of, rank_of, side_of


@triton.jit
def basis_tile(p_w, b_d, m_d, k_from, length, k, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_D) of U^T or V^T."""
    b_k = k_from + tl.arange(0, BLOCK_K)
    o_w = b_k[:, None].to(tl.int64) * length + b_d[None, :]
    return tl.load(p_w + o_w, mask=(b_k < k)[:, None] & m_d[None, :], other=0.0)


@triton.jit
def append_basis(
    batch,
    part,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """Rows r to r + k of A': V^T as it is."""
    _, p_out, p_basis, p_modules, entries = batch
    p_entries, p_out_entries, n_adapters, n_modules = entries
    i_module, i_group, d_from, d_to = part
    length, k, o_basis = side_of(p_modules, i_module, 1, VEC_D)
    p_w = p_basis + o_basis
    for d in range(d_from, d_to, BLOCK_D):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, VEC_D)
        for k_from in range(0, K, BLOCK_K):
            b_k = k_from + tl.arange(0, BLOCK_K)
            b_w = basis_tile(p_w, b_d, m_d, k_from, length, k, BLOCK_K)
            for i in range(i_group * GROUP, tl.minimum(i_group * GROUP + GROUP, n_adapters)):
                e = (i * n_modules + i_module).to(tl.int64)
                r = rank_of(p_entries, e, None, 1, 1)
                o_A = place_of(p_out_entries, e, None, 1, VEC_D)
                o_row = tl.multiple_of(o_A + (r + b_k) * length, VEC_D)
                tl.store(
                    p_out + (o_row[:, None] + b_d[None, :]),
                    b_w.to(p_out.dtype.element_ty),
                    mask=(b_k < tl.where(r > 0, k, 0))[:, None] & m_d[None, :],
                )


@triton.jit
def extend_B(
    batch,
    part,
    p_c,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """B' = [B, U c] (d_out, r + k) of GROUP adapters."""
    p_data, p_out, p_basis, p_modules, entries = batch
    p_entries, p_out_entries, n_adapters, n_modules = entries
    i_module, i_group, d_from, d_to = part
    length, k, o_basis = side_of(p_modules, i_module, 0, VEC_D)
    p_w = p_basis + o_basis
    b_r = tl.arange(0, R)
    for d in range(d_from, d_to, BLOCK_D):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, VEC_D)
        for k_from in range(0, K, BLOCK_K):
            b_k = k_from + tl.arange(0, BLOCK_K)
            b_w = tl.trans(basis_tile(p_w, b_d, m_d, k_from, length, k, BLOCK_K))
            for i in range(i_group * GROUP, tl.minimum(i_group * GROUP + GROUP, n_adapters)):
                e = (i * n_modules + i_module).to(tl.int64)
                r = rank_of(p_entries, e, None, VEC_R, 1)
                o_B = place_of(p_out_entries, e, None, 0, VEC_R)
                stride = tl.multiple_of(r + k, VEC_R)
                o_row = o_B + b_d[:, None].to(tl.int64) * stride
                b_c = tl.load(p_c + e * K + b_k)
                tl.store(
                    p_out + (o_row + (r + b_k)[None, :]),
                    (b_w * b_c[None, :]).to(p_out.dtype.element_ty),
                    mask=m_d[:, None]
                    & tl.max_constancy(b_k < tl.where(r > 0, k, 0), VEC_R)[None, :],
                )
                if k_from == 0:
                    o_old = place_of(p_entries, e, None, 0, VEC_R)
                    m_old = m_d[:, None] & tl.max_constancy(b_r < r, VEC_R)[None, :]
                    b_B = tl.load(
                        p_data + (o_old + b_d[:, None].to(tl.int64) * r + b_r[None, :]), mask=m_old
                    )
                    tl.store(p_out + (o_row + b_r[None, :]), b_B, mask=m_old)
