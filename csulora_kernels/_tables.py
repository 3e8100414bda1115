"""What kernels read of the tables that say where everything lies: the only place that knows their columns."""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels.plan import ProjectItem, RecomposeItem

PROJECT_FIELDS = tl.constexpr(len(ProjectItem._fields))
RECOMPOSE_FIELDS = tl.constexpr(len(RecomposeItem._fields))
# Columns of `Basis.modules`, of both sides one after the other, and of `Table.entries`.
MODULE_FIELDS = tl.constexpr(5)
LENGTH = tl.constexpr(0)
DIRECTIONS = tl.constexpr(2)
O_BASIS = tl.constexpr(3)
ENTRY_FIELDS = tl.constexpr(3)
RANK = tl.constexpr(0)
O_FACTOR = tl.constexpr(1)


@triton.jit
def project_item(p_work, BLOCK_D: tl.constexpr, VEC_D: tl.constexpr):
    """The `ProjectItem` of this program: its side, and the rest."""
    p = p_work + tl.program_id(0) * PROJECT_FIELDS
    d_from = tl.multiple_of(tl.load(p + 5), BLOCK_D)
    d_to = tl.multiple_of(tl.load(p + 6), VEC_D)
    part = (tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), d_from, d_to)
    return tl.load(p), part


@triton.jit
def recompose_item(p_work, BLOCK_D: tl.constexpr, VEC_D: tl.constexpr):
    """The `RecomposeItem` of this program: its side, whether that is the wide one, and the rest."""
    p = p_work + tl.program_id(0) * RECOMPOSE_FIELDS
    d_from = tl.multiple_of(tl.load(p + 4), BLOCK_D)
    d_to = tl.multiple_of(tl.load(p + 5), VEC_D)
    return tl.load(p), tl.load(p + 1), (tl.load(p + 2), tl.load(p + 3), d_from, d_to)


@triton.jit
def side_of(p_modules, i_module, SIDE: tl.constexpr, VEC_D: tl.constexpr):
    """Length, number of directions and place in the basis of one side (0: B and U, 1: A and V) of a module."""
    p = p_modules + i_module * MODULE_FIELDS
    length = tl.multiple_of(tl.load(p + LENGTH + SIDE), VEC_D)
    k = tl.load(p + DIRECTIONS).to(tl.int32)
    return length, k, tl.multiple_of(tl.load(p + O_BASIS + SIDE), 4)


# Hints are given where a value is loaded, as one on what a function returned is lost. So it is, by Triton 3.9, on a
# load whose mask is always true: where all entries are wanted, m_e is None.


@triton.jit
def rank_of(p_entries, e, m_e, VEC: tl.constexpr, SAME: tl.constexpr):
    """Ranks of the entries e, 0 where they are masked out: multiples of VEC, the same for SAME neighbours."""
    p = p_entries + e * ENTRY_FIELDS + RANK
    if m_e is None:
        r = tl.multiple_of(tl.load(p), VEC)
    else:
        r = tl.multiple_of(tl.load(p, mask=m_e, other=0), VEC)
    if SAME > 1:
        r = tl.max_constancy(r, SAME)
    return r


@triton.jit
def place_of(p_entries, e, m_e, SIDE: tl.constexpr, VEC: tl.constexpr):
    """Places of B or A of the entries e, multiples of VEC."""
    p = p_entries + e * ENTRY_FIELDS + O_FACTOR + SIDE
    if m_e is None:
        place = tl.multiple_of(tl.load(p), VEC)
    else:
        place = tl.multiple_of(tl.load(p, mask=m_e, other=0), VEC)
    return place
