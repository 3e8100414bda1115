"""First stage: P = U^T B, Q = A V and the Gram matrices, for all modules, adapters and both sides.

One streaming launch reads every factor once. A program takes one stretch of d of one side of one
module and up to GROUP adapters: their columns share each basis tile. Adapters of a module are
neighbours in the work list, so the basis comes from DRAM once and from L2 for the others.

A stretch of d gives a partial sum in its own slot; slot 0 is the result, and where a module has more
than one stretch a second, small launch adds the others to it in a fixed order. No atomics, so the
same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._dots import basis_product, gram_product


@triton.jit(do_not_specialize=["n_adapters", "n_modules"])
def project_kernel(
    p_data,  # flat factors
    p_basis,  # flat float32
    p_entries,  # (N, M, 3) int64: r, o_B, o_A
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_work,  # (programs, 7) int32: side, module, group, block of k, split, d from, d to
    p_P,  # (splits, N, M, K, R) float32
    p_Q,  # (splits, N, M, R, K)
    p_G_B,  # (splits, N, M, R, R)
    p_G_A,
    n_adapters,
    n_modules,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    EMULATE: tl.constexpr,
):
    p_item = p_work + tl.program_id(0) * 7
    i_module = tl.load(p_item + 1)
    i_group = tl.load(p_item + 2)
    i_block = tl.load(p_item + 3)
    i_split = tl.load(p_item + 4)
    d_from = tl.multiple_of(tl.load(p_item + 5), BLOCK_D)
    d_to = tl.multiple_of(tl.load(p_item + 6), VEC_D)
    # fmt: off
    if tl.load(p_item) == 0:
        _project_side(
            p_data, p_basis, p_entries, p_modules, p_P, p_G_B, n_adapters, n_modules,
            i_module, i_group, i_block, i_split, d_from, d_to,
            0, K, R, GROUP, BLOCK_K, BLOCK_D, VEC_R, VEC_D, EMULATE,
        )
    else:
        _project_side(
            p_data, p_basis, p_entries, p_modules, p_Q, p_G_A, n_adapters, n_modules,
            i_module, i_group, i_block, i_split, d_from, d_to,
            1, K, R, GROUP, BLOCK_K, BLOCK_D, VEC_R, VEC_D, EMULATE,
        )
    # fmt: on


@triton.jit
def _project_side(
    p_data,
    p_basis,
    p_entries,
    p_modules,
    p_coordinates,
    p_G,
    n_adapters,
    n_modules,
    i_module,
    i_group,
    i_block,
    i_split,
    d_from,
    d_to,
    SIDE: tl.constexpr,  # 0: B and U, 1: A and V
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_R: tl.constexpr,
    VEC_D: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One stretch of d: C = GROUP R columns of B (or rows of A) against BLOCK_K directions."""
    C: tl.constexpr = GROUP * R
    length = tl.multiple_of(tl.load(p_modules + i_module * 5 + SIDE), VEC_D)
    k = tl.load(p_modules + i_module * 5 + 2).to(tl.int32)
    o_basis = tl.multiple_of(tl.load(p_modules + i_module * 5 + 3 + SIDE), 4)

    b_c = tl.arange(0, C)
    i_row = b_c % R
    i_adapter = i_group * GROUP + b_c // R
    m_adapter = i_adapter < n_adapters
    i_entry = (i_adapter * n_modules + i_module).to(tl.int64)
    r = tl.load(p_entries + i_entry * 3, mask=m_adapter, other=0)
    o_factor = tl.load(p_entries + i_entry * 3 + 1 + SIDE, mask=m_adapter, other=0)
    m_c = i_row < r
    if SIDE == 0:
        # Constant over one adapter's R columns, and contiguous within them.
        r = tl.max_constancy(tl.multiple_of(r, VEC_R), R)
        m_c = tl.max_constancy(m_c, VEC_R)
        o_c = tl.max_contiguous(tl.multiple_of(o_factor + i_row, VEC_R), VEC_R)
    else:
        o_c = tl.multiple_of(o_factor + i_row * length, VEC_D)
    b_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = b_k < k
    o_k = o_basis + b_k.to(tl.int64) * length

    b_coordinates = tl.zeros([BLOCK_K, C], tl.float32)
    b_G = tl.zeros([C, C], tl.float32)
    for d in range(d_from, d_to, BLOCK_D):
        b_d = d + tl.arange(0, BLOCK_D)
        m_d = tl.max_constancy(b_d < d_to, VEC_D)
        b_w = tl.load(
            p_basis + (o_k[:, None] + b_d[None, :]), mask=m_k[:, None] & m_d[None, :], other=0.0
        )
        if SIDE == 0:
            b_x = tl.load(
                p_data + (o_c[None, :] + b_d[:, None].to(tl.int64) * r[None, :]),
                mask=m_d[:, None] & m_c[None, :],
                other=0.0,
            )
        else:
            b_xt = tl.load(
                p_data + (o_c[:, None] + b_d[None, :]),
                mask=m_c[:, None] & m_d[None, :],
                other=0.0,
            )
            b_x = tl.trans(b_xt)
        b_coordinates += basis_product(b_w, b_x, EMULATE)
        b_G += gram_product(b_x, EMULATE)

    i_slot = i_split.to(tl.int64) * n_adapters * n_modules + i_entry
    if SIDE == 0:
        o_out = (i_slot[None, :] * K + b_k[:, None]) * R + i_row[None, :]
    else:
        o_out = (i_slot[None, :] * R + i_row[None, :]) * K + b_k[:, None]
    tl.store(p_coordinates + o_out, b_coordinates, mask=m_adapter[None, :] & (b_k < K)[:, None])
    # Products of two different adapters are by-products; and one block of directions is enough, which is
    # said of each row: where a single truth value is spread, Triton's interpreter makes an integer of it.
    m_first = tl.zeros([C], tl.int32) + i_block == 0
    m_G = (i_adapter[:, None] == i_adapter[None, :]) & (m_adapter & m_first)[:, None]
    tl.store(p_G + (i_slot[:, None] * R + i_row[:, None]) * R + i_row[None, :], b_G, mask=m_G)


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
        length = tl.load(p_modules + i_module * 5 + side).to(tl.int32)
        n_splits = (length + split_length - 1) // split_length
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
