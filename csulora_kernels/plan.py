"""What each program of a launch does, as a table of integers made once on the host.

The order is the order in which programs start: those that read the same tiles are neighbours, so that
what one fetched from DRAM the next finds in L2. Recompose goes through the modules from the last to the
first: what project read last is what is still in L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csulora_kernels.layout import Shape
from csulora_kernels.tiles import Tiles


def project_work(shapes: tuple[Shape, ...], adapters: int, tiles: Tiles) -> Tensor:
    """(programs, 7) int32: side, module, group * strips adapters, block of k, split, d from, d to."""
    rows = []
    for m, shape in enumerate(shapes):
        # One program a group even where k = 0: the Gram matrices are wanted all the same.
        blocks = max(1, -(-shape.k // tiles.project.block_k))
        for side, d in enumerate((shape.d_out, shape.d_in)):
            for split, start in enumerate(range(0, d, tiles.split_length)):
                end = min(start + tiles.split_length, d)
                for group in range(project_groups(adapters, tiles)):
                    rows += [(side, m, group, block, split, start, end) for block in range(blocks)]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 7)


def project_groups(adapters: int, tiles: Tiles) -> int:
    """Programs of project that read the same stretch of a basis, each for other adapters."""
    return -(-adapters // (tiles.group * tiles.strips))


def recompose_work(
    shapes: tuple[Shape, ...], adapters: int, tiles: Tiles, halves: int, sides: tuple[int, ...]
) -> Tensor:
    """(programs, 5) int32: side, module, group of adapters, d from, d to.

    halves: how often the new A has r rows; sides: 0 (B), 1 (A), those that are written.
    """
    rows = []
    for m, shape in enumerate(shapes):
        for side in sides:
            group = recompose_group(tiles, halves if side else 1)
            d, step = shape[side], tiles.recompose_length
            for start in range(0, d, step):
                end = min(start + step, d)
                rows += [(side, m, i, start, end) for i in range(-(-adapters // group))]
    return torch.tensor(rows[::-1], dtype=torch.int32).reshape(-1, 5)


def recompose_group(tiles: Tiles, halves: int) -> int:
    """Adapters of one program of recompose, as `group_of` in _recompose.py has it."""
    return min(tiles.group, max(1, tiles.recompose_rows // (halves * tiles.R)))


def splits(shapes: tuple[Shape, ...], tiles: Tiles) -> int:
    """The largest number of stretches that any side of any module is cut into."""
    return max((-(-max(s.d_out, s.d_in) // tiles.split_length) for s in shapes), default=1)
