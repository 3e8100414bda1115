"""The stages as functions of packed tensors, and `correct`, which runs all three.

Shapes: N adapters, M modules, K and R the padded number of directions and rank (tiles.py); whatever
lies beyond a module's own k and r is zero, or an identity's diagonal. Everything runs on the current
stream without host synchronisation; with `out` and `workspace` given nothing is allocated, so a call
can be captured in a CUDA graph. The strengths are arguments of the launch: a graph keeps those it was
captured with.

Threads: every function may run in several at once, each call with a workspace and an `out` of its own;
tables and bases may be shared. Raises RuntimeError for a workspace that another thread is inside with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora_kernels import plan
from csulora_kernels.buffers import (
    Cores,
    Projection,
    Shift,
    Spectrum,
    Workspace,
    check_table,
    check_workspace,
    workspace,
)
from csulora_kernels.launch import Launcher, check_alignment, interpreted
from csulora_kernels.layout import Basis, Table, empty_like
from csulora_kernels.settings import REMOVES, Kind, kind_of
from csulora_kernels.tiles import MAX_RANK


class Result(NamedTuple):
    """The new factors and everything that is known about them."""

    table: Table
    projection: Projection
    cores: Cores | Shift


def project(table: Table, basis: Basis, *, workspace: Workspace) -> Projection:
    """P, Q and the Gram matrices of every module of every adapter. One launch, and one that adds
    partial sums where a side was cut."""
    with workspace.turn:
        return _project(table, basis, workspace)


def _project(table: Table, basis: Basis, ws: Workspace) -> Projection:
    check_table(table, basis)
    check_workspace(table, ws)
    check_alignment(table.data, basis.data)
    if ws.project_work.shape[0] == 0:
        return ws.projection
    key = "project", table.data.dtype, table.vec_r, table.vec_d
    launch = ws.launchers.get(key)
    if launch is None:
        launch = ws.launchers[key] = _project_launcher(table, ws)
    M = len(table.shapes)
    given = table.data, basis.data, table.entries, basis.modules
    launch(*given, ws.project_work, *ws.partial, len(table.slots), M)
    if ws.splits > 1:
        add = ws.launchers.get("add_splits")
        if add is None:
            add = ws.launchers["add_splits"] = _add_launcher(ws)
        add(basis.modules, *ws.partial, M, ws.tiles.project.split_length)
    return ws.projection


def _project_launcher(table: Table, ws: Workspace) -> Launcher:
    from csulora_kernels._project import project_kernel

    tiles, shape = ws.tiles, ws.tiles.project
    constants = {
        "K": tiles.K,
        "R": tiles.R,
        "GROUP": tiles.group,
        "STRIPS": shape.strips,
        "BLOCK_K": shape.block_k,
        "BLOCK_D": shape.block_d,
        "VEC_R": table.vec_r,
        "VEC_D": table.vec_d,
        "EMULATE": interpreted(project_kernel),
    }
    return Launcher(
        project_kernel,
        (ws.project_work.shape[0],),
        constants,
        warps=shape.warps,
        stages=shape.stages,
    )


def _add_launcher(ws: Workspace) -> Launcher:
    from csulora_kernels._project import add_splits_kernel

    K, R, block = ws.tiles.K, ws.tiles.R, 1024
    grid = (ws.found.energy.numel(), -(-R * max(K, R) // block))
    return Launcher(add_splits_kernel, grid, {"K": K, "R": R, "BLOCK": block}, warps=4, stages=3)


def solve(
    projection: Projection,
    settings: Any,
    spectrum: Spectrum | None = None,
    *,
    workspace: Workspace,
) -> Cores | Shift:
    """What makes the new factors of the projected ones, and their energies. One launch.

    projection: of `project` with this workspace. spectrum: for realignment, of the basis and the adapters.
    """
    with workspace.turn:
        return _solve(projection, settings, spectrum, workspace)


def _solve(
    projection: Projection, settings: Any, spectrum: Spectrum | None, ws: Workspace
) -> Cores | Shift:
    kind = kind_of(settings)
    if kind != ws.kind:
        raise ValueError(f"the workspace was made for {ws.kind.method}, form {ws.kind.form}")
    if projection is not ws.projection:
        raise ValueError("the projection was made with another workspace")
    found = ws.found
    if found.energy.numel() == 0:
        return found
    if isinstance(found, Cores):
        _solve_cores(projection, settings, ws, found)
    else:
        _solve_shift(projection, settings, _checked(spectrum, ws), ws, found)
    return found


def _solve_cores(projection: Projection, settings: Any, ws: Workspace, c: Cores) -> None:
    launch = ws.launchers.get(settings.granularity)
    if launch is None:
        launch = _solve_launcher(ws, GRANULARITY=settings.granularity)
        ws.launchers[settings.granularity] = launch
    launch(
        *projection,
        ws.modules,
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
        len(ws.shapes),
        float(min(settings.lambda_aligned, REMOVES)),
        float(min(settings.lambda_left, REMOVES)),
        float(min(settings.lambda_right, REMOVES)),
        float(min(settings.lambda_off, REMOVES)),
    )


def _solve_shift(
    projection: Projection, settings: Any, spectrum: Spectrum, ws: Workspace, shift: Shift
) -> None:
    key = settings.edge, settings.opposed
    launch = ws.launchers.get(key)
    if launch is None:
        own = {"SIZE": ws.scratch.shape[1], "EDGE": settings.edge, "OPPOSED": settings.opposed}
        launch = ws.launchers[key] = _solve_launcher(ws, **own)
    launch(
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
    )


def _solve_launcher(ws: Workspace, **own: Any) -> Launcher:
    if ws.kind.method == "realign":
        from csulora_kernels._realign import realign_kernel as kernel
    else:
        from csulora_kernels._solve import solve_kernel as kernel

    tiles = ws.tiles
    constants = {"K": tiles.K, "R": tiles.R, "T": tiles.solve.tile}
    return Launcher(
        kernel,
        (ws.scratch.shape[0],),
        {**constants, **own, "SAME": ws.kind.form == "same"},
        warps=tiles.solve.warps,
        stages=1,
        registers=tiles.solve.registers,
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

    projection, cores: of the other stages with this workspace. Of a realignment of form `same` only A is
    written; the result's B is that of `table`.
    """
    with workspace.turn:
        return _recompose(table, basis, projection, cores, workspace, out)


