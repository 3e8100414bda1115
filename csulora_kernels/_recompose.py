"""Third stage: the new factors of all modules and adapters, written in one launch.

With the coefficients Z that `solve` prepares, and r x r cores Y, every new factor is a product with the
basis plus one with the factor itself. Columns of B and rows of A alike are rows here, W is U or V, X is
B^T or A, and the result has r or 2r rows:

    PARTS     [Z^T W^T ; X - Z^T W^T]      the wide side of `exact`, Z = P or Q^T
    CORES     Z^T W^T + Y X                its other side, both of `same`
    SHIFTED   Z^T W^T + X                  A of a realignment of form `same`, which leaves B alone
    EXTENDED  [Z^T W^T + X ; W^T]          A of a realignment of form `exact`, where B' = [B, U c]

A program takes one stretch of d of one side of one module and one or two strips of up to GROUP adapters, as project does.
It reads their coefficients once and splits them once; each tile of the basis serves all of its adapters, each
factor tile is read once and each output tile written once. With more than BLOCK_K directions or BLOCK_J rows
the coefficients come again, from the caches, for each tile.

Products of float32 with float32: bfloat16 parts, high x high + high x low + low x high, for 16-bit results
(2^-16); tf32x3 for float32 ones (2^-21). A bfloat16 factor is its own high part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels import plan
from csulora_kernels._dots import full_product, product, rounded_parts, times_factor
from csulora_kernels._extend import append_basis, basis_tile, extend_B
from csulora_kernels._strip import (
    CORES,
    PARTS,
    S_BLOCK_D,
    S_BLOCK_K,
    S_GROUP,
    S_J,
    S_K,
    S_ROWS,
    S_VEC_D,
    coordinates,
    cores,
    factor_tile,
    group_of,
    rows_of,
    store_rows,
    strip_of,
)
from csulora_kernels._tables import recompose_item, side_of

SHIFTED = tl.constexpr(plan.SHIFTED)
EXTENDED = tl.constexpr(plan.EXTENDED)
EXACT = tl.constexpr(plan.EXACT)


@triton.jit(do_not_specialize=["n_adapters", "n_modules"])
def recompose_kernel(
    p_data,  # flat factors
    p_out,  # flat, the same type
    p_basis,  # flat float32
    p_entries,  # (N, M, 3) int64: r, o_B, o_A
    p_out_entries,  # the same of the output
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_work,  # (programs, fields of a RecomposeItem) int32
    p_G_B,  # (N, M, R, R) float32
    p_G_A,
    p_left,  # (N, M, K, R) float32: P (exact) or W (same); (N, M, K): c of a realignment
    p_Q,  # (N, M, R, K) float32, for `exact` alone
    p_Z,  # (N, M, K, H R) float32, H = 2 for `exact` and 1 elsewhere
    p_X,  # (N, M, H R, R) float32, for CSULoRA alone: Y_in (exact) or X_out (same)
    p_Y_out,  # (N, M, H R, R) float32, for CSULoRA alone
    n_adapters,
    n_modules,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,  # most adapters of a strip
    STRIPS: tl.constexpr,
    BLOCK_J: tl.constexpr,  # rows of a result at a time
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    KIND: tl.constexpr,
    STAGES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    side, wide, part = recompose_item(p_work, BLOCK_D, VEC_D)
    entries = (p_entries, p_out_entries, n_adapters, n_modules)
    batch = (p_data, p_out, p_basis, p_modules, entries)
    ALL: tl.constexpr = GROUP * STRIPS  # adapters of a program, where they have R rows each
    TILE: tl.constexpr = (R, GROUP, BLOCK_J, K, BLOCK_K, BLOCK_D, VEC_R, VEC_D)
    HOW: tl.constexpr = (STRIPS, STAGES, EMULATE)
    if KIND == EXTENDED:
        if side == 0:
            extend_B(batch, part, p_left, ALL, K, R, BLOCK_K, BLOCK_D, VEC_R, VEC_D)
        else:
            _recompose_side(batch, part, (p_G_A, p_Z, p_Z, p_Z), 1, KIND, 1, TILE, HOW)
            append_basis(batch, part, ALL, K, BLOCK_K, BLOCK_D, VEC_D)
    elif KIND == SHIFTED:
        _recompose_side(batch, part, (p_G_A, p_Z, p_Z, p_Z), 1, KIND, 1, TILE, HOW)
    elif KIND == CORES:
        if side == 0:
            _recompose_side(batch, part, (p_G_B, p_left, p_X, p_X), 0, CORES, 1, TILE, HOW)
        else:
            _recompose_side(batch, part, (p_G_A, p_Z, p_Y_out, p_X), 1, CORES, 1, TILE, HOW)
    else:
        tl.static_assert(KIND == EXACT)
        # One after the other, as Triton gives branches within branches shared memory of their own.
        if (wide == 1) & (side == 0):
            _recompose_side(batch, part, (p_G_B, p_left, p_X, p_X), 0, PARTS, 1, TILE, HOW)
        if (wide == 1) & (side == 1):
            _recompose_side(batch, part, (p_G_A, p_Q, p_X, p_X), 1, PARTS, 1, TILE, HOW)
        if (wide == 0) & (side == 0):
            _recompose_side(batch, part, (p_G_B, p_Z, p_Y_out, p_X), 0, CORES, 2, TILE, HOW)
        if (wide == 0) & (side == 1):
            _recompose_side(batch, part, (p_G_A, p_Z, p_Y_out, p_X), 1, CORES, 2, TILE, HOW)


@triton.jit
def _recompose_side(
    batch,
    part,
    coefficients,  # Gram matrices, Z and two of cores, see `cores`
    SIDE: tl.constexpr,  # 0: B and U, 1: A and V
    KIND: tl.constexpr,
    HALVES: tl.constexpr,  # R rows that the products of one adapter have
    TILE: tl.constexpr,  # as recompose_kernel makes it
    HOW: tl.constexpr,  # (STRIPS, STAGES, EMULATE)
):
    """One stretch of d of the new factors of STRIPS times S_GROUP adapters."""
    R: tl.constexpr = TILE[0]
    BLOCK_J: tl.constexpr = TILE[2]
    ROWS: tl.constexpr = HALVES * R
    GROUP: tl.constexpr = group_of(TILE[1], BLOCK_J, ROWS)
    J: tl.constexpr = BLOCK_J if BLOCK_J < GROUP * ROWS else GROUP * ROWS
    VEC_D: tl.constexpr = TILE[7]
    SIZES: tl.constexpr = (TILE[3], R, GROUP, ROWS, J, TILE[4], TILE[5], TILE[6], VEC_D)
    STRIPS: tl.constexpr = HOW[0]
    i_module, i_group, d_from, d_to = part
    p_data, p_out, p_basis, p_modules, entries = batch
    length, k, o_basis = side_of(p_modules, i_module, SIDE, VEC_D)
    side = (p_data, p_out, p_basis + o_basis, length, k, i_module, entries)
    stretch = (i_group * (GROUP * STRIPS), d_from, d_to)
    # Where rows of X stand beside those of the result.
    tl.static_assert(KIND == CORES or J == GROUP * R)
    WIDE: tl.constexpr = p_data.dtype.element_ty == tl.float32
    if SIZES[S_K] == SIZES[S_BLOCK_K] and J == GROUP * ROWS and not WIDE:
        _resident(side, stretch, coefficients, SIDE, KIND, SIZES, HOW)
    else:
        tl.static_assert(STRIPS == 1, "two strips ask for coefficients that are resident")
        _in_blocks(side, stretch, coefficients, SIDE, KIND, SIZES, HOW[2])


@triton.jit
def _resident(
    side,
    stretch,
    coefficients,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SIZES: tl.constexpr,
    HOW: tl.constexpr,
):
    """With coefficients that a program reads and splits once, for one tile of the basis at a time."""
    STRIPS: tl.constexpr = HOW[0]
    BLOCK_D: tl.constexpr = SIZES[S_BLOCK_D]
    first, d_from, d_to = stretch
    one = strip_of(side, first, coefficients, SIDE, KIND, SIZES)
    if STRIPS == 2:
        two = strip_of(side, first + SIZES[S_GROUP], coefficients, SIDE, KIND, SIZES)
    for d in tl.range(d_from, d_to, BLOCK_D, num_stages=HOW[1]):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, SIZES[S_VEC_D])
        w = rounded_parts(_basis_operand(side, b_d, m_d, 0, SIZES))
        _write_tile(side, one, w, b_d, m_d, SIDE, KIND, SIZES, HOW[2])
        if STRIPS == 2:
            _write_tile(side, two, w, b_d, m_d, SIDE, KIND, SIZES, HOW[2])


@triton.jit
def _write_tile(
    side,
    strip,
    w,
    b_d,
    m_d,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SIZES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One tile of the results of a strip, from the two parts w of the tile of the basis."""
    rows, results, z, y = strip
    b_x = factor_tile(side, rows, b_d, m_d, SIDE)
    b_new = tl.zeros([SIZES[S_J], SIZES[S_BLOCK_D]], tl.float32)
    b_new = product(z[1], w[0], b_new, EMULATE)
    b_new = product(z[0], w[1], b_new, EMULATE)
    b_new = product(z[0], w[0], b_new, EMULATE)
    if KIND == CORES:
        b_new = times_factor(y, b_x, b_new, EMULATE)
    row = tl.arange(0, SIZES[S_J]) % SIZES[S_ROWS]
    store_rows(side, results, row, b_new, b_x, b_d, m_d, SIDE, KIND, SIZES)


