"""What the stages pass to one another, and the memory for it, made once for all tables of a layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora_kernels import plan
from csulora_kernels.launch import Launcher, Turn, interpreted
from csulora_kernels.layout import Basis, Shape, Table
from csulora_kernels.settings import Kind, kind_of
from csulora_kernels.tiles import (
    EXACT_MATRICES,
    MAX_RANK,
    REALIGN_MATRICES,
    SAME_MATRICES,
    Tiles,
    choose,
    fault,
)


class Projection(NamedTuple):
    """P = U^T B, Q = A V and the Gram matrices, float32."""

    P: Tensor  # (N, M, K, R)
    Q: Tensor  # (N, M, R, K)
    G_B: Tensor  # (N, M, R, R)
    G_A: Tensor  # (N, M, R, R)


class Energies(NamedTuple):
    """What is reported of every module of every adapter, float64."""

    energy: Tensor  # (N, M)      ||BA||_F^2
    before: Tensor  # (N, M, 4)   aligned, partial_left, partial_right, off
    after: Tensor  # (N, M, 4)
    relative_change: Tensor  # (N, M)
    rank_error: Tensor  # (N, M)


class Cores(NamedTuple):
    """The reference's cores and energies, and the coefficients that recompose multiplies.

    Padded: Y of `exact` has its second r rows from row R on. Cores are float32, energies float64. The result of
    `exact` has them on the narrow side of each module: B' = B_in X_in + B_out X_out where d_out < d_in, with the
    same four blocks, X_in = [upper half of Y_in, upper half of Y_out] and X_out the lower halves.
    """

    X_in: Tensor | None  # (N, M, R, R), None for exact
    X_out: Tensor | None  # (N, M, R, R), None for exact
    Y_in: Tensor  # (N, M, H R, R), H = 2 for exact and 1 for same
    Y_out: Tensor  # (N, M, H R, R)
    W: Tensor | None  # (N, M, K, R): P (X_in - X_out), None for exact
    Z: Tensor  # (N, M, K, H R): ((Y_in - Y_out) Q)^T, or of `exact` P (X_in - X_out) where B is the narrow side
    energy: Tensor  # these five as in `Energies`
    before: Tensor
    after: Tensor
    relative_change: Tensor
    rank_error: Tensor


class Shift(NamedTuple):
    """What realignment adds: A' = A + Z^T V^T; for exact also V^T below it, and U c beside B."""

    Z: Tensor  # (N, M, K, R) float32
    c: Tensor | None  # (N, M, K) float32, None for same
    inverse_diagonal: (
        Tensor  # (N, M, R) float64, of G_B^-1; inf: float32 cannot tell columns of B apart
    )
    energy: Tensor  # these five as in `Energies`
    before: Tensor
    after: Tensor
    relative_change: Tensor
    rank_error: Tensor


class Spectrum(NamedTuple):
    """What realignment knows of the displacement D besides its directions, float64 on the device."""

    S: Tensor  # (M, K) singular values, zero beyond a module's k
    edge: Tensor  # (M) noise edge
    scaling: Tensor  # (N, M) s of the update s B A


@dataclass(frozen=True, eq=False)
class Workspace:
    """Buffers and work lists for one table, basis and kind of result; for one user after the other."""

    tiles: Tiles
    kind: Kind
    shapes: tuple[Shape, ...]
    modules: Tensor  # of the basis
    project_work: Tensor  # a `plan.ProjectItem` a program
    recompose_work: Tensor  # a `plan.RecomposeItem` a program
    splits: int
    partial: Projection  # with a leading dimension of `splits`
    projection: Projection  # its first slot
    found: Cores | Shift
    scratch: Tensor  # (programs, doubles of one program) float64
    # By what a launch depends on besides: types and vectors of tables, and choices of the settings.
    launchers: dict[Any, Launcher] = field(default_factory=dict)
    turn: Turn = field(default_factory=lambda: Turn("the workspace"))

    def __repr__(self) -> str:
        tiles, (method, form) = self.tiles, self.kind
        return f"Workspace({method} {form}, {len(self.shapes)} modules, R {tiles.R}, K {tiles.K})"


