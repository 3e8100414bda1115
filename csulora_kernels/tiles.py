"""Tile sizes as a pure function of shapes, type and architecture. No Triton, nothing measured at run time.

`choose` is the only place that knows an architecture; every launcher takes what it returns, and a test
may give any other `Tiles`. bench/tune.py is the tool to revise it with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from csulora_kernels.layout import Shape

DIRECTIONS = 64  # K is a multiple of it
REGISTERS = 65536  # of a processor
MAX_RANK = 128  # beyond it the caller takes the stages in PyTorch
# R x R float64 scratch matrices of one program of solve, by form, and of realign, which has two K x R ones and two
# vectors of K besides.
EXACT_MATRICES = 15
SAME_MATRICES = 27
REALIGN_MATRICES = 7


@dataclass(frozen=True)
class Launch:
    """Shape of one kernel's programs."""

    block_d: int
    block_k: int  # directions at a time
    warps: int
    stages: int
    registers: int | None = None  # a thread's limit, where the compiler's own choice spills


@dataclass(frozen=True)
class Tiles:
    """Everything about a launch that is not data."""

    R: int  # ranks padded to a power of two
    K: int  # directions padded to a multiple of DIRECTIONS
    group: int  # most adapters in one strip of columns
    strips: int  # of `group` adapters in one program of project, 1 or 2
    project: Launch
    split_length: int  # d of one program in project, a multiple of its block_d
    solve_tile: int
    solve_warps: int
    solve_registers: int  # a thread's limit
    solve_programs: int
    recompose: Launch
    recompose_strips: int  # of up to `group` adapters in one program of recompose, 1 or 2
    recompose_rows: int  # of a new factor at a time, those of a B counted as columns
    recompose_length: int  # d of one program in recompose, a multiple of its block_d


def fault(tiles: Tiles, capability: int) -> str | None:
    """Why these tiles would give wrong results or read what they may not, or None."""
    if tiles.split_length % tiles.project.block_d:
        return (
            f"split_length {tiles.split_length} is no multiple of block_d {tiles.project.block_d}"
        )
    if tiles.K % tiles.project.block_k or tiles.K % tiles.recompose.block_k:
        return f"K {tiles.K} is no multiple of every block_k"
    if tiles.R % tiles.solve_tile:
        return f"R {tiles.R} is no multiple of solve_tile {tiles.solve_tile}"
    if tiles.recompose_length % tiles.recompose.block_d:
        return f"recompose_length {tiles.recompose_length} is no multiple of block_d {tiles.recompose.block_d}"
    # Triton (3.6.0 and 3.7.1 both) gives a product that feeds another one 16 rows to each warp, below those
    # of the warp before, though the tile may have no rows left; a left operand in shared memory, as a bfloat16
    # factor is, is then read past its end.
    rows, warps = tiles.recompose_rows, tiles.recompose.warps
    if capability >= 90 and rows >= 64 and rows % (16 * warps):
        return f"{warps} warps have no 16 rows each in recompose's {rows} rows"
    return None


def padded_rank(max_rank: int) -> int:
    """R for ranks up to max_rank."""
    return max(16, 1 << (max_rank - 1).bit_length()) if max_rank > 0 else 16


def padded_directions(k_max: int) -> int:
    """K for up to k_max directions."""
    return max(DIRECTIONS, -(-k_max // DIRECTIONS) * DIRECTIONS)


def choose(
    shapes: tuple[Shape, ...],
    adapters: int,
    max_rank: int,
    dtype: torch.dtype,
    capability: int,
    processors: int,
    *,
    steady: bool = False,
) -> Tiles:
    """Tiles for `adapters` adapters of rank up to max_rank on modules of these shapes.

    capability: 80, 90, 100, ...; processors: the number of streaming multiprocessors. steady: no product has
    more than one adapter in it, and the order of every sum goes by R, K, dtype and capability alone.
    """
    R = padded_rank(max_rank)
    K = padded_directions(max((s.k for s in shapes), default=0))
    # Two products with a Gram matrix of all columns: 64 columns waste little and fill the units.
    group = max(1, 64 // R) if adapters > 1 and not steady else 1
    # Two strips of such columns share what a basis tile costs: its bytes through L2 and its splitting.
    strips = 2 if R == 16 and adapters > group > 1 and dtype != torch.float32 else 1
    project, recompose = launches(R, group, K, dtype, capability)
    # Long stretches mean few partial sums, but the chip needs several programs a processor.
    blocks = K // project.block_k
    groups = -(-adapters // (group * strips)) * blocks
    lengths = [d for s in shapes for d in (s.d_out, s.d_in)]
    split_length, enough = 16384, 0 if steady else 8 * processors
    while split_length > 512 and groups * sum(-(-d // split_length) for d in lengths) < enough:
        split_length //= 2
    # So do two strips of recompose, where a program holds the coefficients of each.
    recompose_rows = max(R, 32 if dtype == torch.float32 and capability < 90 else 64)
    held = dtype != torch.float32 and recompose.block_k == K and recompose_rows >= 2 * R
    recompose_strips = 2 if held and adapters > group > 1 else 1
    groups = -(-adapters // (group * recompose_strips)) * blocks
    recompose_length = 4096
    while recompose_length > 512 and groups * sum(-(-d // recompose_length) for d in lengths) < (
        16 * processors
    ):
        recompose_length //= 2
    # From sm_100 on float64 products run outside the tensor cores and take more registers.
    solve_tile = min(R, 32 if capability < 100 else 16)
    solve_warps = {16: 1, 32: 4}.get(R, 8) if capability < 100 else (2 if R <= 32 else 8)
    # A thread's limit, at which nothing spills inside of a loop with a product; more programs a processor hide
    # more of the pivots' latency than the few spills around the calls cost.
    registers = {32: 168}.get(R, 128) if capability < 100 else (255 if R <= 32 else 232)
    per_processor = REGISTERS // (32 * solve_warps * registers)
    return Tiles(
        R=R,
        K=K,
        group=group,
        strips=strips,
        project=project,
        split_length=split_length,
        solve_tile=solve_tile,
        solve_warps=solve_warps,
        solve_registers=registers,
        solve_programs=max(1, min(adapters * len(shapes), processors * per_processor)),
        recompose=recompose,
        recompose_strips=recompose_strips,
        recompose_rows=recompose_rows,
        recompose_length=recompose_length,
    )


@lru_cache
def launches(
    R: int, group: int, K: int, dtype: torch.dtype, capability: int
) -> tuple[Launch, Launch]:
    """(project, recompose): the largest tiles that the compiler fits into registers."""
    wide = dtype == torch.float32
    # 16 columns alone need a longer tile, for each thread to load 16 bytes of it.
    block_d = (16 if wide else 32) * (2 if R * group == 16 else 1)
    project = Launch(block_d, block_k=64, warps=8 if R == 128 else 4, stages=3)
    if wide and R == 128 and capability >= 100:
        project = Launch(block_d=32, block_k=32, warps=8, stages=3)
    elif wide and R == 128 and capability < 90:
        # No tile of this one is free of spills: the Gram matrix alone fills the registers.
        project = Launch(block_d=16, block_k=64, warps=8, stages=1)
    # Of several adapters the coefficients take the shared memory that a third stage would.
    recompose = Launch(
        block_d=64 if capability >= 90 else 32,
        block_k=32 if wide and capability < 90 else 64,
        warps=8 if R == 128 else 4,
        stages=2 if group > 1 else 3,
        registers=255 if capability < 90 else None,  # left alone the compiler takes 128 and spills
    )
    return project, recompose
