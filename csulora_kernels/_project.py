"""First stage: P = U^T B, Q = A V and the Gram matrices, for all modules, adapters and both sides.

One streaming launch reads every factor once. A program takes one stretch of d of one side of one
module and up to GROUP adapters, or twice as many in two strips: their columns share each basis tile, what it takes
to split it and its bytes through L2. Adapters of a module are
neighbours in the work list, so the basis comes from DRAM once and from L2 for the others.

A stretch of d gives a partial sum in its own slot; slot 0 is the result, and where a module has more
than one stretch a second, small launch adds the others to it in a fixed order. No atomics, so the
same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._dots import basis_parts, basis_product, gram_products
from csulora_kernels._tables import place_of, project_item, rank_of, side_of


@triton.jit(do_not_specialize=["n_adapters", "n_modules"])
def project_kernel(
    p_data,  # flat factors
    p_basis,  # flat float32
    p_entries,  # (N, M, 3) int64: r, o_B, o_A
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_work,  # (programs, fields of a ProjectItem) int32
    p_P,  # (splits, N, M, K, R) float32
    p_Q,  # (splits, N, M, R, K)
    p_G_B,  # (splits, N, M, R, R)
    p_G_A,
    n_adapters,
    n_modules,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    EMULATE: tl.constexpr,
):
    side, part = project_item(p_work, BLOCK_D, VEC_D)
    batch = (p_data, p_basis, p_entries, p_modules, n_adapters, n_modules)
    TILE: tl.constexpr = (K, R, GROUP, STRIPS, BLOCK_K, BLOCK_D, VEC_R, VEC_D)
    if side == 0:
        _project_side(batch, part, (p_P, p_G_B), 0, TILE, EMULATE)
    else:
        _project_side(batch, part, (p_Q, p_G_A), 1, TILE, EMULATE)


@triton.jit
def _project_side(
    batch,
    part,
    out,
    SIDE: tl.constexpr,  # 0: B and U, 1: A and V
    TILE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One stretch of d: one or two strips of C = GROUP R columns of B (or rows of A) against BLOCK_K directions."""
    K: tl.constexpr = TILE[0]
    R: tl.constexpr = TILE[1]
    GROUP: tl.constexpr = TILE[2]
    STRIPS: tl.constexpr = TILE[3]
    BLOCK_K: tl.constexpr = TILE[4]
    BLOCK_D: tl.constexpr = TILE[5]
    VEC_R: tl.constexpr = TILE[6]
    VEC_D: tl.constexpr = TILE[7]
    C: tl.constexpr = GROUP * R
    p_data, p_basis, p_entries, p_modules, n_adapters, n_modules = batch
    i_module, i_group, i_block, i_split, d_from, d_to = part
    TYPE: tl.constexpr = p_data.dtype.element_ty
    length, k, o_basis = side_of(p_modules, i_module, SIDE, VEC_D)
    b_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = b_k < k
    o_k = o_basis + b_k.to(tl.int64) * length
    first = i_group * (GROUP * STRIPS)
    second = first + GROUP
    entries = (p_entries, i_module, n_adapters, n_modules)
    one = _columns(entries, first, length, SIDE, GROUP, R, VEC_R, VEC_D)
    b_P = tl.zeros([BLOCK_K, C], tl.float32)
    b_G = tl.zeros([GROUP, R, R], tl.float32)
    if STRIPS == 2:
        two = _columns(entries, second, length, SIDE, GROUP, R, VEC_R, VEC_D)
        b_P2 = tl.zeros([BLOCK_K, C], tl.float32)
        b_G2 = tl.zeros([GROUP, R, R], tl.float32)
    for d in range(d_from, d_to, BLOCK_D):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, VEC_D)
        b_w = tl.load(
            p_basis + (o_k[:, None] + b_d[None, :]), mask=m_k[:, None] & m_d[None, :], other=0.0
        )
        parts = basis_parts(b_w, TYPE)
        b_x = _factor_tile(p_data, one, b_d, m_d, SIDE, C)
        b_P += basis_product(parts, b_x, EMULATE)
        b_G += gram_products(b_x, GROUP, EMULATE)
        if STRIPS == 2:
            b_x2 = _factor_tile(p_data, two, b_d, m_d, SIDE, C)
            b_P2 += basis_product(parts, b_x2, EMULATE)
            b_G2 += gram_products(b_x2, GROUP, EMULATE)
    o_slot = i_split.to(tl.int64) * n_adapters * n_modules + i_module
    place = (o_slot, n_adapters, n_modules, b_k, i_block == 0)
    _store(out, place, first, b_P, b_G, SIDE, K, R, GROUP)
    if STRIPS == 2:
        _store(out, place, second, b_P2, b_G2, SIDE, K, R, GROUP)