def _recompose(
    table: Table,
    basis: Basis,
    projection: Projection,
    cores: Cores | Shift,
    ws: Workspace,
    out: Table | None,
) -> Table:
    if out is None:
        out = empty_like(table, ws.kind)
    _check_out(table, out, ws.kind)
    check_workspace(table, ws)
    if projection is not ws.projection or cores is not ws.found:
        raise ValueError("the projection or the cores were made with another workspace")
    check_alignment(table.data, basis.data, out.data)
    if not ws.kind.writes_B and out.kept is not table:
        out = out.beside(table)
    if ws.recompose_work.shape[0] == 0:
        return out
    key = "recompose", table.data.dtype, table.vec_r, out.vec_r, table.vec_d
    launch = ws.launchers.get(key)
    if launch is None:
        launch = ws.launchers[key] = _recompose_launcher(table, out, ws)
    launch(
        table.data,
        out.data,
        basis.data,
        table.entries,
        out.entries,
        basis.modules,
        ws.recompose_work,
        projection.G_B,
        projection.G_A,
        *_coefficients(projection, cores),
        len(table.slots),
        len(table.shapes),
    )
    return out


def _recompose_launcher(table: Table, out: Table, ws: Workspace) -> Launcher:
    from csulora_kernels._recompose import recompose_kernel

    tiles, shape = ws.tiles, ws.tiles.recompose
    constants = {
        "K": tiles.K,
        "R": tiles.R,
        "GROUP": tiles.group,
        "STRIPS": plan.recompose_strips(tiles, ws.kind),
        "BLOCK_J": shape.rows,
        "BLOCK_K": shape.block_k,
        "BLOCK_D": shape.block_d,
        "VEC_R": min(table.vec_r, out.vec_r),
        "VEC_D": table.vec_d,
        "KIND": KINDS[ws.kind],
        "STAGES": shape.stages,
        "EMULATE": interpreted(recompose_kernel),
    }
    return Launcher(
        recompose_kernel,
        (ws.recompose_work.shape[0],),
        constants,
        warps=shape.warps,
        stages=shape.stages,
        registers=shape.registers,
    )


KINDS = {
    Kind("csulora", "exact"): plan.EXACT,
    Kind("csulora", "same"): plan.CORES,
    Kind("realign", "same"): plan.SHIFTED,
    Kind("realign", "exact"): plan.EXTENDED,
}


def _coefficients(projection: Projection, cores: Cores | Shift) -> tuple[Tensor, ...]:
    """left, Q, Z, X and Y_out of recompose_kernel, and anything at all where it multiplies nothing."""
    Z = cores.Z
    if isinstance(cores, Shift):
        return Z if cores.c is None else cores.c, Z, Z, Z, Z
    if cores.W is None or cores.X_out is None:
        return projection.P, projection.Q, Z, cores.Y_in, cores.Y_out
    return cores.W, Z, Z, cores.X_out, cores.Y_out


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
    with ws.turn:
        projection = _project(table, basis, ws)
        cores = _solve(projection, settings, spectrum, ws)
        return Result(_recompose(table, basis, projection, cores, ws, out), projection, cores)


_workspace = workspace  # `correct` has a parameter of this name


def _checked(spectrum: Spectrum | None, ws: Workspace) -> Spectrum:
    N, M = ws.found.energy.shape
    sizes = ((M, ws.tiles.K), (M,), (N, M))
    if spectrum is None or any(X.shape != size for X, size in zip(spectrum, sizes, strict=True)):
        raise ValueError(f"realignment needs a spectrum of S, edge and scaling of sizes {sizes}")
    if any(X.dtype != torch.float64 or not X.is_contiguous() for X in spectrum):
        raise ValueError("a spectrum is contiguous and of type float64")
    check_alignment(*spectrum)
    return spectrum


def _check_out(table: Table, out: Table, kind: Kind) -> None:
    # Not slot by slot: with many adapters that would take longer than the kernels.
    fits = out.made_for == (table.key, kind) and len(out.slots) == len(table.slots)
    if not fits or out.shapes != table.shapes or out.data.dtype != table.data.dtype:
        raise ValueError(f"out must come from empty_like(table, settings) of {' '.join(kind)}")
