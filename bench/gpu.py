"""The kernels on one GPU beside their floor, the eager reference, torch.compile of it and a CUDA graph.

    python bench/gpu.py [--json FILE] [--seconds 450] [--only "N=64 r=16"] [--all]

Copy bandwidth and matmul rate are measured first, in the same run; every share is of that bandwidth. No
figure is given for a result that fails its check against float64. `--dry` runs everything but the clock
on a toy model, also where there is no GPU (with TRITON_INTERPRET=1 in the environment).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from roofline import stage_bytes
from torch import Tensor
from workloads import FORMS, Workload, batch, method_of, spectrum_of

import csulora_kernels as kernels
from csulora import Correction, Realignment
from csulora.method import realign
from csulora.method.realign import Spectrum
from csulora.method.stages import longer_side, mixing, project, recompose, solve
from csulora.settings import Method

TOLERANCE = 2 * 2.0**-8  # of a bfloat16 result
Clock = Callable[[Callable[[], object]], float | None]


@dataclass
class Row:
    """One measured thing; milliseconds are medians and None where nothing was timed."""

    model: str
    adapters: int
    r: int
    form: str
    what: str
    check: float | None = None  # relative error of the update
    milliseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    bytes: int | None = None
    floor_share: float | None = None  # of the copy bandwidth, counting the floor's bytes
    forecast: float | None = None  # milliseconds, of bench/forecast.py before anything ran
    note: str = ""


@dataclass
class Run:
    clock: Clock
    device: torch.device
    deadline: float
    bandwidth: float | None = None  # bytes a second
    forecasts: dict[tuple[str, int, int, str, str], float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(
        self, row: Row, work: Callable[[], object], moved: int, passed: bool, most: int = 50
    ) -> None:
        """Time a piece of work, at most so often, unless its result is wrong."""
        row.bytes = moved
        if not passed:
            row.note = "check failed: no figure"
        else:
            row.milliseconds, row.p20, row.p80 = quantiles(self.clock, work, most)
        if row.milliseconds and self.bandwidth:
            row.floor_share = moved / (row.milliseconds / 1e3) / self.bandwidth
        row.forecast = self.forecasts.get((row.model, row.adapters, row.r, row.form, row.what))
        self.rows.append(row)
        print(as_line(row), flush=True)


def cuda_clock(work: Callable[[], object]) -> float:
    """Milliseconds of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def no_clock(work: Callable[[], object]) -> None:
    work()