@triton.jit
def _columns(
    entries,
    first,
    length,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
):
    """Offset, mask and rank of each column of B, or row of A: (GROUP R), for rows (GROUP, R)."""
    p_entries, i_module, n_adapters, n_modules = entries
    if SIDE == 0:
        b_c = tl.arange(0, GROUP * R)
        i_row = b_c % R
        i_adapter = first + b_c // R
        e = (i_adapter * n_modules + i_module).to(tl.int64)
        r = rank_of(p_entries, e, i_adapter < n_adapters, VEC_R, R)
        o_B = place_of(p_entries, e, i_adapter < n_adapters, SIDE, VEC_R)
        o_c = tl.max_contiguous(tl.multiple_of(o_B + i_row, VEC_R), VEC_R)
        return o_c, tl.max_constancy(i_row < r, VEC_R), r
    else:
        i_row = tl.arange(0, R)
        i_adapter = first + tl.arange(0, GROUP)
        e = (i_adapter * n_modules + i_module).to(tl.int64)
        r = rank_of(p_entries, e, i_adapter < n_adapters, VEC_R, 1)
        o_A = place_of(p_entries, e, i_adapter < n_adapters, SIDE, 1)
        o_c = tl.multiple_of(o_A[:, None] + (i_row * length)[None, :], (VEC_D, VEC_D))
        return o_c, i_row[None, :] < r[:, None], r


@triton.jit
def _factor_tile(p_data, columns, b_d, m_d, SIDE: tl.constexpr, C: tl.constexpr):
    """(BLOCK_D, C) of B, or of A^T."""
    o_c, m_c, r = columns
    if SIDE == 0:
        o_x = o_c[None, :] + b_d[:, None].to(tl.int64) * r[None, :]
        return tl.load(p_data + o_x, mask=m_d[:, None] & m_c[None, :], other=0.0)
    else:
        # Of three dimensions: Triton gives loads of one shape one vector, eight elements where these are of
        # 16 bits, and a thread that copies a float32 basis by eights asks L2 for every 32 bytes twice.
        o_x = o_c[:, :, None] + b_d[None, None, :]
        b_x = tl.load(p_data + o_x, mask=m_c[:, :, None] & m_d[None, None, :], other=0.0)
        return tl.trans(tl.reshape(b_x, (C, b_d.shape[0])))


@triton.jit
def _store(
    out,
    place,
    first,
    b_P,
    b_G,
    SIDE: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Coordinates and Gram matrices of one strip, whose adapters are from `first` on."""
    p_coordinates, p_G = out
    o_slot, n_adapters, n_modules, b_k, m_block = place
    b_c = tl.arange(0, GROUP * R)
    i_adapter = first + b_c // R
    o_entry = o_slot + i_adapter * n_modules
    if SIDE == 0:
        o_out = (o_entry[None, :] * K + b_k[:, None]) * R + (b_c % R)[None, :]
    else:
        o_out = (o_entry * R + b_c % R)[None, :] * K + b_k[:, None]
    m_out = (i_adapter < n_adapters)[None, :] & (b_k < K)[:, None]
    tl.store(p_coordinates + o_out, b_P, mask=m_out)
    # One block of directions is enough. No mask has a truth value of one element in it: Triton's
    # interpreter makes integers of those.
    i_G = first + tl.arange(0, GROUP)
    m_G = tl.arange(0, R)[None, :] < tl.where((i_G < n_adapters)[:, None] & m_block, R, 0)
    o_row = (o_slot + i_G * n_modules)[:, None] * R + tl.arange(0, R)[None, :]
    o_G = o_row[:, :, None] * R + tl.arange(0, R)[None, None, :]
    tl.store(p_G + o_G, b_G, mask=m_G[:, :, None])


@triton.jit(do_not_specialize=["n_modules", "split_length"])
def add_splits_kernel(
    p_modules,  # (M, 5) int64
    p_P,  # as in project_kernel
    p_Q,
    p_G_B,
    p_G_A,
    n_modules,
    split_length,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slot 0 += slots 1, 2, ... of one adapter's module, in float64 and in order."""
    i_entry = tl.program_id(0).to(tl.int64)
    i_module = i_entry % n_modules
    n_entries = tl.num_programs(0).to(tl.int64)
    b_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for side in tl.static_range(2):
        length, _, _ = side_of(p_modules, i_module, side, 1)
        n_splits = (length.to(tl.int32) + split_length - 1) // split_length
        if n_splits > 1:
            if side == 0:
                _add_slots(p_P, i_entry, n_entries, n_splits, b_i, K * R)
                _add_slots(p_G_B, i_entry, n_entries, n_splits, b_i, R * R)
            else:
                _add_slots(p_Q, i_entry, n_entries, n_splits, b_i, K * R)
                _add_slots(p_G_A, i_entry, n_entries, n_splits, b_i, R * R)


@triton.jit
def _add_slots(p_x, i_entry, n_entries, n_splits, b_i, SIZE: tl.constexpr):
    m_i = b_i < SIZE
    b_sum = tl.load(p_x + i_entry * SIZE + b_i, mask=m_i, other=0.0).to(tl.float64)
    for i_split in range(1, n_splits):
        o_slot = (i_split * n_entries + i_entry) * SIZE
        b_sum += tl.load(p_x + o_slot + b_i, mask=m_i, other=0.0)
    tl.store(p_x + i_entry * SIZE + b_i, b_sum.to(tl.float32), mask=m_i)