def workspace(
    table: Table,
    basis: Basis,
    settings: Any,
    tiles: Tiles | None = None,
    *,
    steady: bool = False,
) -> Workspace:
    """All memory that `correct` needs for tables of this layout besides `out`.

    tiles: if not given, chosen for speed, or with `steady` so that what else is in a table changes no bit of
    an adapter's result, where its R, K, `vec_r` and `vec_d` are the same.

    Raises ValueError for a rank above 128, tiles that do not fit together, or both tiles and `steady`, and
    RuntimeError where the kernels cannot run.
    """
    if tiles is not None and steady:
        raise ValueError("tiles are given, or chosen to be steady, not both")
    check_table(table, basis)
    reason = unavailable(table.data.device)
    if reason is not None:
        raise RuntimeError(reason)
    kind = kind_of(settings)
    device = table.data.device
    N, M = len(table.slots), len(table.shapes)
    capability, processors = hardware(device)
    if tiles is None:
        given = table.shapes, N, table.max_rank, table.data.dtype, capability, processors
        tiles = choose(*given, steady=steady)
    if tiles.R > MAX_RANK:
        raise ValueError(f"rank {table.max_rank}: a workspace is for ranks up to {MAX_RANK}")
    wrong = fault(tiles, capability)
    if wrong is not None:
        raise ValueError(f"tiles: {wrong}")
    splits = plan.splits(table.shapes, tiles)
    partial = _projection_buffers((splits, N, M), tiles.K, tiles.R, device)
    return Workspace(
        tiles,
        kind,
        table.shapes,
        basis.modules,
        plan.project_work(table.shapes, N, tiles).to(device),
        plan.recompose_work(table.shapes, N, tiles, kind).to(device),
        splits,
        partial,
        Projection(*(X[0] for X in partial)),
        _found_buffers(N, M, tiles.K, tiles.R, kind, device),
        _scratch(tiles, kind, device),
    )


def check_table(table: Table, basis: Basis) -> None:
    if table.shapes != basis.shapes:
        raise ValueError("the table was packed for another basis: the module shapes differ")
    if table.data.device != basis.data.device:
        raise ValueError(f"table on {table.data.device}, basis on {basis.data.device}")


def check_workspace(table: Table, ws: Workspace) -> None:
    size = len(table.slots), len(table.shapes)
    if ws.shapes != table.shapes or ws.found.energy.shape != size or table.max_rank > ws.tiles.R:
        raise ValueError("the workspace was made for a table of another layout")


@cache
def hardware(device: torch.device) -> tuple[int, int]:
    """(compute capability as 80, 90, ..., number of processors); the interpreter counts as one."""
    if device.type != "cuda":
        return 80, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on that device, or None where they can."""
    try:
        from csulora_kernels._solve import solve_kernel
    except ImportError:
        return "the package triton is not installed"
    if device.type != "cuda" and not interpreted(solve_kernel):
        return (
            f"Triton needs a CUDA device, not {device}; on the CPU it runs under its interpreter, "
            "with TRITON_INTERPRET=1 in the environment, for tests"
        )
    return None


def _projection_buffers(lead: tuple[int, ...], K: int, R: int, device: torch.device) -> Projection:
    # Zero once: where a module has fewer directions than K no program ever writes.
    return Projection(
        torch.zeros(*lead, K, R, device=device),
        torch.zeros(*lead, R, K, device=device),
        torch.zeros(*lead, R, R, device=device),
        torch.zeros(*lead, R, R, device=device),
    )


def _found_buffers(
    N: int, M: int, K: int, R: int, kind: Kind, device: torch.device
) -> Cores | Shift:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(N, M, *shape, dtype=dtype, device=device)

    f64 = torch.float64
    energies = Energies(
        new(dtype=f64), new(4, dtype=f64), new(4, dtype=f64), new(dtype=f64), new(dtype=f64)
    )
    same, H = kind.form == "same", kind.halves
    if kind.method == "realign":
        return Shift(new(K, R), None if same else new(K), new(R, dtype=f64), *energies)
    return Cores(
        new(R, R) if same else None,
        new(R, R) if same else None,
        new(H * R, R),
        new(H * R, R),
        new(K, R) if same else None,
        new(K, H * R),
        *energies,
    )


def _scratch(tiles: Tiles, kind: Kind, device: torch.device) -> Tensor:
    R, K = tiles.R, tiles.K
    size = (SAME_MATRICES if kind.form == "same" else EXACT_MATRICES) * R * R
    if kind.method == "realign":
        size = REALIGN_MATRICES * R * R + 2 * K * R + 2 * K
    return torch.empty(tiles.solve.programs, size, dtype=torch.float64, device=device)
