"""Third stage: the new factors of all modules and adapters, written in one launch.

With the coefficients Z that `solve` prepares, and r x r cores Y, every new factor is a product with the
basis plus one with the factor itself. Columns of B and rows of A alike are rows here, W is U or V, X is
B^T or A, and the result has r or 2r rows:

    PARTS     [Z^T W^T ; X - Z^T W^T]      B of `exact`, Z = P
    CORES     Z^T W^T + Y X                A of `exact`, both of `same`
    SHIFTED   Z^T W^T + X                  A of a realignment of form `same`, which leaves B alone
    EXTENDED  [Z^T W^T + X ; W^T]          A of a realignment of form `exact`, where B' = [B, U c]

A program takes one stretch of d of one side of one module and up to GROUP adapters, as project does. It
reads their coefficients once and splits them once; each tile of the basis serves all of its adapters, each
factor tile is read once and each output tile written once. With more than BLOCK_K directions or BLOCK_J rows
the coefficients come again, from the caches, for each tile.

Products of float32 with float32: bfloat16 parts, high x high + high x low + low x high, for 16-bit results
(2^-16); tf32x3 for float32 ones (2^-21). A bfloat16 factor is its own high part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._dots import SEPARATE, product, rounded_parts
from csulora_kernels._extend import append_basis, basis_tile, extend_B

PARTS = tl.constexpr(0)
CORES = tl.constexpr(1)
SHIFTED = tl.constexpr(2)
EXTENDED = tl.constexpr(3)


@triton.jit(do_not_specialize=["n_adapters", "n_modules"])
def recompose_kernel(
    p_data,  # flat factors
    p_out,  # flat, the same type
    p_basis,  # flat float32
    p_entries,  # (N, M, 3) int64: r, o_B, o_A
    p_out_entries,  # the same of the output
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_work,  # (programs, 5) int32: side, module, group, d from, d to
    p_G_B,  # (N, M, R, R) float32
    p_G_A,
    p_left,  # (N, M, K, R) float32: P (exact) or W (same); (N, M, K): c of a realignment
    p_X_out,  # (N, M, R, R) float32, touched for `same` alone
    p_Z,  # (N, M, K, H R) float32, H = 2 for A of `exact` and 1 elsewhere
    p_Y_out,  # (N, M, H R, R) float32, not touched by a realignment
    n_adapters,
    n_modules,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,  # most adapters of a program
    BLOCK_J: tl.constexpr,  # rows of a result at a time
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    KIND_B: tl.constexpr,
    KIND_A: tl.constexpr,
    STAGES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    H: tl.constexpr = 2 if KIND_B == PARTS else 1
    GROUP_A: tl.constexpr = group_of(GROUP, BLOCK_J, H * R)
    GROUP_B: tl.constexpr = group_of(GROUP, BLOCK_J, R)
    p_item = p_work + tl.program_id(0) * 5
    i_module = tl.load(p_item + 1)
    i_group = tl.load(p_item + 2)
    d_from = tl.multiple_of(tl.load(p_item + 3), BLOCK_D)
    d_to = tl.multiple_of(tl.load(p_item + 4), VEC_D)
    batch = (
        p_data,
        p_out,
        p_basis,
        p_entries,
        p_out_entries,
        p_modules,
        n_adapters,
        n_modules,
    )
    part = (i_module, i_group, d_from, d_to)
    if tl.load(p_item) == 0:
        if KIND_B == EXTENDED:
            extend_B(batch, part, p_left, GROUP_B, K, R, BLOCK_K, BLOCK_D, VEC_R, VEC_D)
        elif KIND_B != SHIFTED:
            _recompose_side(
                batch, part, (p_G_B, p_left, p_X_out), 0, KIND_B, H, 1, GROUP_B,
                K, R, BLOCK_J, BLOCK_K, BLOCK_D, VEC_R, VEC_D, STAGES, EMULATE,
            )  # fmt: skip
    else:
        _recompose_side(
            batch, part, (p_G_A, p_Z, p_Y_out), 1, KIND_A, H, H, GROUP_A,
            K, R, BLOCK_J, BLOCK_K, BLOCK_D, VEC_R, VEC_D, STAGES, EMULATE,
        )  # fmt: skip
        if KIND_A == EXTENDED:
            append_basis(batch, part, GROUP_A, K, BLOCK_K, BLOCK_D, VEC_D)


@triton.constexpr_function
def group_of(GROUP, BLOCK_J, ROWS):
    """How many adapters of ROWS rows a program takes at once."""
    return min(GROUP, max(1, BLOCK_J // ROWS))


@triton.jit
def _recompose_side(
    batch,
    part,
    coefficients,
    SIDE: tl.constexpr,  # 0: B and U, 1: A and V
    KIND: tl.constexpr,
    H: tl.constexpr,  # rank of the result, in r
    H_Z: tl.constexpr,  # rows of coefficients, in R
    GROUP: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    STAGES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One stretch of d of the new factors of GROUP adapters."""
    p_data, p_out, p_basis, p_entries, p_out_entries, p_modules, n_adapters, n_modules = batch
    i_module, i_group, d_from, d_to = part
    p_G, p_Z, p_Y = coefficients
    ROWS: tl.constexpr = H_Z * R  # of one adapter
    C: tl.constexpr = GROUP * R
    J: tl.constexpr = BLOCK_J if BLOCK_J < GROUP * ROWS else GROUP * ROWS
    tl.static_assert(KIND == CORES or J == C)  # where rows of X stand beside those of the result
    WIDE: tl.constexpr = p_data.dtype.element_ty == tl.float32
    RESIDENT: tl.constexpr = K == BLOCK_K and J == GROUP * ROWS and not WIDE
    length = tl.multiple_of(tl.load(p_modules + i_module * 5 + SIDE), VEC_D)
    k = tl.load(p_modules + i_module * 5 + 2).to(tl.int32)
    p_w = p_basis + tl.multiple_of(tl.load(p_modules + i_module * 5 + 3 + SIDE), 4)

    # Rows of the factors, adapter after adapter.
    b_c = tl.arange(0, C)
    i_c = i_group * GROUP + b_c // R
    e_c = (i_c * n_modules + i_module).to(tl.int64)
    r_c = tl.load(p_entries + e_c * 3, mask=i_c < n_adapters, other=0)
    o_c = tl.load(p_entries + e_c * 3 + 1 + SIDE, mask=i_c < n_adapters, other=0)
    m_c = b_c % R < r_c
    if SIDE == 0:
        r_c = tl.max_constancy(tl.multiple_of(r_c, VEC_R), R)
        o_c = tl.max_contiguous(tl.multiple_of(o_c + b_c % R, VEC_R), VEC_R)
    else:
        o_c = tl.multiple_of(o_c + (b_c % R) * length, VEC_D)

    # Rows of the result, the same way.
    b_j = tl.arange(0, J)
    i_j = i_group * GROUP + b_j // ROWS
    e_j = (i_j * n_modules + i_module).to(tl.int64)
    r_j = tl.load(p_entries + e_j * 3, mask=i_j < n_adapters, other=0)
    o_j = tl.load(p_out_entries + e_j * 3 + 1 + SIDE, mask=i_j < n_adapters, other=0)
    if SIDE == 0:  # here, as a hint on an argument is lost
        r_j = tl.max_constancy(tl.multiple_of(r_j, VEC_R), R)
    # One product with the cores of several adapters: what is not finite in one is left out, as its zeros would
    # be no zeros, and shows in its own rows instead.
    b_wrong = tl.zeros([J], tl.float32)
    if KIND == CORES and GROUP > 1:
        m_c = m_c & (_wrong(p_G, e_c, i_c < n_adapters, R) == 0)
        b_wrong = _wrong(p_G, e_j, i_j < n_adapters, R)
    if SIDE == 0:
        m_c = tl.max_constancy(m_c, VEC_R)
    if RESIDENT:
        b_z = _coordinates(p_Z, e_j, b_j % ROWS, i_j < n_adapters, 0, K, ROWS, BLOCK_K)
        z_high, z_low = rounded_parts(b_z + b_wrong[:, None])
        if KIND == CORES:
            b_y = _cores(p_Y, e_j, i_j, i_c, b_j % ROWS, b_c % R, n_adapters, R, ROWS, SIDE)
            y_high, y_low = rounded_parts(b_y)

    for d in tl.range(d_from, d_to, BLOCK_D, num_stages=STAGES if RESIDENT else 1):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, VEC_D)
        if SIDE == 0:
            b_x = tl.trans(
                tl.load(
                    p_data + (o_c[None, :] + b_d[:, None].to(tl.int64) * r_c[None, :]),
                    mask=m_d[:, None] & m_c[None, :],
                    other=0.0,
                )
            )
        else:
            b_x = tl.load(
                p_data + (o_c[:, None] + b_d[None, :]), mask=m_c[:, None] & m_d[None, :], other=0.0
            )
        if RESIDENT:
            w_high, w_low = rounded_parts(_basis_operand(p_w, b_d, m_d, 0, length, k, BLOCK_K, J))
            b_new = tl.zeros([J, BLOCK_D], tl.float32)
            b_new = product(z_low, w_high, b_new, EMULATE)
            b_new = product(z_high, w_low, b_new, EMULATE)
            b_new = product(z_high, w_high, b_new, EMULATE)
            if KIND == CORES:
                b_new = _times_factor(y_high, y_low, b_x, b_new, EMULATE)
            _store_rows(
                p_out, b_new, b_x, o_j, r_j, b_j % ROWS, b_d, m_d, length,
                SIDE, KIND, H, R, VEC_R, VEC_D,
            )  # fmt: skip
        else:
            # More than J rows are those of one adapter.
            for j_from in tl.range(0, GROUP * ROWS, J, num_stages=1):
                row = (j_from + b_j) % ROWS
                b_new = tl.zeros([J, BLOCK_D], tl.float32) + b_wrong[:, None]
                for k_from in tl.range(0, K, BLOCK_K, num_stages=1):
                    b_z = _coordinates(p_Z, e_j, row, i_j < n_adapters, k_from, K, ROWS, BLOCK_K)
                    b_w = _basis_operand(p_w, b_d, m_d, k_from, length, k, BLOCK_K, J)
                    b_new = _full_product(b_z, b_w, b_new, WIDE, EMULATE)
                if KIND == CORES:
                    b_y = _cores(p_Y, e_j, i_j, i_c, row, b_c % R, n_adapters, R, ROWS, SIDE)
                    if WIDE:
                        b_new = _full_product(b_y, b_x, b_new, WIDE, EMULATE)
                    else:
                        y_high, y_low = rounded_parts(b_y)
                        b_new = _times_factor(y_high, y_low, b_x, b_new, EMULATE)
                _store_rows(
                    p_out, b_new, b_x, o_j, r_j, row, b_d, m_d, length,
                    SIDE, KIND, H, R, VEC_R, VEC_D,
                )  # fmt: skip


