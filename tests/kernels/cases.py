"""Cases for the kernels, and their checks stage by stage against float64, on whatever device runs them.

test_interpreted.py runs them on the CPU and test_gpu.py on a GPU. Factors and bases lie in NaN, results
between sentinels, and workspaces start as NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import oracle
import torch
from tolerances import STAGES, TOLERANCES
from torch import Tensor

import csulora_kernels as kernels
from csulora.method import stages
from csulora.method.precision import singular
from csulora.settings import Correction
from csulora_kernels.buffers import hardware

GUARD = 64  # elements of NaN before and after a buffer
SENTINEL = 777.0
INF = math.inf


@dataclass(frozen=True)
class Case:
    modules: tuple[tuple[int, int, int], ...]  # d_out, d_in, k
    ranks: tuple[int, ...]  # of the adapters
    dtype: torch.dtype = torch.float32
    strengths: tuple[float, float, float, float] = (0.0, 10.0, 5.0, 100.0)
    granularity: str = "direction"
    form: str = "exact"
    lacking: int = 0  # the first adapter lacks this many modules
    deficient: bool = False  # a column of B twice, a row of A zero
    processors: int = 1  # more of them cut sides into more stretches
    again: bool = False  # run it three times: after NaN, and in a workspace of its own

    @property
    def correction(self) -> Correction:
        return Correction(*self.strengths, granularity=self.granularity, form=self.form)


RAGGED = ((70, 45, 7), (33, 129, 1), (20, 24, 0), (130, 96, 64))
F16, B16 = torch.float16, torch.bfloat16
CASES = {
    "ragged": Case(RAGGED, (1, 3, 8, 16), lacking=2),
    "half": Case(RAGGED, (16, 8), F16, (1e4, 1, 0, 3), "component"),
    "brain": Case(RAGGED, (8, 16, 3), B16, (0, 10, 10, 10)),
    "odd": Case(((37, 53, 7), (65, 31, 1)), (3, 5, 3, 7, 1), B16, (10, 0, 10, 0)),
    "enormous": Case(((40, 30, 5),), (6, 2), torch.float32, (1e30, 1, INF, 1e20), deficient=True),
    "removed": Case(RAGGED[:2], (8, 3), F16, (0, INF, INF, INF), again=True),
    "kept": Case(RAGGED[:2], (8,), torch.float32, (0, 0, 0, 0)),
    "strong": Case(((96, 80, 16),), (8, 16), torch.float32, (0, 1e4, 1e2, 1e3)),
    "splits": Case(((1100, 600, 7), (40, 530, 3)), (3, 8), F16, processors=64),
    "many directions": Case(((280, 264, 256), (120, 110, 100)), (8, 1), F16),
    "rank 40": Case(((150, 120, 100), (90, 100, 7)), (40, 3), torch.float32),
    "same, rank 40": Case(((90, 70, 7),), (40,), form="same"),
    "rank 64": Case(((96, 100, 7),), (64,), F16, (1, 2, 3, 4), "component"),
    "rank 128": Case(((140, 136, 64),), (128,), B16),
    "same": Case(((40, 36, 7), (33, 50, 1)), (3,), form="same"),
    "same, off pinned": Case(((40, 36, 7),), (3, 1), F16, (50, 5, 5, 0), form="same"),
    "same, left only": Case(((40, 36, 7),), (3, 1), B16, (INF, 1, INF, 1e15), form="same"),
    "same, largest block": Case(
        ((40, 36, 7), (33, 50, 1), (9, 20, 3)), (3, 1), F16, (1e7, 1, 1, INF), form="same"
    ),
    "same, component": Case(((70, 66, 64),), (16,), B16, (0, 10, 10, 10), "component", "same"),
    "same, kept": Case(
        ((30, 20, 5),), (8, 2), torch.float32, (0, 0, 0, 0), form="same", again=True
    ),
    "same, deficient": Case(((40, 30, 5),), (6, 2), form="same", deficient=True),
    "same, rank above a side": Case(
        ((29, 5, 4), (12, 2, 0)), (12,), torch.float32, (0, 0, 0, 0), form="same"
    ),
    "deficient": Case(((40, 30, 5),), (6, 2), deficient=True),
    "no adapters": Case(RAGGED, ()),
    "no modules": Case((), (3,)),
}
TYPES = (
    torch.float32,
    B16,
    F16,
)  # each case runs in all of them, on a GPU and under the interpreter
# Minutes under the interpreter.
SLOW = {
    "same, rank 128": Case(
        ((140, 132, 7),), (128,), B16, (0, 10, 10, 10), "component", form="same"
    ),
    "rank 128, float32": Case(((140, 136, 100),), (128, 64), torch.float32),
}


@dataclass(frozen=True)
class Problem:
    bases: dict[str, tuple[Tensor, Tensor]]
    adapters: list[dict[str, tuple[Tensor, Tensor]]]


def problem(case: Case, device: str, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bases, adapters = {}, []
    for m, (d_out, d_in, k) in enumerate(case.modules):
        pair = (torch.linalg.qr(randn(d, k).double())[0].float() for d in (d_out, d_in))
        bases[f"m{m}"] = tuple(X.to(device) for X in pair)
    for i, r in enumerate(case.ranks):
        factors = {}
        for name, (d_out, d_in, k) in list(zip(bases, case.modules, strict=True))[
            case.lacking if i == 0 else 0 :
        ]:
            U, V = (X.cpu() for X in bases[name])
            # Half of the energy inside, as a trained update may have it, and half outside.
            B = randn(d_out, r) + math.sqrt(d_out / max(k, 1)) * U @ randn(k, r)
            A = randn(r, d_in) + math.sqrt(d_in / max(k, 1)) * randn(r, k) @ V.mT
            if case.deficient:
                B[:, -1], A[-1] = B[:, 0], 0
            factors[name] = (B.to(case.dtype).to(device), A.to(case.dtype).to(device))
        adapters.append(factors)
    return Problem(bases, adapters)


def guarded(data: Tensor, views: list[Tensor], fill: float) -> tuple[Tensor, Tensor]:
    """(whole buffer, the same data in its middle): everything but the views is `fill`."""
    whole = torch.full((data.numel() + 2 * GUARD,), fill, dtype=data.dtype, device=data.device)
    inside = whole[GUARD : GUARD + data.numel()]
    for X in views:
        X.as_strided(X.shape, X.stride(), X.storage_offset())
        inside.as_strided(X.shape, X.stride(), X.storage_offset() + GUARD).copy_(X)
    return whole, inside


def table_views(table: kernels.Table) -> list[Tensor]:
    N, M = len(table.slots), len(table.shapes)
    return [f(i, m) for i in range(N) for m in range(M) for f in (table.B, table.A)]


def basis_views(basis: kernels.Basis) -> list[Tensor]:
    return [f(m) for m in range(len(basis.shapes)) for f in (basis.U, basis.V)]


def check(case: Case, device: str = "cpu") -> dict[str, float]:
    """Run a case stage by stage; the largest error of each stage. Raises AssertionError."""
    made = problem(case, device)
    plain = kernels.pack_basis(made.bases, device)
    basis = replace(plain, data=guarded(plain.data, basis_views(plain), math.nan)[1])
    packed = kernels.pack(made.adapters, basis, device)
    table = replace(packed, data=guarded(packed.data, table_views(packed), math.nan)[1])
    empty = kernels.empty_like(table, case.correction)
    whole, inside = guarded(empty.data, [], SENTINEL)
    out = replace(empty, data=inside)

    capability, _ = hardware(table.data.device)
    tiles = kernels.choose(
        table.shapes, len(table.slots), table.max_rank, case.dtype, capability, case.processors
    )
    ws = kernels.workspace(table, basis, case.correction, tiles)
    for X in (*ws.found, ws.scratch):
        if X is not None:
            X.fill_(math.nan)
    if case.again:  # what another batch leaves in the workspace must not matter
        spoilt = replace(table, data=torch.full_like(table.data, math.nan))
        kernels.correct(spoilt, basis, case.correction, workspace=ws)

    projection = kernels.project(table, basis, workspace=ws)
    cores = kernels.solve(projection, case.correction, workspace=ws)
    kernels.recompose(table, basis, projection, cores, workspace=ws, out=out)
    check_sentinels(whole, out)

    errors: dict[str, float] = {}
    for i, adapter in enumerate(made.adapters):
        for m, name in enumerate(basis.names):
            if name in adapter:
                one = One(case, *adapter[name], *made.bases[name], i, m)
                found = one.check(projection, cores, out)
                errors = {k: max(v, errors.get(k, 0.0)) for k, v in found.items()}
    if case.again:
        again = kernels.correct(table, basis, case.correction).table
        for X, Y in zip(table_views(out), table_views(again), strict=True):
            assert torch.equal(X, Y), "the same input gave other bits"
    return errors


def check_sentinels(whole: Tensor, out: kernels.Table) -> None:
    written = torch.zeros_like(whole, dtype=torch.bool)
    for X in table_views(out):
        written.as_strided(X.shape, X.stride(), X.storage_offset()).fill_(True)
    assert bool((whole[~written] == SENTINEL).all()), "written outside of the output"
    assert not bool((whole[written] == SENTINEL).any()), "output left unwritten"


@dataclass(frozen=True)
class One:
    """One module of one adapter, and its place in the batch."""

    case: Case
    B: Tensor
    A: Tensor
    U: Tensor
    V: Tensor
    i: int
    m: int

    def check(
        self, projection: kernels.Projection, cores: kernels.Cores, out: kernels.Table
    ) -> dict[str, float]:
        own = self.own_projection(projection)
        solved, figures = self.own_cores(cores), self.own_figures(cores)
        left, right = out.B(self.i, self.m).double(), out.A(self.i, self.m).double()
        errors = {
            "project": self.check_project(own),
            "solve": self.check_solve(own, solved, figures),
            "recompose": self.check_recompose(own, solved, left, right),
        }
        errors["chain"] = self.check_chain(figures, left @ right)
        limits = STAGES | {"chain": TOLERANCES[self.case.dtype]}
        if self.case.dtype != torch.float32:
            limits["recompose"] += TOLERANCES[self.case.dtype] / 2
        for stage, error in errors.items():
            place = f"adapter {self.i}, module {self.m}, {stage}"
            assert error <= limits[stage], f"{place}: {error:.2e} > {limits[stage]:.2e}"
        return errors

    def own_projection(self, padded: kernels.Projection) -> stages.Projection:
        """Without padding, which is zero."""
        r, k = self.A.shape[0], self.U.shape[1]
        parts = [X[self.i, self.m] for X in padded]
        sizes = ((k, r), (r, k), (r, r), (r, r))
        own = stages.Projection(*(X[:a, :b] for X, (a, b) in zip(parts, sizes, strict=True)))
        for X, Y in zip(parts, own, strict=True):
            assert float(X.abs().sum()) == float(Y.abs().sum()) or close(X, Y), "padding not zero"
        return own

    def own_cores(self, padded: kernels.Cores) -> stages.Cores:
        r = self.A.shape[0]
        R = padded.Y_in.shape[-1]
        halves = padded.Y_in.shape[-2] // R

        def rows(X: Tensor) -> Tensor:
            X = X[self.i, self.m]
            return torch.cat([X[h * R : h * R + r, :r] for h in range(halves)])

        def square(X: Tensor | None) -> Tensor | None:
            return None if X is None else X[self.i, self.m][:r, :r]

        return stages.Cores(
            square(padded.X_in), square(padded.X_out), rows(padded.Y_in), rows(padded.Y_out)
        )

    def own_figures(self, cores: kernels.Cores) -> stages.Figures:
        found = (cores.energy, cores.before, cores.after, cores.relative_change, cores.rank_error)
        return stages.Figures(*(X[self.i, self.m] for X in found))

    def check_project(self, own: stages.Projection) -> float:
        B, A, U, V = (X.double() for X in (self.B, self.A, self.U, self.V))
        truth = stages.project(B, A, U, V)
        return max(distance(X, Y) for X, Y in zip(own, truth, strict=True))

    def check_solve(
        self, own: stages.Projection, solved: stages.Cores, figures: stages.Figures
    ) -> float:
        """Against the reference given the same projection; by their updates, as cores are not unique."""
        wanted, expected = stages.solve(own, self.case.correction)
        for found, right in zip(figures[:4], expected[:4], strict=True):
            torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-5)
        if self.case.form == "same":
            # The fit stops when a step gains little: the two may stop at different steps.
            best, error = float(expected.rank_error), float(figures.rank_error)
            assert 0.9 * best - 2e-5 <= error <= 1.01 * best + 2e-5, (error, best)
            return 0.0
        return distance(self.update(own, solved), self.update(own, wanted))

    def update(self, own: stages.Projection, cores: stages.Cores) -> Tensor:
        """The update that cores and coordinates mean, in float64."""
        left, right = self.factors(own, cores)
        return left @ right

    def factors(self, own: stages.Projection, cores: stages.Cores) -> tuple[Tensor, Tensor]:
        """B' and A' in float64 as `stages.Cores` defines them, but of `exact` with the cores on the
        narrow side, as `kernels.Cores` says."""
        B_in, A_in = self.U.double() @ own.P.double(), own.Q.double() @ self.V.double().mT
        B_out, A_out = self.B.double() - B_in, self.A.double() - A_in
        Y_in, Y_out = cores.Y_in.double(), cores.Y_out.double()
        A_new = Y_in @ A_in + Y_out @ A_out
        if cores.X_in is None and B_in.shape[0] >= A_in.shape[1]:
            return torch.cat([B_in, B_out], dim=-1), A_new
        if cores.X_in is None:
            (K_ff, K_of), (K_fo, K_oo) = Y_in.chunk(2), Y_out.chunk(2)
            B_new = B_in @ torch.cat([K_ff, K_fo], dim=-1) + B_out @ torch.cat([K_of, K_oo], dim=-1)
            return B_new, torch.cat([A_in, A_out])
        return B_in @ cores.X_in.double() + B_out @ cores.X_out.double(), A_new

    def check_recompose(
        self, own: stages.Projection, solved: stages.Cores, left: Tensor, right: Tensor
    ) -> float:
        wanted = self.factors(own, solved)
        return max(distance(X, Y) for X, Y in zip((left, right), wanted, strict=True))

    def check_chain(self, figures: stages.Figures, found: Tensor) -> float:
        """Against the oracle: its update, and (same) the distance from it that the report states."""
        B, A = self.B.double(), self.A.double()
        dW = B @ A
        case = self.case
        wanted = oracle.correct(dW, self.U, self.V, case.strengths, case.granularity)
        error = distance(found, wanted)
        E = dW.square().sum()
        after = oracle.energies(found, self.U, self.V) / E
        allowed = TOLERANCES[case.dtype]
        grams, _ = stages.split_grams(self.reference_projection())
        if case.form == "same" and bool(singular(grams)):
            # Dependent columns, which the fit divides by noise: the caller solves them in float64.
            if case.dtype != torch.float32:
                return 0.0  # and what cancels in such cores is rounded in the type that is written
            allowed *= 10
        torch.testing.assert_close(
            figures.after, after, rtol=0, atol=2 * allowed, msg=lambda text: f"after: {text}"
        )
        if case.form == "same":
            stated = float(figures.rank_error)
            assert abs(error - stated) <= allowed, (error, stated)
            pinned = 0 if case.strengths[0] <= case.strengths[3] else 3
            X, Y = (oracle.blocks(Z, self.U, self.V)[pinned] for Z in (found, wanted))
            return float((X - Y).norm() / wanted.norm().clamp_min(1e-300))
        # solve drops what is noise in float32 Gram matrices: at rank 128 above 1e-6 of the update.
        limit = 2 * self.reference_error(wanted) + (1e-6 if case.dtype == torch.float32 else 5e-7)
        assert error <= limit, f"{error:.2e} where the reference is off by half of {limit:.2e}"
        return error

    def reference_error(self, wanted: Tensor) -> float:
        """Of the reference, in float32 with factors of the case's type in and out."""
        B, A = self.B.float(), self.A.float()
        own = self.reference_projection()
        cores, _ = stages.solve(own, self.case.correction)
        pair = stages.recompose(B, A, self.U, self.V, own, cores)
        left, right = (X.to(self.case.dtype).double() for X in pair)
        return distance(left @ right, wanted)

    def reference_projection(self) -> stages.Projection:
        return stages.project(self.B.float(), self.A.float(), self.U, self.V)


def close(X: Tensor, Y: Tensor) -> bool:
    return bool(torch.isclose(X.double().abs().sum(), Y.double().abs().sum(), rtol=1e-12))


def distance(found: Tensor, wanted: Tensor) -> float:
    size = float(wanted.double().norm())
    error = float((found.double() - wanted.double()).norm())
    return error / size if size else error
