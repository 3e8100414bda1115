"""The stages as functions of packed tensors, and `correct`, which runs all three.

Shapes: N adapters, M modules, K and R the padded number of directions and rank (tiles.py); whatever
lies beyond a module's own k and r is zero, or an identity's diagonal. Everything runs on the current
stream without host synchronisation; with `out` and `workspace` given nothing is allocated, so a call
can be captured in a CUDA graph. The strengths are arguments of the launch: a graph keeps those it was
captured with.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora_kernels.layout import Basis, Table, empty_like
from csulora_kernels.settings import Kind, kind_of
from csulora_kernels.tiles import MAX_RANK
from csulora_kernels.workspace import (
    Cores,
    Projection,
    Shift,
    Spectrum,
    Workspace,
    check_table,
    check_workspace,
    workspace,
)


class Result(NamedTuple):
    """The new factors and everything that is known about them."""

    table: Table
    projection: Projection
    cores: Cores | Shift


def project(table: Table, basis: Basis, *, workspace: Workspace) -> Projection:
    """P, Q and the Gram matrices of every module of every adapter. One launch, and one that adds
    partial sums where a side was cut."""
    from csulora_kernels._project import add_splits_kernel, project_kernel

    ws, tiles = workspace, workspace.tiles
    check_table(table, basis)
    check_workspace(table, ws)
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
            STRIPS=tiles.strips,
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


def solve(
    projection: Projection,
    settings: Any,
    spectrum: Spectrum | None = None,
    *,
    workspace: Workspace,
) -> Cores | Shift:
    """What makes the new factors of the projected ones, and their energies. One launch.

    spectrum: for realignment, of the basis and the adapters.
    """
    ws = workspace
    kind = kind_of(settings)
    if kind != ws.kind:
        raise ValueError(f"the workspace was made for {ws.kind.method}, form {ws.kind.form}")
    if ws.found.energy.numel() == 0:
        return ws.found
    with on_device(projection.P):
        if isinstance(ws.found, Cores):
            _solve_cores(projection, settings, ws, ws.found)
        else:
            _solve_shift(projection, settings, _checked(spectrum, ws), ws, ws.found)
    return ws.found


def _solve_cores(projection: Projection, settings: Any, ws: Workspace, c: Cores) -> None:
    from csulora_kernels._solve import solve_kernel

    tiles = ws.tiles
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
        c.energy.numel(),
        float(settings.lambda_aligned),
        float(settings.lambda_left),
        float(settings.lambda_right),
        float(settings.lambda_off),
        K=tiles.K,
        R=tiles.R,
        T=tiles.solve_tile,
        GRANULARITY=settings.granularity,
        SAME=ws.kind.form == "same",
        num_warps=tiles.solve_warps,
        num_stages=1,
        maxnreg=tiles.solve_registers,
    )


def _solve_shift(
    projection: Projection, settings: Any, spectrum: Spectrum, ws: Workspace, shift: Shift
) -> None:
    from csulora_kernels._realign import realign_kernel

    tiles = ws.tiles
    realign_kernel[(ws.scratch.shape[0],)](
        *projection,
        *spectrum,
        shift.Z,
        shift.c if shift.c is not None else shift.Z,
        *shift[2:],
        ws.scratch,
        shift.energy.numel(),
        len(ws.shapes),
        float(settings.strength),
        float(settings.gamma),
        K=tiles.K,
        R=tiles.R,
        T=tiles.solve_tile,
        SIZE=ws.scratch.shape[1],
        EDGE=settings.edge,
        OPPOSED=settings.opposed,
        SAME=ws.kind.form == "same",
        num_warps=tiles.solve_warps,
        num_stages=1,
        maxnreg=tiles.solve_registers,
    )


def recompose(
    table: Table,
    basis: Basis,
    projection: Projection,
    cores: Cores | Shift,
    *,
    workspace: Workspace,
    out: Table | None = None,
) -> Table:
    """The new factors in the table's type. One launch.

    Of a realignment of form `same` only A is written; the result's B is that of `table`.
    """
    from csulora_kernels._recompose import recompose_kernel

    ws, tiles = workspace, workspace.tiles
    if out is None:
        out = empty_like(table, ws.kind)
    _check_out(table, out, ws.kind)
    check_workspace(table, ws)
    if not ws.kind.writes_B:
        out = out.beside(table)
    if ws.recompose_work.shape[0] == 0:
        return out
    left, X_out, Z, Y_out = _coefficients(projection, cores)
    kind_B, kind_A = KINDS[ws.kind]
    with on_device(table.data):
        recompose_kernel[(ws.recompose_work.shape[0],)](
            table.data,
            out.data,
            basis.data,
            table.entries,
            out.entries,
            basis.modules,
            ws.recompose_work,
            projection.G_B,
            projection.G_A,
            left,
            X_out,
            Z,
            Y_out,
            len(table.slots),
            len(table.shapes),
            K=tiles.K,
            R=tiles.R,
            GROUP=tiles.group,
            BLOCK_J=tiles.recompose_rows,
            BLOCK_K=tiles.recompose.block_k,
            BLOCK_D=tiles.recompose.block_d,
            VEC_R=min(table.vec_r, out.vec_r),
            VEC_D=table.vec_d,
            KIND_B=kind_B,
            KIND_A=kind_A,
            STAGES=tiles.recompose.stages,
            EMULATE=_interpreted(recompose_kernel),
            num_warps=tiles.recompose.warps,
            num_stages=tiles.recompose.stages,
            maxnreg=tiles.recompose.registers,
        )
    return out


# Of the sides of B and of A, as _recompose.py numbers them.
_PARTS, _CORES, _SHIFTED, _EXTENDED = range(4)
KINDS = {
    ("csulora", "exact"): (_PARTS, _CORES),
    ("csulora", "same"): (_CORES, _CORES),
    ("realign", "same"): (_SHIFTED, _SHIFTED),
    ("realign", "exact"): (_EXTENDED, _EXTENDED),
}


def _coefficients(
    projection: Projection, cores: Cores | Shift
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What recompose multiplies, and anything at all where it multiplies nothing."""
    Z = cores.Z
    if isinstance(cores, Shift):
        return Z if cores.c is None else cores.c, Z, Z, Z
    W = projection.P if cores.W is None else cores.W
    return W, Z if cores.X_out is None else cores.X_out, Z, cores.Y_out


