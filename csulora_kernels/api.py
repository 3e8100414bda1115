"""The stages as functions of packed tensors, and `correct`, which runs all three.

Shapes: N adapters, M modules, K and R the padded number of directions and rank (tiles.py); whatever
lies beyond a module's own k and r is zero, or an identity's diagonal. Everything runs on the current
stream without host synchronisation; with `out` and `workspace` given nothing is allocated, so a call
can be captured in a CUDA graph. The strengths are arguments of the launch: a graph keeps those it was
captured with.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora_kernels import plan
from csulora_kernels.layout import FORMS, GRANULARITIES, Basis, Shape, Table, empty_like
from csulora_kernels.tiles import MAX_RANK, SOLVE_MATRICES, Tiles, choose, fault


class Projection(NamedTuple):
    """P = U^T B, Q = A V and the Gram matrices, float32."""

    P: Tensor  # (N, M, K, R)
    Q: Tensor  # (N, M, R, K)
    G_B: Tensor  # (N, M, R, R)
    G_A: Tensor  # (N, M, R, R)


class Cores(NamedTuple):
    """The reference's cores and energies, and the coefficients that recompose multiplies.

    Padded: Y of `exact` has its second r rows from row R on. Cores are float32, energies float64.
    """

    X_in: Tensor | None  # (N, M, R, R), None for exact
    X_out: Tensor | None  # (N, M, R, R), None for exact
    Y_in: Tensor  # (N, M, H R, R), H = 2 for exact and 1 for same
    Y_out: Tensor  # (N, M, H R, R)
    energy: Tensor  # (N, M)      ||BA||_F^2
    before: Tensor  # (N, M, 4)   aligned, partial_left, partial_right, off
    after: Tensor  # (N, M, 4)
    relative_change: Tensor  # (N, M)
    rank_error: Tensor  # (N, M)
    W: Tensor | None  # (N, M, K, R): P (X_in - X_out), None for exact
    Z: Tensor  # (N, M, K, H R): ((Y_in - Y_out) Q)^T


class Result(NamedTuple):
    """The corrected factors and everything that is known about them."""

    table: Table
    projection: Projection
    cores: Cores


@dataclass(frozen=True, eq=False)
class Workspace:
    """Buffers and work lists for one table, basis and form of the result; reusable, not shareable."""

    tiles: Tiles
    same: bool
    shapes: tuple[Shape, ...]
    project_work: Tensor  # (programs, 7) int32
    recompose_work: Tensor  # (programs, 5) int32
    splits: int
    partial: Projection  # with a leading dimension of `splits`
    cores: Cores
    scratch: Tensor  # (programs, matrices, R, R) float64

    def __repr__(self) -> str:
        form = "same" if self.same else "exact"
        return f"Workspace(form {form}, {len(self.shapes)} modules, R {self.tiles.R}, K {self.tiles.K})"


def workspace(table: Table, basis: Basis, penalties: Any, tiles: Tiles | None = None) -> Workspace:
    """All memory that `correct` needs for tables of this layout besides `out`.

    Raises ValueError for a rank above 128 or tiles that do not fit together, and RuntimeError where the
    kernels cannot run.
    """
    _check(table, basis)
    reason = unavailable(table.data.device)
    if reason is not None:
        raise RuntimeError(reason)
    same = _is_same(penalties)
    device = table.data.device
    N, M = len(table.slots), len(table.shapes)
    capability, processors = hardware(device)
    if tiles is None:
        tiles = choose(table.shapes, N, table.max_rank, table.data.dtype, capability, processors)
    if tiles.R > MAX_RANK:
        raise ValueError(f"rank {table.max_rank}: a workspace is for ranks up to {MAX_RANK}")
    wrong = fault(tiles, capability)
    if wrong is not None:
        raise ValueError(f"tiles: {wrong}")
    splits = plan.splits(table.shapes, tiles)
    return Workspace(
        tiles,
        same,
        table.shapes,
        plan.project_work(table.shapes, N, tiles).to(device),
        plan.recompose_work(table.shapes, N, tiles).to(device),
        splits,
        _projection_buffers((splits, N, M), tiles.K, tiles.R, device),
        _core_buffers(N, M, tiles.K, tiles.R, same, device),
        _scratch(tiles.solve_programs, tiles.R, device),
    )


def project(table: Table, basis: Basis, *, workspace: Workspace) -> Projection:
    """P, Q and the Gram matrices of every module of every adapter. One launch, and one that adds
    partial sums where a side was cut."""
    from csulora_kernels._project import add_splits_kernel, project_kernel

    ws, tiles = workspace, workspace.tiles
    _check(table, basis)
    _check_workspace(table, ws)
    result = Projection(*(X[0] for X in ws.partial))
    N, M = len(table.slots), len(table.shapes)
    if ws.project_work.shape[0] == 0:
        return result
    with on_device(table.data):
        project_kernel[(ws.project_work.shape[0],)](
            table.data,
            basis.data,
            table.entries,
            basis.modules,
            ws.project_work,
            *ws.partial,
            N,
            M,
            K=tiles.K,
            R=tiles.R,
            GROUP=tiles.group,
            BLOCK_K=tiles.project.block_k,
            BLOCK_D=tiles.project.block_d,
            VEC_R=table.vec_r,
            VEC_D=table.vec_d,
            EMULATE=_interpreted(project_kernel),
            num_warps=tiles.project.warps,
            num_stages=tiles.project.stages,
            maxnreg=tiles.project.registers,
        )
        if ws.splits > 1:
            block = 1024
            grid = (N * M, -(-tiles.R * max(tiles.K, tiles.R) // block))
            add_splits_kernel[grid](
                basis.modules,
                *ws.partial,
                M,
                tiles.split_length,
                K=tiles.K,
                R=tiles.R,
                BLOCK=block,
            )
    return result


def solve(projection: Projection, penalties: Any, *, workspace: Workspace) -> Cores:
    """The cores of the corrected updates and their energies. One launch."""
    from csulora_kernels._solve import solve_kernel

    ws, tiles = workspace, workspace.tiles
    if _is_same(penalties) != ws.same:
        raise ValueError(f"the workspace was made for form={'same' if ws.same else 'exact'}")
    c = ws.cores
    n_entries = c.energy.numel()
    if n_entries == 0:
        return c
    with on_device(projection.P):
        solve_kernel[(ws.scratch.shape[0],)](
            *projection,
            c.X_in if c.X_in is not None else c.Y_in,
            c.X_out if c.X_out is not None else c.Y_in,
            c.Y_in,
            c.Y_out,
            c.W if c.W is not None else c.Y_in,
            c.Z,
            c.energy,
            c.before,
            c.after,
            c.relative_change,
            c.rank_error,
            ws.scratch,
            n_entries,
            float(penalties.lambda_aligned),
            float(penalties.lambda_left),
            float(penalties.lambda_right),
            float(penalties.lambda_off),
            K=tiles.K,
            R=tiles.R,
            T=tiles.solve_tile,
            GRANULARITY=penalties.granularity,
            SAME=ws.same,
            num_warps=tiles.solve_warps,
            num_stages=1,
            maxnreg=tiles.solve_registers,
        )
    return c


def recompose(
    table: Table,
    basis: Basis,
    projection: Projection,
    cores: Cores,
    *,
    workspace: Workspace,
    out: Table | None = None,
) -> Table:
    """The corrected factors, rank 2r (exact) or r (same), in the table's type. One launch."""
    from csulora_kernels._recompose import recompose_kernel

    ws, tiles = workspace, workspace.tiles
    factor = 1 if ws.same else 2
    if out is None:
        out = empty_like(table, factor)
    _check_out(table, out, factor)
    _check_workspace(table, ws)
    if ws.recompose_work.shape[0] == 0:
        return out
    precision = "tf32x3" if table.data.dtype == torch.float32 else "bf16x3"
    if _interpreted(recompose_kernel):
        precision = "ieee"  # the interpreter knows no bf16x3
    with on_device(table.data):
        recompose_kernel[(ws.recompose_work.shape[0],)](
            table.data,
            out.data,
            basis.data,
            table.entries,
            out.entries,
            basis.modules,
            ws.recompose_work,
            cores.W if cores.W is not None else projection.P,
            cores.X_out if cores.X_out is not None else cores.Y_out,
            cores.Z,
            cores.Y_out,
            len(table.shapes),
            K=tiles.K,
            R=tiles.R,
            T=tiles.recompose_tile,
            BLOCK_K=tiles.recompose.block_k,
            BLOCK_D=tiles.recompose.block_d,
            VEC_R=table.vec_r,
            VEC_D=table.vec_d,
            SAME=ws.same,
            PRECISION=precision,
            num_warps=tiles.recompose.warps,
            num_stages=tiles.recompose.stages,
            maxnreg=tiles.recompose.registers,
        )
    return out


