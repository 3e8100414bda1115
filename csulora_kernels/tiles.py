"""Tile sizes as a pure function of shapes, type and architecture. No Triton, nothing measured at run time.

`choose` is the only place that knows an architecture; every launcher takes what it returns, and a test
may give any other `Tiles`. bench/tune.py is the tool to revise it with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
class ProjectLaunch:
    """Programs of project; `group` adapters are in one strip of columns."""

    block_d: int
    block_k: int  # directions at a time
    strips: int  # of a program, 1 or 2
    split_length: int  # d of a program, a multiple of block_d
    warps: int
    stages: int


@dataclass(frozen=True)
class SolveLaunch:
    """Programs of solve and of realign."""

    tile: int
    programs: int
    warps: int
    registers: int  # a thread's limit


@dataclass(frozen=True)
class RecomposeLaunch:
    """Programs of recompose."""

    block_d: int
    block_k: int
    rows: int  # of a new factor at a time, those of a B counted as columns
    strips: int  # of up to `group` adapters, 1 or 2
    length: int  # d of a program, a multiple of block_d
    warps: int
    stages: int
    registers: int | None  # a thread's limit, where the compiler's own choice spills


@dataclass(frozen=True)
class Tiles:
    """Everything about the launches that is not data."""

    R: int  # ranks padded to a power of two
    K: int  # directions padded to a multiple of DIRECTIONS
    group: int  # most adapters in one strip of columns
    project: ProjectLaunch
    solve: SolveLaunch
    recompose: RecomposeLaunch


def fault(tiles: Tiles, capability: int) -> str | None:
    """Why these tiles would give wrong results or read what they may not, or None."""
    project, recompose = tiles.project, tiles.recompose
    for name, d, block_d in (
        ("project.split_length", project.split_length, project.block_d),
        ("recompose.length", recompose.length, recompose.block_d),
    ):
        if d % block_d:
            return f"{name} {d} is no multiple of block_d {block_d}"
    if tiles.K % project.block_k or tiles.K % recompose.block_k:
        return f"K {tiles.K} is no multiple of every block_k"
    if tiles.R % tiles.solve.tile:
        return f"R {tiles.R} is no multiple of solve.tile {tiles.solve.tile}"
    # Triton (3.6.0 and 3.7.1 both) gives a product that feeds another one 16 rows to each warp, below those
    # of the warp before, though the tile may have no rows left; a left operand in shared memory, as a bfloat16
    # factor is, is then read past its end.
    rows, warps = recompose.rows, recompose.warps
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
    lengths = [d for s in shapes for d in (s.d_out, s.d_in)]
    project = _project(R, group, dtype, capability)
    recompose = _recompose(R, group, dtype, capability)
    if adapters > group > 1:
        # Two strips of such columns share what a basis tile costs: its bytes through L2 and its splitting.
        if R == 16 and dtype != torch.float32:
            project = replace(project, strips=2)
        # Of recompose where a program holds the coefficients of each.
        held = recompose.block_k == K and recompose.rows >= 2 * R
        if held and dtype != torch.float32:
            recompose = replace(recompose, strips=2)

    blocks = K // project.block_k

    # Long stretches mean few partial sums, but the chip needs several programs a processor.
    def stretch(longest: int, strips: int, enough: int) -> int:
        groups = -(-adapters // (group * strips)) * blocks
        while longest > 512 and groups * sum(-(-d // longest) for d in lengths) < enough:
            longest //= 2
        return longest

    enough = 0 if steady else 8 * processors
    return Tiles(
        R,
        K,
        group,
        replace(project, split_length=stretch(project.split_length, project.strips, enough)),
        _solve(R, adapters * len(shapes), capability, processors),
        replace(recompose, length=stretch(recompose.length, recompose.strips, 16 * processors)),
    )


# The largest tiles that the compiler fits into registers, for one strip and the longest stretches.


def _project(R: int, group: int, dtype: torch.dtype, capability: int) -> ProjectLaunch:
    wide = dtype == torch.float32
    # 16 columns alone need a longer tile, for each thread to load 16 bytes of it.
    block_d = (16 if wide else 32) * (2 if R * group == 16 else 1)
    launch = ProjectLaunch(block_d, 64, 1, 16384, warps=8 if R == 128 else 4, stages=3)
    if wide and R == 128 and capability >= 100:
        return replace(launch, block_d=32, block_k=32)
    if wide and R == 128 and capability < 90:
        # No tile of this one is free of spills: the Gram matrix alone fills the registers.
        return replace(launch, stages=1)
    return launch


def _solve(R: int, entries: int, capability: int, processors: int) -> SolveLaunch:
    # A thread's limit, at which nothing spills inside of a loop with a product; more programs a processor hide
    # more of the pivots' latency than the few spills around the calls cost.
    if capability < 100:
        tile, warps, registers = min(R, 32), {16: 1, 32: 4}.get(R, 8), {32: 168}.get(R, 128)
    else:  # where float64 products run outside the tensor cores and take more registers
        tile, warps, registers = min(R, 16), 2 if R <= 32 else 8, 255 if R <= 32 else 232
    per_processor = REGISTERS // (32 * warps * registers)
    return SolveLaunch(tile, max(1, min(entries, processors * per_processor)), warps, registers)


def _recompose(R: int, group: int, dtype: torch.dtype, capability: int) -> RecomposeLaunch:
    old, wide = capability < 90, dtype == torch.float32
    block_d = 32 if old or wide else 64
    if old and R * group == 16 and not wide:
        block_d = 64  # as in project: each thread is to load 16 bytes of a factor
    if R == 128 and (old or wide):
        block_d = 16
    return RecomposeLaunch(
        block_d,
        block_k=32 if wide and old else 64,
        rows=max(R, 32 if wide and old else 64),
        strips=1,
        length=4096,
        warps=8 if R == 128 else 4,
        # Of several adapters the coefficients take the shared memory that a third stage would.
        stages=2 if group > 1 else 3,
        registers=255 if old else None,  # left alone the compiler takes 128 and spills
    )