@triton.jit
def _in_blocks(
    side,
    stretch,
    coefficients,
    SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SIZES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """With coefficients that come again for each tile, BLOCK_K directions and J rows at a time."""
    J: tl.constexpr = SIZES[S_J]
    BLOCK_D: tl.constexpr = SIZES[S_BLOCK_D]
    WIDE: tl.constexpr = side[0].dtype.element_ty == tl.float32
    first, d_from, d_to = stretch
    rows, results, i_c, i_j, e_j, b_wrong = rows_of(side, first, coefficients, SIDE, KIND, SIZES)
    for d in tl.range(d_from, d_to, BLOCK_D, num_stages=1):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, SIZES[S_VEC_D])
        b_x = factor_tile(side, rows, b_d, m_d, SIDE)
        # More than J rows are those of one adapter.
        for j_from in tl.range(0, SIZES[S_GROUP] * SIZES[S_ROWS], J, num_stages=1):
            row = (j_from + tl.arange(0, J)) % SIZES[S_ROWS]
            b_new = tl.zeros([J, BLOCK_D], tl.float32) + b_wrong[:, None]
            for k_from in tl.range(0, SIZES[S_K], SIZES[S_BLOCK_K], num_stages=1):
                b_z = coordinates(side, coefficients, i_j, e_j, row, k_from, SIDE, KIND, SIZES)
                b_w = _basis_operand(side, b_d, m_d, k_from, SIZES)
                b_new = full_product(b_z, b_w, b_new, WIDE, EMULATE)
            if KIND == CORES:
                b_y = cores(side, coefficients, i_c, i_j, e_j, row, SIDE, SIZES)
                if WIDE:
                    b_new = full_product(b_y, b_x, b_new, WIDE, EMULATE)
                else:
                    b_new = times_factor(rounded_parts(b_y), b_x, b_new, EMULATE)
            store_rows(side, results, row, b_new, b_x, b_d, m_d, SIDE, KIND, SIZES)


@triton.jit
def _basis_operand(side, b_d, m_d, k_from, SIZES: tl.constexpr):
    """`basis_tile`, loaded without gaps.

    Triton gives loads and stores of one shape the vector of the narrowest type: eight elements, of which a
    thread then copies four at a time, and with L1 passed by L2 is asked for every 32 bytes twice.
    A shape of its own, of three dimensions, keeps this one apart. Not where a product has too few rows for a warp
    group, nor on sm_80, whose tiles are shorter: Triton would copy that shape four bytes at a time.
    """
    BLOCK_K: tl.constexpr = SIZES[S_BLOCK_K]
    _, _, p_w, length, k, _, _ = side
    if SIZES[S_BLOCK_D] < 64 or SIZES[S_J] < 64:
        return basis_tile(p_w, b_d, m_d, k_from, length, k, BLOCK_K)
    b_k = tl.arange(0, 2)[:, None] * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    b_k += k_from
    o_w = b_k.to(tl.int64)[:, :, None] * length + b_d[None, None, :]
    b_w = tl.load(p_w + o_w, mask=(b_k < k)[:, :, None] & m_d[None, None, :], other=0.0)
    return tl.reshape(b_w, (BLOCK_K, b_d.shape[0]))