def quantiles(
    clock: Clock, work: Callable[[], object], most: int = 50
) -> tuple[float | None, float | None, float | None]:
    """(median, p20, p80) of half a second of calls, 2 to `most`, after one that does not count."""
    work()
    first = clock(work)
    if first is None:
        return None, None, None
    count = min(most, max(2, int(500 / max(first, 1e-3))))
    times = sorted([first, *(clock(work) or 0.0 for _ in range(count - 1))])
    return statistics.median(times), times[count // 5], times[-1 - count // 5]


def machine(run: Run) -> dict[str, Any]:
    """Bandwidth of a copy (bytes read and written) and rate of a bfloat16 matmul, and what ran them."""
    size = 1 << 30 if run.device.type == "cuda" else 1 << 12
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy, _, _ = quantiles(run.clock, lambda: target.copy_(source))
    n = 8192 if run.device.type == "cuda" else 32
    A = torch.randn(n, n, device=run.device).bfloat16()
    product, _, _ = quantiles(run.clock, lambda: A @ A)
    run.bandwidth = 2 * size / (copy / 1e3) if copy else None
    return {
        "gpu": torch.cuda.get_device_name() if run.device.type == "cuda" else None,
        "copy_bytes_per_second": run.bandwidth,
        "matmul_flops_per_second": 2 * n**3 / (product / 1e3) if product else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }


def forecasts(gpu: str) -> dict[tuple[str, int, int, str, str], float]:
    """Milliseconds that bench/forecast.py has for the stages on the GPU of that name, if it knows it."""
    written = json.loads((Path(__file__).parent / "results" / "forecast.json").read_text())
    return {
        ("llama-3.1-8b", row["adapters"], row["r"], row["form"], row["what"]): row["milliseconds"]
        for row in written
        if row["gpu"].split()[0] in gpu and "PCIe" not in gpu
    }


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return done.stdout.strip()


def error(
    basis: kernels.Basis,
    table: kernels.Table,
    result: kernels.Result,
    method: Method,
    spectrum: kernels.Spectrum,
) -> float:
    """The largest relative error of the update against float64, over modules of each kind."""
    errors = []
    last = len(table.slots) - 1
    kinds = {shape: m for m, shape in enumerate(table.shapes)}
    for m in kinds.values():
        own = table.B(last, m), table.A(last, m), basis.U(m), basis.V(m)
        left, right = float64(*own, method, one_spectrum(spectrum, last, m, own[2]))
        exact = left @ right
        found = result.table.B(last, m).double() @ result.table.A(last, m).double()
        distance = float((found - exact).norm() / exact.norm())
        if isinstance(method, Correction):
            # A fit of rank r is that far from the exact result; what counts is that it knows how far.
            distance = abs(distance - float(result.cores.rank_error[last, m]))
        errors.append(distance)
    return max(errors)


def one_spectrum(spectrum: kernels.Spectrum, i: int, m: int, U: Tensor) -> Spectrum:
    return Spectrum(spectrum.S[m, : U.shape[1]], spectrum.edge[m], spectrum.scaling[i, m])


def stages(run: Run, name: str, work: Workload) -> None:
    """The kernels one by one, all together, and replayed from a graph."""
    method = method_of(work)
    basis, table = batch(work, run.device)
    ws = kernels.workspace(table, basis, method)
    spectrum = spectrum_of(work, ws.tiles.K, run.device)
    out = kernels.empty_like(table, method)
    whole = partial(kernels.correct, table, basis, method, spectrum, out=out, workspace=ws)
    result = whole()
    wrong = error(basis, table, result, method, spectrum)
    passed = wrong <= TOLERANCE
    counted = stage_bytes(work, ws.tiles)
    row = partial(Row, name, work.adapters, work.r, work.form, check=wrong)
    projection, cores = result.projection, result.cores
    run.add(
        row(what="project"),
        partial(kernels.project, table, basis, workspace=ws),
        counted["project"] + counted.get("add partial sums", 0),
        passed,
    )
    run.add(
        row(what="solve"),
        partial(kernels.solve, projection, method, spectrum, workspace=ws),
        counted["solve"],
        passed,
    )
    run.add(
        row(what="recompose"),
        partial(kernels.recompose, table, basis, projection, cores, workspace=ws, out=out),
        counted["recompose"],
        passed,
    )
    run.add(row(what="correct"), whole, work.floor, passed)
    if run.device.type == "cuda":
        run.add(row(what="correct, graph"), graph(whole).replay, work.floor, passed)


def graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    return captured


def eager(run: Run, name: str, work: Workload, compiled: bool) -> None:
    """The reference in float32 on the same device, the adapters of a module as one stack."""
    method = method_of(work)
    basis, table = batch(work, run.device)
    stacks = [
        (
            torch.stack([table.B(i, m) for i in range(work.adapters)]).float(),
            torch.stack([table.A(i, m) for i in range(work.adapters)]).float(),
            basis.U(m).contiguous(),
            basis.V(m).contiguous(),
        )
        for m in range(len(work.shapes))
    ]
    whole = spectrum_of(work, max(s.k for s in work.shapes), run.device)
    spectrum = Spectrum(whole.S[:1], whole.edge[:1], whole.scaling[:, 0])

    def one(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        own = project(B, A, U, V)
        if isinstance(method, Realignment):
            shift = realign.solve(own, spectrum, method)[0]
            pairs = [
                realign.recompose(B[i], A[i], U, V, part) for i, part in enumerate(shift.unbind())
            ]
            left, right = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        else:
            cores, _ = solve(own, method)
            left, right = recompose(B, A, U, V, own, mixing(cores, longer_side(B, A)))
        return left.to(work.dtype), right.to(work.dtype)

    function = torch.compile(one, dynamic=True) if compiled else one

    def all_modules() -> None:
        for stack in stacks:
            function(*stack)

    wrong = 0.0
    if work.form != "same":
        B, A, U, V = stacks[0]
        update, exact = (left.double() @ right.double() for left, right in (
            (X[-1] for X in function(*stacks[0])),
            float64(B[-1], A[-1], U, V, method, one_spectrum(whole, -1, 0, U)),
        ))  # fmt: skip
        wrong = float((update - exact).norm() / exact.norm())
    what = "reference, torch.compile" if compiled else "reference, eager"
    row = Row(name, work.adapters, work.r, work.form, what=what, check=wrong)
    run.add(row, all_modules, work.floor, wrong <= TOLERANCE, most=2)


def float64(
    B: Tensor, A: Tensor, U: Tensor, V: Tensor, method: Method, spectrum: Spectrum
) -> tuple[Tensor, Tensor]:
    """The factors of the result, that of rank 2r where CSULoRA's has rank r."""
    B, A, U, V = (X.double() for X in (B, A, U, V))
    own = project(B, A, U, V)
    if isinstance(method, Realignment):
        return realign.recompose(B, A, U, V, realign.solve(own, spectrum, method)[0])
    cores, _ = solve(own, replace(method, form="exact"))
    return recompose(B, A, U, V, own, mixing(cores, longer_side(B, A)))


def as_line(row: Row) -> str:
    def number(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    return (
        f"{row.model:13} N={row.adapters:<3} r={row.r:<3} {row.form:13} {row.what:24} "
        f"{number(row.milliseconds, '9.3f')} ms  forecast {number(row.forecast, '7.3f')}  "
        f"{number(row.bytes and row.bytes / 1e9, '8.3f')} GB  "
        f"{number(row.floor_share, '6.1%')} of copy  error {number(row.check, '.1e')} {row.note}"
    )


def cases(dry: bool, every: bool) -> list[tuple[str, int, int, str, str]]:
    """(model, N, r, form, what), the most telling first, so that a time limit cuts the least."""
    if dry:
        kinds = [
            *itertools.product(FORMS, ("stages",)),
            ("exact", "eager"),
            ("realign same", "eager"),
        ]
        return [("toy", 2, 3, form, what) for form, what in kinds]
    model = "llama-3.1-8b"
    chosen = [
        *((model, N, 16, form, "stages") for N in (64, 1) for form in FORMS),
        *((model, 64, 16, form, "eager") for form in ("exact", "realign same")),
        *((model, 1, 16, form, "eager") for form in ("exact", "realign same")),
        *((model, 8, 16, form, "stages") for form in FORMS[:3]),
        *((model, N, 64, form, "stages") for N in (1, 8) for form in FORMS[:3]),
        (model, 1, 16, "same", "eager"),
    ]
    if every:
        chosen += [(model, N, 16, "exact", "compiled") for N in (64, 1)]
        chosen += [
            (name, N, r, form, "stages")
            for name in (model, "llama-2-7b")
            for r in (16, 8, 64)
            for N in (1, 8, 64)
            for form in FORMS
        ]
    return list(dict.fromkeys(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all rows, hardware, versions and commit")
    parser.add_argument("--seconds", type=float, default=450, help="start nothing after this long")
    parser.add_argument(
        "--only", default="", help="rows whose name has all of these words, as in the table"
    )
    parser.add_argument(
        "--all", action="store_true", help="every rank and model, and torch.compile"
    )
    parser.add_argument("--dry", action="store_true", help="a toy model and no clock")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry runs without one")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    deadline = time.monotonic() + arguments.seconds
    run = Run(no_clock if arguments.dry else cuda_clock, device, deadline)
    facts = machine(run)
    run.forecasts = forecasts(facts["gpu"] or "")
    print(json.dumps(facts, indent=1))
    for model, N, r, form, kind in cases(arguments.dry, arguments.all):
        if not set(arguments.only.split()) <= {model, f"N={N}", f"r={r}", *form.split(), kind}:
            continue
        if time.monotonic() > deadline:
            print(f"time is up: {model} N={N} r={r} {form} and what follows was not run")
            break
        work = Workload.of(model, N, r, form)
        try:
            if kind == "stages":
                stages(run, model, work)
            else:
                eager(run, model, work, compiled=kind == "compiled")
        except torch.cuda.OutOfMemoryError:
            print(f"{model} N={N} r={r} {form} {kind}: does not fit in this GPU's memory")
        if on_gpu:
            torch.cuda.empty_cache()
    if arguments.json:
        text = json.dumps({**facts, "rows": [asdict(row) for row in run.rows]}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