@triton.jit
def _wrong(p_G, e, m_e, R: tl.constexpr):
    """0, or NaN for the entries of which a factor is not finite, or not in the square."""
    o_g = (e * (R * R))[:, None] + (tl.arange(0, R) * (R + 1))[None, :]
    b_g = tl.load(p_G + o_g, mask=m_e[:, None], other=0.0)
    return tl.sum(b_g - b_g, axis=1)


@triton.jit
def _coordinates(
    p_Z, e_j, row, m_j, k_from, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(J, BLOCK_K): coefficients of each row of the result."""
    b_k = k_from + tl.arange(0, BLOCK_K)
    o_z = (e_j * (K * ROWS) + row)[:, None] + b_k[None, :] * ROWS
    return tl.load(p_Z + o_z, mask=m_j[:, None], other=0.0)


@triton.jit
def _cores(
    p_Y, e_j, i_j, i_c, row, column, n_adapters,
    R: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """(J, C): Y, or X^T for the side of B; zero between two adapters."""
    if SIDE == 0:
        o_y = column[None, :] * R + row[:, None]
    else:
        o_y = row[:, None] * R + column[None, :]
    m_y = (i_j[:, None] == i_c[None, :]) & (i_j < n_adapters)[:, None]
    return tl.load(p_Y + ((e_j * (ROWS * R))[:, None] + o_y), mask=m_y, other=0.0)


@triton.jit
def _basis_operand(p_w, b_d, m_d, k_from, length, k, BLOCK_K: tl.constexpr, J: tl.constexpr):
    """The same, loaded without gaps, for a product of J rows.

    Triton gives loads and stores of one shape the vector of the narrowest type: eight elements, of which a
    thread then copies four at a time, and with L1 passed by L2 is asked for every 32 bytes twice.
    A shape of its own, of three dimensions, keeps this one apart. Not where a product has too few rows for a warp
    group, nor on sm_80, whose tiles are shorter: Triton would copy that shape four bytes at a time.
    """
    if b_d.shape[0] < 64 or J < 64:
        return basis_tile(p_w, b_d, m_d, k_from, length, k, BLOCK_K)
    b_k = tl.arange(0, 2)[:, None] * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    b_k += k_from
    o_w = b_k.to(tl.int64)[:, :, None] * length + b_d[None, None, :]
    b_w = tl.load(p_w + o_w, mask=(b_k < k)[:, :, None] & m_d[None, None, :], other=0.0)
    return tl.reshape(b_w, (BLOCK_K, b_d.shape[0]))


@triton.jit
def _times_factor(y_high, y_low, x, acc, EMULATE: tl.constexpr):
    """acc + y x for a 16-bit factor tile x."""
    if x.dtype == tl.bfloat16:
        acc = product(y_low, x, acc, EMULATE)
        acc = product(y_high, x, acc, EMULATE)
    else:
        high, low = rounded_parts(x.to(tl.float32))
        acc = product(y_low, high, acc, EMULATE)
        acc = product(y_high, low, acc, EMULATE)
        acc = product(y_high, high, acc, EMULATE)
    return acc


@triton.jit
def _full_product(a, b, acc, WIDE: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a b for float32 a, b."""
    if WIDE:
        acc += tl.dot(a, b, input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
    else:
        a_high, a_low = rounded_parts(a)
        b_high, b_low = rounded_parts(b)
        acc = product(a_low, b_high, acc, EMULATE)
        acc = product(a_high, b_low, acc, EMULATE)
        acc = product(a_high, b_high, acc, EMULATE)
    return acc


@triton.jit
def _store_rows(
    p_out, b_new, b_x, o_j, r_j, row, b_d, m_d, length,
    SIDE: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    VEC_R: tl.constexpr, VEC_D: tl.constexpr,
):  # fmt: skip
    """(J, BLOCK_D) of the result; row: each row's number within its adapter, padded."""
    TYPE: tl.constexpr = p_out.dtype.element_ty
    m_j = row % R < r_j
    if SIDE == 0:
        m_j = tl.max_constancy(m_j, VEC_R)[None, :] & m_d[:, None]
        o_row = tl.max_contiguous(tl.multiple_of(o_j + row % R, VEC_R), VEC_R)
        o_new = o_row[None, :] + b_d[:, None].to(tl.int64) * (r_j * H)[None, :]
        b_new = tl.trans(b_new)
        if KIND == PARTS:
            b_rest = tl.trans(b_x).to(tl.float32) - b_new
            tl.store(p_out + (o_new + r_j[None, :]), b_rest.to(TYPE), mask=m_j)
        tl.store(p_out + o_new, b_new.to(TYPE), mask=m_j)
    else:
        if KIND == SHIFTED or KIND == EXTENDED:  # noqa: SIM109 - Triton knows no `in`
            b_new += b_x.to(tl.float32)
        o_row = tl.multiple_of(o_j + ((row // R) * r_j + row % R) * length, VEC_D)
        tl.store(
            p_out + (o_row[:, None] + b_d[None, :]),
            b_new.to(TYPE),
            mask=m_j[:, None] & m_d[None, :],
        )