def correct(
    table: Table,
    basis: Basis,
    penalties: Any,
    *,
    out: Table | None = None,
    workspace: Workspace | None = None,
) -> Result:
    """Correct every module of every adapter: project, solve, recompose.

    penalties: an object with the attributes of `Penalties`. out: from `empty_like(table, 2)` for
    exact or `empty_like(table, 1)` for same. The result's projection and cores are the workspace's
    own buffers: the next call with that workspace overwrites them. Raises ValueError for a rank above
    128.
    """
    _check(table, basis)
    if table.max_rank > MAX_RANK:
        raise ValueError(f"rank {table.max_rank} is above {MAX_RANK}, the most the kernels hold")
    ws = workspace if workspace is not None else _workspace(table, basis, penalties)
    projection = project(table, basis, workspace=ws)
    cores = solve(projection, penalties, workspace=ws)
    return Result(
        recompose(table, basis, projection, cores, workspace=ws, out=out), projection, cores
    )


_workspace = workspace  # `correct` has a parameter of this name


def _projection_buffers(lead: tuple[int, ...], K: int, R: int, device: torch.device) -> Projection:
    # Zero once: where a module has fewer directions than K no program ever writes.
    return Projection(
        torch.zeros(*lead, K, R, device=device),
        torch.zeros(*lead, R, K, device=device),
        torch.zeros(*lead, R, R, device=device),
        torch.zeros(*lead, R, R, device=device),
    )


