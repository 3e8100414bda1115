"""A strip of recompose: the rows of a few adapters that one product serves, where they lie and what multiplies them.

ROWS rows of a result are of one adapter, J of one product; R rows of a factor are of one adapter, C of one strip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._tables import place_of, rank_of

# What a side of a result is made of, as _recompose.py says.
PARTS = tl.constexpr(0)
CORES = tl.constexpr(1)
SHIFTED = tl.constexpr(2)
EXTENDED = tl.constexpr(3)


@triton.jit
def factor_rows(
    entries,
    first,
    length,
    p_G,
    SIDE: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """Offset, mask and rank of each row of the factors, adapter after adapter, and its adapter: (C) each.

    SHARED: they are the right operand of one product with the cores of several adapters. What is not finite in one
    is left out, as its zeros would be no zeros; `wrong` shows it in the adapter's own rows.
    """
    p_entries, _, i_module, n_adapters, n_modules = entries
    b_c = tl.arange(0, C)
    i_c = first + b_c // R
    e_c = (i_c * n_modules + i_module).to(tl.int64)
    r_c = rank_of(p_entries, e_c, i_c < n_adapters, VEC_R, R)
    o_c = place_of(p_entries, e_c, i_c < n_adapters, SIDE, 1)
    if SIDE == 0:
        o_c = tl.max_contiguous(tl.multiple_of(o_c + b_c % R, VEC_R), VEC_R)
    else:
        o_c = tl.multiple_of(o_c + (b_c % R) * length, VEC_D)
    m_c = b_c % R < r_c
    if SHARED:
        m_c = m_c & (wrong(p_G, e_c, i_c < n_adapters, R) == 0)
    if SIDE == 0:
        m_c = tl.max_constancy(m_c, VEC_R)
    return o_c, m_c, r_c, i_c


@triton.jit
def result_rows(
    entries,
    first,
    SIDE: tl.constexpr,
    J: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    VEC_R: tl.constexpr,
):
    """Where the adapter of each row of a result begins, its rank, number and entry: (J) each."""
    p_entries, p_out_entries, i_module, n_adapters, n_modules = entries
    i_j = first + tl.arange(0, J) // ROWS
    e_j = (i_j * n_modules + i_module).to(tl.int64)
    r_j = rank_of(p_entries, e_j, i_j < n_adapters, VEC_R, R)
    o_j = place_of(p_out_entries, e_j, i_j < n_adapters, SIDE, 1)
    return o_j, r_j, i_j, e_j


@triton.jit
def wrong(p_G, e, m_e, R: tl.constexpr):
    """0, or NaN for the entries of which a factor is not finite, or not in the square."""
    o_g = (e * (R * R))[:, None] + (tl.arange(0, R) * (R + 1))[None, :]
    b_g = tl.load(p_G + o_g, mask=m_e[:, None], other=0.0)
    return tl.sum(b_g - b_g, axis=1)


@triton.jit
def coordinates(
    p_Z,
    e_j,
    row,
    m_j,
    k_from,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(J, BLOCK_K): coefficients of each row of the result, from (K, ROWS), or (ROWS, K) where they are those of A."""
    b_k = k_from + tl.arange(0, BLOCK_K)
    o_z = (e_j * (K * ROWS))[:, None]
    if KIND == PARTS and SIDE == 1:
        o_z += (row * K)[:, None] + b_k[None, :]
    else:
        o_z += row[:, None] + b_k[None, :] * ROWS
    return tl.load(p_Z + o_z, mask=m_j[:, None], other=0.0)


@triton.jit
def cores(
    coefficients,
    e_j,
    i_j,
    i_c,
    row,
    column,
    n_adapters,
    SIDE: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(J, C): Y, or X^T for the side of B; zero between two adapters.

    The X of `exact` is [lower half of Y_in, lower half of Y_out].
    """
    _, _, p_Y, p_Y_in = coefficients
    m_y = (i_j[:, None] == i_c[None, :]) & (i_j < n_adapters)[:, None]
    o_y = (e_j * (ROWS * R))[:, None]
    if SIDE == 1:
        return tl.load(p_Y + (o_y + row[:, None] * R + column[None, :]), mask=m_y, other=0.0)
    if ROWS == R:
        return tl.load(p_Y + (o_y + column[None, :] * R + row[:, None]), mask=m_y, other=0.0)
    o_y += (R + column)[None, :] * R + (row % R)[:, None]
    b_in = tl.load(p_Y_in + o_y, mask=m_y & (row < R)[:, None], other=0.0)
    return b_in + tl.load(p_Y + o_y, mask=m_y & (row >= R)[:, None], other=0.0)


@triton.jit
def factor_tile(p_data, rows, b_d, m_d, SIDE: tl.constexpr):
    """(C, BLOCK_D) of B^T or of A."""
    o_c, m_c, r_c = rows
    if SIDE == 0:
        o_x = o_c[None, :] + b_d[:, None].to(tl.int64) * r_c[None, :]
        return tl.trans(tl.load(p_data + o_x, mask=m_d[:, None] & m_c[None, :], other=0.0))
    o_x = o_c[:, None] + b_d[None, :]
    return tl.load(p_data + o_x, mask=m_c[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_rows(
    p_out,
    b_new,
    b_x,
    rows,
    row,
    b_d,
    m_d,
    length,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """(J, BLOCK_D) of the result, and of PARTS what is left of b_x beside it; row: each row's number within its
    adapter, padded."""
    TYPE: tl.constexpr = p_out.dtype.element_ty
    H: tl.constexpr = 2 if KIND == PARTS else ROWS // R  # rank of the result, in r
    o_j, r_j = rows
    m_j = row % R < r_j
    if SIDE == 0:
        m_new = tl.max_constancy(m_j, VEC_R)[None, :] & m_d[:, None]
        o_row = o_j + (row // R) * r_j + row % R
        o_row = tl.max_contiguous(tl.multiple_of(o_row, VEC_R), VEC_R)
        o_new = o_row[None, :] + b_d[:, None].to(tl.int64) * (r_j * H)[None, :]
        b_new = tl.trans(b_new)
        o_rest = o_new + r_j[None, :]
        b_x = tl.trans(b_x)
    else:
        m_new = m_j[:, None] & m_d[None, :]
        o_row = tl.multiple_of(o_j + ((row // R) * r_j + row % R) * length, VEC_D)
        o_new = o_row[:, None] + b_d[None, :]
        o_rest = o_new + tl.multiple_of(r_j * length, VEC_D)[:, None]
    if KIND == PARTS:
        tl.store(p_out + o_rest, (b_x.to(tl.float32) - b_new).to(TYPE), mask=m_new)
    elif KIND != CORES:
        b_new += b_x.to(tl.float32)
    tl.store(p_out + o_new, b_new.to(TYPE), mask=m_new)
