"""What each program of a launch does, as a table of integers made once on the host.

The order is the order in which programs start: those that read the same tiles are neighbours, so that
what one fetched from DRAM the next finds in L2. Recompose goes through the modules from the last to the
first: what project read last is what is still in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csulora_kernels.layout import Shape
from csulora_kernels.settings import Kind
from csulora_kernels.tiles import Tiles

# What both sides of a result are made of, as _recompose.py says; of EXACT the wide one is PARTS, the other CORES.
PARTS, CORES, SHIFTED, EXTENDED, EXACT = range(5)


class ProjectItem(NamedTuple):
    """One program of project."""

    side: int  # 0: B and U, 1: A and V
    module: int
    group: int  # of `group * strips` adapters
    block: int  # of `block_k` directions
    split: int  # which stretch of the side
    d_from: int
    d_to: int


class RecomposeItem(NamedTuple):
    """One program of recompose."""

    side: int  # 0: B, 1: A
    wide: int  # whether it is the side that `exact` writes without cores
    module: int
    group: int  # of `recompose_group` adapters
    d_from: int
    d_to: int


def project_work(shapes: tuple[Shape, ...], adapters: int, tiles: Tiles) -> Tensor:
    """(programs, fields of a ProjectItem) int32."""
    rows = []
    for m, shape in enumerate(shapes):
        # One program a group even where k = 0: the Gram matrices are wanted all the same.
        blocks = max(1, -(-shape.k // tiles.project.block_k))
        for side, d in enumerate((shape.d_out, shape.d_in)):
            for split, start in enumerate(range(0, d, tiles.project.split_length)):
                end = min(start + tiles.project.split_length, d)
                rows += [
                    ProjectItem(side, m, group, block, split, start, end)
                    for group in range(project_groups(adapters, tiles))
                    for block in range(blocks)
                ]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, len(ProjectItem._fields))


def project_groups(adapters: int, tiles: Tiles) -> int:
    """Programs of project that read the same stretch of a basis, each for other adapters."""
    return -(-adapters // (tiles.group * tiles.project.strips))


def recompose_work(shapes: tuple[Shape, ...], adapters: int, tiles: Tiles, kind: Kind) -> Tensor:
    """(programs, fields of a RecomposeItem) int32."""
    rows = []
    for m, shape in enumerate(shapes):
        for side in kind.sides:
            wide = int(kind.splits_off and side == shape.wide_side)
            group = recompose_group(tiles, kind, wide)
            d, step = shape[side], tiles.recompose.length
            for start in range(0, d, step):
                end = min(start + step, d)
                rows += [
                    RecomposeItem(side, wide, m, i, start, end)
                    for i in range(-(-adapters // group))
                ]
    return torch.tensor(rows[::-1], dtype=torch.int32).reshape(-1, len(RecomposeItem._fields))


def recompose_group(tiles: Tiles, kind: Kind, wide: int) -> int:
    """Adapters of one program of recompose."""
    return recompose_strips(tiles, kind) * strip_group(tiles, kind, wide)


def strip_group(tiles: Tiles, kind: Kind, wide: int) -> int:
    """Adapters of one of its strips, as `group_of` in _strip.py has it."""
    rows = product_rows(tiles, kind, wide)
    return min(tiles.group, max(1, tiles.recompose.rows // rows))


def product_rows(tiles: Tiles, kind: Kind, wide: int) -> int:
    """Rows of one adapter in the products of recompose."""
    return tiles.R if wide else kind.halves * tiles.R


def recompose_strips(tiles: Tiles, kind: Kind) -> int:
    """Cores as wide as `same` has them leave no shared memory for those of a second strip."""
    return 1 if kind == ("csulora", "same") else tiles.recompose.strips


def splits(shapes: tuple[Shape, ...], tiles: Tiles) -> int:
    """The largest number of stretches that any side of any module is cut into."""
    return max((-(-max(s.d_out, s.d_in) // tiles.project.split_length) for s in shapes), default=1)
