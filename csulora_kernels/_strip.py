"""A strip of recompose: the rows of a few adapters that one product serves, where they lie and what multiplies them.

ROWS rows of a result are of one adapter, J of one product; R rows of a factor are of one adapter, C of one strip. Sizes
of a side travel as one tuple, SIZES, taken apart by the names below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels import plan
from csulora_kernels._dots import rounded_parts
from csulora_kernels._tables import place_of, rank_of

# Places in SIZES.
S_K = tl.constexpr(0)
S_R = tl.constexpr(1)
S_GROUP = tl.constexpr(2)  # adapters of a strip
S_ROWS = tl.constexpr(3)
S_J = tl.constexpr(4)
S_BLOCK_K = tl.constexpr(5)
S_BLOCK_D = tl.constexpr(6)
S_VEC_R = tl.constexpr(7)
S_VEC_D = tl.constexpr(8)

PARTS = tl.constexpr(plan.PARTS)
CORES = tl.constexpr(plan.CORES)


@triton.constexpr_function
def group_of(GROUP, BLOCK_J, ROWS):
    """How many adapters of ROWS rows a strip takes."""
    return min(GROUP, max(1, BLOCK_J // ROWS))


@triton.jit
def strip_of(
    side, first, coefficients, SIDE: tl.constexpr, KIND: tl.constexpr, SIZES: tl.constexpr
):
    """What all tiles of a strip share where they are resident: rows of the factors and of the results, and the
    two parts of Z and of the cores (else of Z again)."""
    ROWS: tl.constexpr = SIZES[S_ROWS]
    J: tl.constexpr = SIZES[S_J]
    rows, results, i_c, i_j, e_j, b_wrong = rows_of(side, first, coefficients, SIDE, KIND, SIZES)
    row = tl.arange(0, J) % ROWS
    b_z = coordinates(side, coefficients, i_j, e_j, row, 0, SIDE, KIND, SIZES)
    z = rounded_parts(b_z + b_wrong[:, None])
    if KIND == CORES:
        y = rounded_parts(cores(side, coefficients, i_c, i_j, e_j, row, SIDE, SIZES))
        return rows, results, z, y
    else:
        return rows, results, z, z


@triton.jit
def rows_of(side, first, coefficients, SIDE: tl.constexpr, KIND: tl.constexpr, SIZES: tl.constexpr):
    """Rows of the factors (for `factor_tile`) and of the results (for `store_rows`), adapters of both, entries of
    the latter, and 0 or NaN for each row of a result."""
    J: tl.constexpr = SIZES[S_J]
    # One product with the cores of several adapters: what is not finite in one is left out, as its zeros would
    # be no zeros, and shows in its own rows instead.
    SHARED: tl.constexpr = KIND == CORES and SIZES[S_GROUP] > 1
    p_G, _, _, _ = coefficients
    rows, i_c = _factor_rows(side, first, p_G, SIDE, SHARED, SIZES)
    results, i_j, e_j = _result_rows(side, first, SIDE, SIZES)
    b_wrong = tl.zeros([J], tl.float32)
    if SHARED:
        b_wrong = _wrong(side, p_G, i_j, e_j, SIZES)
    return rows, results, i_c, i_j, e_j, b_wrong


@triton.jit
def _factor_rows(side, first, p_G, SIDE: tl.constexpr, SHARED: tl.constexpr, SIZES: tl.constexpr):
    """(offset, mask, rank) of each row of the factors, adapter after adapter, and its adapter: (C) each."""
    R: tl.constexpr = SIZES[S_R]
    C: tl.constexpr = SIZES[S_GROUP] * R
    VEC_R: tl.constexpr = SIZES[S_VEC_R]
    VEC_D: tl.constexpr = SIZES[S_VEC_D]
    _, _, _, length, _, i_module, entries = side
    p_entries, _, n_adapters, n_modules = entries
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
        m_c = m_c & (_wrong(side, p_G, i_c, e_c, SIZES) == 0)
    if SIDE == 0:
        m_c = tl.max_constancy(m_c, VEC_R)
    return (o_c, m_c, r_c), i_c


@triton.jit
def _result_rows(side, first, SIDE: tl.constexpr, SIZES: tl.constexpr):
    """(where its adapter begins, rank) of each row of the results, its adapter and entry: (J) each."""
    _, _, _, _, _, i_module, entries = side
    p_entries, p_out_entries, n_adapters, n_modules = entries
    i_j = first + tl.arange(0, SIZES[S_J]) // SIZES[S_ROWS]
    e_j = (i_j * n_modules + i_module).to(tl.int64)
    r_j = rank_of(p_entries, e_j, i_j < n_adapters, SIZES[S_VEC_R], SIZES[S_R])
    o_j = place_of(p_out_entries, e_j, i_j < n_adapters, SIDE, 1)
    return (o_j, r_j), i_j, e_j


@triton.jit
def _wrong(side, p_G, i, e, SIZES: tl.constexpr):
    """0, or NaN for the adapters i with entries e of which a factor is not finite, or not in the square."""
    R: tl.constexpr = SIZES[S_R]
    _, _, n_adapters, _ = side[6]
    o_g = (e * (R * R))[:, None] + (tl.arange(0, R) * (R + 1))[None, :]
    b_g = tl.load(p_G + o_g, mask=(i < n_adapters)[:, None], other=0.0)
    return tl.sum(b_g - b_g, axis=1)


@triton.jit
def coordinates(
    side,
    coefficients,
    i_j,
    e_j,
    row,
    k_from,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SIZES: tl.constexpr,
):
    """(J, BLOCK_K): Z of each row of the result, from (K, ROWS), or (ROWS, K) where it is the Q of PARTS."""
    K: tl.constexpr = SIZES[S_K]
    ROWS: tl.constexpr = SIZES[S_ROWS]
    _, p_Z, _, _ = coefficients
    _, _, n_adapters, _ = side[6]
    b_k = k_from + tl.arange(0, SIZES[S_BLOCK_K])
    o_z = (e_j * (K * ROWS))[:, None]
    if KIND == PARTS and SIDE == 1:
        o_z += (row * K)[:, None] + b_k[None, :]
    else:
        o_z += row[:, None] + b_k[None, :] * ROWS
    return tl.load(p_Z + o_z, mask=(i_j < n_adapters)[:, None], other=0.0)


@triton.jit
def cores(side, coefficients, i_c, i_j, e_j, row, SIDE: tl.constexpr, SIZES: tl.constexpr):
    """(J, C): Y, or X^T for the side of B; zero between two adapters.

    The X of `exact` is [lower half of Y_in, lower half of Y_out].
    """
    R: tl.constexpr = SIZES[S_R]
    ROWS: tl.constexpr = SIZES[S_ROWS]
    _, _, p_Y, p_Y_in = coefficients
    _, _, n_adapters, _ = side[6]
    column = tl.arange(0, SIZES[S_GROUP] * R) % R
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
def factor_tile(side, rows, b_d, m_d, SIDE: tl.constexpr):
    """(C, BLOCK_D) of B^T or of A."""
    p_data = side[0]
    o_c, m_c, r_c = rows
    if SIDE == 0:
        o_x = o_c[None, :] + b_d[:, None].to(tl.int64) * r_c[None, :]
        return tl.trans(tl.load(p_data + o_x, mask=m_d[:, None] & m_c[None, :], other=0.0))
    o_x = o_c[:, None] + b_d[None, :]
    return tl.load(p_data + o_x, mask=m_c[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_rows(
    side,
    results,
    row,
    b_new,
    b_x,
    b_d,
    m_d,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SIZES: tl.constexpr,
):
    """(J, BLOCK_D) of the result, and of PARTS what is left of b_x beside it; row: each row's number within its
    adapter, padded."""
    R: tl.constexpr = SIZES[S_R]
    ROWS: tl.constexpr = SIZES[S_ROWS]
    VEC_R: tl.constexpr = SIZES[S_VEC_R]
    VEC_D: tl.constexpr = SIZES[S_VEC_D]
    _, p_out, _, length, _, _, _ = side
    TYPE: tl.constexpr = p_out.dtype.element_ty
    H: tl.constexpr = 2 if KIND == PARTS else ROWS // R  # rank of the result, in r
    o_j, r_j = results
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