def correct(
    table: Table,
    basis: Basis,
    settings: Any,
    spectrum: Spectrum | None = None,
    *,
    out: Table | None = None,
    workspace: Workspace | None = None,
) -> Result:
    """Correct every module of every adapter: project, solve, recompose.

    settings: an object with the attributes of `Penalties` or of `Shares`, for which a spectrum is needed.
    out: from `empty_like(table, settings)`. The result's projection and cores are the workspace's own
    buffers: the next call with that workspace overwrites them. Raises ValueError for a rank above 128.
    """
    check_table(table, basis)
    if table.max_rank > MAX_RANK:
        raise ValueError(f"rank {table.max_rank} is above {MAX_RANK}, the most the kernels hold")
    ws = workspace if workspace is not None else _workspace(table, basis, settings)
    projection = project(table, basis, workspace=ws)
    cores = solve(projection, settings, spectrum, workspace=ws)
    return Result(
        recompose(table, basis, projection, cores, workspace=ws, out=out), projection, cores
    )


_workspace = workspace  # `correct` has a parameter of this name


def _checked(spectrum: Spectrum | None, ws: Workspace) -> Spectrum:
    N, M = ws.found.energy.shape
    sizes = ((M, ws.tiles.K), (M,), (N, M))
    if spectrum is None or any(X.shape != size for X, size in zip(spectrum, sizes, strict=True)):
        raise ValueError(f"realignment needs a spectrum of S, edge and scaling of sizes {sizes}")
    if any(X.dtype != torch.float64 or not X.is_contiguous() for X in spectrum):
        raise ValueError("a spectrum is contiguous and of type float64")
    return spectrum


def _interpreted(kernel: Any) -> bool:
    return type(kernel).__name__ == "InterpretedFunction"


def on_device(data: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(data.device) if data.is_cuda else contextlib.nullcontext()


def _check_out(table: Table, out: Table, kind: Kind) -> None:
    # Not slot by slot: with many adapters that would take longer than the kernels.
    fits = out.made_for == (table.key, kind) and len(out.slots) == len(table.slots)
    if not fits or out.shapes != table.shapes or out.data.dtype != table.data.dtype:
        raise ValueError(f"out must come from empty_like(table, settings) of {' '.join(kind)}")
