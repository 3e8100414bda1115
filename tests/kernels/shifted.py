"""Cases of realignment for the kernels, and their checks stage by stage, as in cases.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cases
import oracle
import torch
from cases import INF, RAGGED, SENTINEL, Case, distance
from tolerances import STAGES, TOLERANCES
from torch import Tensor

import csulora_kernels as kernels
from csulora.method import realign, stages
from csulora.settings import Realignment
from csulora_kernels.buffers import hardware

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Shifted:
    case: Case  # its strengths do not count
    settings: Realignment


CASES = {
    "same": Shifted(Case(RAGGED, (1, 3, 8, 16), lacking=2), Realignment()),
    "same, brain": Shifted(Case(RAGGED, (8, 16), B16), Realignment(INF, 0.3)),
    "same, odd": Shifted(
        Case(((37, 53, 7), (65, 31, 1)), (3, 5, 3, 7, 1), F16), Realignment(edge=False)
    ),
    "same, opposed": Shifted(Case(RAGGED[:2], (8, 3)), Realignment(1e3, opposed=True)),
    "same, splits": Shifted(
        Case(((1100, 600, 7), (40, 530, 3)), (3, 8), B16, processors=64), Realignment()
    ),
    "same, many directions": Shifted(
        Case(((280, 264, 256), (120, 110, 100)), (8, 1), B16), Realignment(30, edge=False)
    ),
    "same, rank 40": Shifted(Case(((90, 100, 7),), (40,), B16), Realignment()),
    "same, deficient": Shifted(Case(((40, 30, 5),), (6, 2), deficient=True), Realignment()),
    "exact": Shifted(Case(RAGGED, (3, 8, 16), lacking=1), Realignment(form="exact")),
    "exact, brain": Shifted(
        Case(((96, 80, 8), (64, 72, 16)), (8, 16), B16), Realignment(10, 2.0, form="exact")
    ),
    "exact, many directions": Shifted(
        Case(((150, 140, 128),), (5,), F16), Realignment(edge=False, opposed=True, form="exact")
    ),
}


def check(shifted: Shifted, device: str = "cpu") -> dict[str, float]:
    """Run a case stage by stage; the largest error of each stage. Raises AssertionError."""
    case, settings = shifted.case, shifted.settings
    made = cases.problem(case, device)
    plain = kernels.pack_basis(made.bases, device)
    packed = kernels.pack(made.adapters, plain, device)
    basis = replace(plain, data=cases.guarded(plain.data, cases.basis_views(plain), math.nan)[1])
    table = replace(packed, data=cases.guarded(packed.data, cases.table_views(packed), math.nan)[1])
    empty = kernels.empty_like(table, settings)
    whole, inside = cases.guarded(empty.data, [], SENTINEL)
    out = replace(empty, data=inside)
    tiles = kernels.choose(
        table.shapes, len(table.slots), table.max_rank, case.dtype,
        hardware(table.data.device)[0], case.processors,
    )  # fmt: skip
    ws = kernels.workspace(table, basis, settings, tiles)
    for X in (*ws.found, ws.scratch):
        if X is not None:
            X.fill_(math.nan)
    spectrum = spectrum_of(case, tiles.K, device)
    projection = kernels.project(table, basis, workspace=ws)
    shift = kernels.solve(projection, settings, spectrum, workspace=ws)
    out = kernels.recompose(table, basis, projection, shift, workspace=ws, out=out)
    check_written(whole, out)
    errors: dict[str, float] = {}
    for i, adapter in enumerate(made.adapters):
        for m, name in enumerate(basis.names):
            if name in adapter:
                one = cases.One(case, *adapter[name], *made.bases[name], i, m)
                found = check_one(one, settings, spectrum, projection, shift, out)
                errors = {k: max(v, errors.get(k, 0.0)) for k, v in found.items()}
    again = kernels.correct(table, basis, settings, spectrum).table
    for X, Y in zip(cases.table_views(out), cases.table_views(again), strict=True):
        assert torch.equal(X, Y), "the same input gave other bits"
    return errors


def spectrum_of(case: Case, K: int, device: str) -> kernels.Spectrum:
    """Falling singular values, an edge below some of them, a scaling of its own for each."""
    S = torch.zeros(len(case.modules), K, dtype=torch.float64)
    for m, (_, _, k) in enumerate(case.modules):
        S[m, :k] = 30.0 / (1 + torch.arange(k, dtype=torch.float64))
    edge = torch.full((len(case.modules),), 4.0, dtype=torch.float64)
    N = len(case.ranks)
    scaling = (0.5 + torch.arange(N * len(S), dtype=torch.float64)).reshape(N, -1)
    return kernels.Spectrum(S.to(device), edge.to(device), scaling.to(device))


def check_written(whole: Tensor, out: kernels.Table) -> None:
    written = torch.zeros_like(whole, dtype=torch.bool)
    for i in range(len(out.slots)):
        for m in range(len(out.shapes)):
            for X in (out.A(i, m), *(() if out.kept else (out.B(i, m),))):
                written.as_strided(X.shape, X.stride(), X.storage_offset()).fill_(True)
    assert bool((whole[~written] == SENTINEL).all()), "written outside of the output"
    assert not bool((whole[written] == SENTINEL).any()), "output left unwritten"


def check_one(
    one: cases.One,
    settings: Realignment,
    spectrum: kernels.Spectrum,
    padded: kernels.Projection,
    found: kernels.Shift,
    out: kernels.Table,
) -> dict[str, float]:
    i, m, (r, k) = one.i, one.m, (one.A.shape[0], one.U.shape[1])
    own = one.own_projection(padded)
    known = realign.Spectrum(spectrum.S[m, :k], spectrum.edge[m], spectrum.scaling[i, m])
    wanted, expected = realign.solve(own, known, settings)
    Z, diagonal = found.Z[i, m], found.inverse_diagonal[i, m]
    assert not bool(Z[k:].any()) and not bool(Z[:, r:].any()), "padding not zero"
    figures = stages.Figures(*(X[i, m] for X in found[3:]))
    for X, Y in zip(figures, expected, strict=True):
        torch.testing.assert_close(X, Y, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(diagonal[:r], wanted.inverse_diagonal, rtol=1e-6, atol=0)
    assert not bool(diagonal[r:].any())
    errors = {"project": one.check_project(own), "solve": distance(Z[:k, :r].mT, wanted.Y)}
    if wanted.c is not None:
        assert found.c is not None
        errors["solve"] = max(errors["solve"], distance(found.c[i, m, :k], wanted.c))
    limits = STAGES | {"chain": TOLERANCES[one.case.dtype]}
    if one.case.dtype != F32:
        limits["recompose"] += TOLERANCES[one.case.dtype] / 2
    B_new, A_new = out.B(i, m).double(), out.A(i, m).double()
    B, A, U, V = (X.double() for X in (one.B, one.A, one.U, one.V))
    mine = realign.Shift(
        Z[:k, :r].mT.double(), None if found.c is None else found.c[i, m, :k].double(), diagonal
    )
    B_right, A_right = realign.recompose(B, A, U, V, mine)
    if wanted.c is None:
        assert torch.equal(out.B(i, m), one.B)
    errors["recompose"] = max(distance(B_new, B_right), distance(A_new, A_right))
    if not bool(torch.isinf(diagonal).any()):  # else the caller solves it in float64
        errors["chain"] = chain(one, settings, spectrum, B_new @ A_new, wanted.c is None)
    for stage, error in errors.items():
        assert error <= limits[stage], f"adapter {i}, module {m}, {stage}: {error:.2e}"
    return errors


def chain(
    one: cases.One, settings: Realignment, spectrum: kernels.Spectrum, found: Tensor, same: bool
) -> float:
    """Against the dense oracle."""
    s = float(spectrum.scaling[one.i, one.m])
    wanted = oracle.realign(
        s * one.B.double() @ one.A.double(),
        one.U,
        spectrum.S[one.m, : one.U.shape[1]],
        one.V,
        strength=settings.strength,
        gamma=settings.gamma,
        edge=float(spectrum.edge[one.m]) if settings.edge else 0.0,
        opposed=settings.opposed,
        B=one.B if same else None,
    )
    return distance(s * found, wanted)
