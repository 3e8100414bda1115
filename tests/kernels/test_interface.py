"""The functions of csulora_kernels: their names, what they import, allocate and refuse."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import csulora_kernels as kernels
from csulora_kernels.layout import Shape
from csulora_kernels.tiles import fault

ROOT = Path(__file__).parents[2]


def packed(d_out, d_in, rank):
    """One adapter of ones on one module, with a basis of two directions a side."""
    basis = kernels.pack_basis({"m": (torch.eye(d_out)[:, :2], torch.eye(d_in)[:, :2])})
    table = kernels.pack([{"m": (torch.ones(d_out, rank), torch.ones(rank, d_in))}], basis)
    return table, basis


def test_importing_the_packages_imports_no_triton():
    command = [sys.executable, "-X", "importtime", "-c", "import csulora_kernels, csulora"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"csulora", "csulora_kernels"} <= imported and "triton" not in imported


@pytest.mark.usefixtures("interpreter")
def test_public_names():
    """The stages stay functions after the files of their kernels have been imported, too."""
    table, basis = packed(4, 4, 1)
    kernels.correct(table, basis, kernels.Penalties())
    assert [name for name in kernels.__all__ if not hasattr(kernels, name)] == []
    assert callable(kernels.project) and callable(kernels.solve)


@pytest.mark.usefixtures("interpreter")
def test_ranks_above_the_limit_are_refused_by_name():
    table, basis = packed(4, 4, 129)
    with pytest.raises(ValueError, match="rank 129"):
        kernels.correct(table, basis, kernels.Penalties())


@pytest.mark.usefixtures("interpreter")
def test_tiles_are_given_or_chosen_to_be_steady():
    table, basis = packed(4, 4, 1)
    tiles = kernels.workspace(table, basis, kernels.Penalties(), steady=True).tiles
    with pytest.raises(ValueError, match="not both"):
        kernels.workspace(table, basis, kernels.Penalties(), tiles, steady=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("project", {"split_length": 40}, "project.split_length 40 is no multiple"),
        (None, {"K": 96}, "K 96"),
        ("solve", {"tile": 12}, "R 16"),
        ("recompose", {"length": 100}, "recompose.length 100"),
    ],
)
def test_tiles_that_do_not_fit_together_are_refused(stage, change, message):
    table, basis = packed(64, 48, 2)
    tiles = kernels.workspace(table, basis, kernels.Penalties()).tiles
    if stage:
        change = {stage: replace(getattr(tiles, stage), **change)}
    with pytest.raises(ValueError, match=message):
        kernels.workspace(table, basis, kernels.Penalties(), replace(tiles, **change))


def test_every_choice_of_tiles_fits_together_and_warp_groups_have_their_rows():
    types = (torch.float32, torch.bfloat16, torch.float16)
    for arch, r, dtype, k, n in product((80, 90, 100), (8, 32, 64, 128), types, (7, 256), (1, 64)):
        tiles = kernels.choose((Shape(4096, 1024, k),), n, r, dtype, arch, 132)
        assert fault(tiles, arch) is None, (arch, r, dtype, k, n)
    tiles = kernels.choose((Shape(4096, 1024, 64),), 64, 16, torch.bfloat16, 90, 132)
    few = replace(tiles, recompose=replace(tiles.recompose, warps=8))
    assert "8 warps" in fault(few, 90) and fault(few, 80) is None


@pytest.mark.parametrize("r, k", [(8, 7), (32, 64), (128, 256)])
def test_steady_tiles_depend_on_nothing_else_in_a_table(r, k):
    """But for what changes no bit: where recompose cuts d, and how many programs solve has."""
    tables = (
        (Shape(64, 48, k),),
        (Shape(4096, 1024, k), Shape(14336, 4096, 1)) * 32,
        (Shape(128256, 4096, k), Shape(33, 35, 0)),
    )
    for arch, dtype in product((80, 90, 100), (torch.float32, torch.bfloat16)):
        chosen = {
            indifferent(kernels.choose(shapes, n, rank, dtype, arch, processors, steady=True))
            for shapes, n, rank, processors in product(tables, (1, 2, 64), (r, r - 1), (1, 132))
        }
        (tiles,) = chosen
        assert fault(tiles, arch) is None and tiles.group == 1
        assert tiles.project.strips == tiles.recompose.strips == 1
        one = kernels.choose(tables[0], 1, r, dtype, arch, 132)
        wanted = replace(one.project, split_length=tiles.project.split_length)
        assert (wanted, indifferent(one).recompose) == (
            tiles.project,
            tiles.recompose,
        )  # as compiled


def indifferent(tiles):
    return replace(
        tiles,
        solve=replace(tiles.solve, programs=1),
        recompose=replace(tiles.recompose, length=1024),
    )


def test_without_a_device_or_the_interpreter_there_is_a_reason(monkeypatch):
    """As in a process without the interpreter, which tests/pipeline/test_backend.py starts: the kernel is
    such as `triton.jit` makes it there."""
    jit = pytest.importorskip("triton.runtime.jit")
    from csulora_kernels import _solve

    monkeypatch.setattr(_solve, "solve_kernel", jit.JITFunction(_solve.solve_kernel.fn))
    assert "CUDA" in kernels.unavailable(torch.device("cpu"))
    table, basis = packed(8, 5, 2)
    with pytest.raises(RuntimeError, match="CUDA"):
        kernels.correct(table, basis, kernels.Penalties())


class Recorded(TorchDispatchMode):
    """Notes every operator of PyTorch that runs."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("form", kernels.FORMS)
def test_nothing_is_allocated_or_read_back_with_out_and_workspace(form, monkeypatch):
    """No operator of PyTorch runs at all: the three launches are everything."""
    from triton.runtime.interpreter import GridExecutor

    table, basis = packed(64, 48, 2)
    penalties = kernels.Penalties(form=form)
    out, ws = kernels.empty_like(table, penalties), kernels.workspace(table, basis, penalties)
    kernels.correct(table, basis, penalties, out=out, workspace=ws)
    seen = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **kw: seen.append("launch"))
    with Recorded(seen):
        kernels.correct(table, basis, penalties, out=out, workspace=ws)
    assert seen == ["launch"] * 3