def _core_buffers(N: int, M: int, K: int, R: int, same: bool, device: torch.device) -> Cores:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(N, M, *shape, dtype=dtype, device=device)

    H = 1 if same else 2
    f64 = torch.float64
    return Cores(
        X_in=new(R, R) if same else None,
        X_out=new(R, R) if same else None,
        Y_in=new(H * R, R),
        Y_out=new(H * R, R),
        energy=new(dtype=f64),
        before=new(4, dtype=f64),
        after=new(4, dtype=f64),
        relative_change=new(dtype=f64),
        rank_error=new(dtype=f64),
        W=new(K, R) if same else None,
        Z=new(K, H * R),
    )


def _scratch(programs: int, R: int, device: torch.device) -> Tensor:
    return torch.empty(programs, SOLVE_MATRICES, R, R, dtype=torch.float64, device=device)


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
        from triton.runtime.interpreter import InterpretedFunction

        from csulora_kernels._solve import solve_kernel
    except ImportError:
        return "the package triton is not installed"
    if device.type != "cuda" and not isinstance(solve_kernel, InterpretedFunction):
        return (
            f"Triton needs a CUDA device, not {device}; on the CPU it runs under its interpreter, "
            "with TRITON_INTERPRET=1 in the environment, for tests"
        )
    return None


def _interpreted(kernel: Any) -> bool:
    return type(kernel).__name__ == "InterpretedFunction"


def on_device(data: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(data.device) if data.is_cuda else contextlib.nullcontext()


def _check(table: Table, basis: Basis) -> None:
    if table.shapes != basis.shapes:
        raise ValueError("the table was packed for another basis: the module shapes differ")
    if table.data.device != basis.data.device:
        raise ValueError(f"table on {table.data.device}, basis on {basis.data.device}")


def _check_out(table: Table, out: Table, factor: int) -> None:
    # Not slot by slot: with many adapters that would take longer than the kernels.
    fits = out.made_for == (table.key, factor) and len(out.slots) == len(table.slots)
    if not fits or out.shapes != table.shapes or out.data.dtype != table.data.dtype:
        raise ValueError(f"out must come from empty_like(table, {factor})")


def _check_workspace(table: Table, ws: Workspace) -> None:
    size = len(table.slots), len(table.shapes)
    if ws.shapes != table.shapes or ws.cores.energy.shape != size or table.max_rank > ws.tiles.R:
        raise ValueError("the workspace was made for a table of another layout")


def _is_same(penalties: Any) -> bool:
    """Whether the form is `same`, after a check of all settings."""
    for name in ("lambda_aligned", "lambda_left", "lambda_right", "lambda_off"):
        value = getattr(penalties, name)
        if math.isnan(value) or value < 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    for name, choices in (("granularity", GRANULARITIES), ("form", FORMS)):
        value = getattr(penalties, name)
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")
    return bool(penalties.form == "same")
