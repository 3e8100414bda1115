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
    """(programs, 7) int32: side, module, group of adapters, block of k, split, d from, d to."""
    rows = []
    for m, shape in enumerate(shapes):
        # One program a group even where k = 0: the Gram matrices are wanted all the same.
        blocks = max(1, -(-shape.k // tiles.project.block_k))
        for side, d in enumerate((shape.d_out, shape.d_in)):
            for split, start in enumerate(range(0, d, tiles.split_length)):
                end = min(start + tiles.split_length, d)
                for group in range(-(-adapters // tiles.group)):
                    rows += [(side, m, group, block, split, start, end) for block in range(blocks)]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 7)


def recompose_work(shapes: tuple[Shape, ...], adapters: int, tiles: Tiles) -> Tensor:
    """(programs, 5) int32: side, module, d from, adapter from, adapter to."""
    step = tiles.recompose_adapters
    rows = [
        (side, m, start, first, min(first + step, adapters))
        for m, shape in enumerate(shapes)
        for side, d in enumerate((shape.d_out, shape.d_in))
        for start in range(0, d, tiles.recompose.block_d)
        for first in range(0, adapters, step)
    ]
    return torch.tensor(rows[::-1], dtype=torch.int32).reshape(-1, 5)


def splits(shapes: tuple[Shape, ...], tiles: Tiles) -> int:
    """The largest number of stretches that any side of any module is cut into."""
    return max((-(-max(s.d_out, s.d_in) // tiles.split_length) for s in shapes), default=1)
