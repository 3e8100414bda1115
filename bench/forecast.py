"""What the kernels should take on a GPU, before one runs them, and what they took.

    python bench/forecast.py [--gpu h200] [--beside bench/results/gpu-h200.json] [--json FILE]

For each stage the time of each limit alone: bytes of DRAM and of L2, operations of the tensor cores,
instructions issued (from the compiled code), and for solve the chain of one program (bench/chain.py). The
forecast is the largest of them, so it is what the stage would take if everything else were hidden behind
it. Nothing is fitted to a measurement, but for the rate of L2. Needs no GPU, and Triton without its
interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chain import cycles
from launches import ready as call_of
from launches import stand_in
from roofline import items, stage_bytes, stage_flops, stage_l2_bytes
from sass import Code, compile_code
from workloads import FORMS, Workload

from csulora_kernels import Tiles, plan

STAGES = ("project", "solve", "recompose")
RESULTS = Path(__file__).parent / "results"


class Gpu(NamedTuple):
    """NVIDIA's data sheets; L2, of which they say nothing, at the best rate of a timed stage."""

    name: str
    dram: float  # bytes a second
    l2: float  # bytes a second, of a whole GH100
    tensor: float  # bfloat16 operations a second, without sparsity
    clock: (
        float  # cycles a second at which the tensor cores reach that: 132 x 4096 operations a cycle
    )
    processors: int = 132
    issue: int = 4  # instructions of a warp that a processor issues a cycle
    capability: int = 90


# 843.9 million sectors of 32 bytes, by ncu, in the 3.87 ms of project at N = 64 (docs/kernels.md).
L2 = 7.0e12
GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, L2, 989e12, 1.83e9),
    "h200": Gpu("H200 SXM", 4.8e12, L2, 989e12, 1.83e9),
}


class Forecast(NamedTuple):
    """Milliseconds of one stage by each limit."""

    stage: str
    limits: dict[str, float]

    @property
    def binding(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def milliseconds(self) -> float:
        return max(self.limits.values())


def forecast(work: Workload, gpu: Gpu) -> list[Forecast]:
    """All three stages of a workload with 16-bit factors and at most one block of directions."""
    tiles = work.tiles(gpu.capability, gpu.processors)
    if tiles.recompose.block_k != tiles.K or work.dtype.itemsize != 2:
        raise ValueError("a forecast is for 16-bit factors and one block of directions")
    dram, l2, flops = (f(work, tiles) for f in (stage_bytes, stage_l2_bytes, stage_flops))
    code = codes(work, gpu.capability)
    found = []
    for stage in STAGES:
        limits = {"DRAM": dram[stage] / gpu.dram, "L2": l2[stage] / gpu.l2}
        if stage == "project" and "add partial sums" in dram:
            limits = {name: t + dram["add partial sums"] / gpu.dram for name, t in limits.items()}
        if stage == "solve":
            rounds = -(-work.adapters * len(work.shapes) // tiles.solve.programs)
            counted = chain_steps(work.form, work.r, max(s.k for s in work.shapes))
            limits["chain"] = rounds * cycles(counted, tiles.solve.warps) / gpu.clock
        else:
            limits["tensor"] = flops[stage] / gpu.tensor
            slots = issued(work, tiles, stage, code[f"{stage}_kernel"])
            limits["issue"] = slots / (gpu.processors * gpu.issue * gpu.clock)
        found.append(Forecast(stage, {name: 1e3 * t for name, t in limits.items()}))
    return found


def issued(work: Workload, tiles: Tiles, stage: str, code: Code) -> float:
    """Instructions that all warps of a launch issue: turns of the loops, in their order."""
    turns: Counter[tuple[int, int]] = (
        Counter()
    )  # by the body of the kernel, in the order of its code
    if stage == "project":
        block = tiles.project.block_d
        rows = plan.project_work(work.shapes, work.adapters, tiles).tolist()
        programs = [(0, item) for item in map(plan.ProjectItem._make, rows)]
    else:
        block = tiles.recompose.block_d
        programs = [(1 - item.wide, item) for item in items(work, tiles)]  # wide sides come first
    for narrow, item in programs:
        turns[narrow, item.side] += -(-(item.d_to - item.d_from) // block)
    # A side that is copied has no loop with a product: a turn of it counts as one of the other side.
    loops = (*code.loops[-len(turns) :], code.loops[-1])
    looped = sum(turns[body] * loops[i] for i, body in enumerate(sorted(turns)))
    # A program runs the code of one body besides.
    return code.warps * (looped + len(programs) * code.outside / len(turns))


@cache
def codes(work: Workload, capability: int) -> dict[str, Code]:
    """The compiled code of each launch but solve's, whose time is no matter of issue."""
    seen = []
    with stand_in(seen.append, capability):
        call_of(work)()
    names = {"project_kernel", "recompose_kernel"}
    return {
        one.name: compile_code(one.compilation, capability) for one in seen if one.name in names
    }


@cache
def chain_steps(form: str, r: int, k: int) -> dict[str, int]:
    """Counted in a process of its own: it takes the interpreter."""
    command = [sys.executable, str(Path(__file__).with_name("chain.py"))]
    command += ["--form", form, "--r", str(r), "--k", str(k)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def measured(file: Path) -> dict[tuple[int, int, str, str], float]:
    """Milliseconds by N, r, form and stage, of Llama-3.1-8B."""
    rows = json.loads(file.read_text())["rows"]
    return {
        (row["adapters"], row["r"], row["form"], row["what"]): row["milliseconds"]
        for row in rows
        if row["model"] == "llama-3.1-8b" and row["milliseconds"]
    }


def rows(gpu: Gpu) -> list[dict[str, Any]]:
    """The forecast of every stage, as bench/gpu.py prints it beside what it measures."""
    found = []
    for adapters, form in itertools.product((1, 64), FORMS):
        work = Workload.of("llama-3.1-8b", adapters, 16, form)
        for one in forecast(work, gpu):
            known = {"gpu": gpu.name, "adapters": adapters, "r": 16, "form": form}
            own = {"what": one.stage, "limits": one.limits, "binding": one.binding}
            found.append({**known, **own, "milliseconds": one.milliseconds})
    return found


def table(
    forecasts: list[dict[str, Any]], beside: dict[tuple[int, int, str, str], float]
) -> list[str]:
    """Rows of the page: each limit of each stage in milliseconds, the forecast, what was measured."""
    names = ("DRAM", "L2", "tensor", "issue", "chain")
    lines = [
        f"| N, form | stage | {' | '.join(names)} | forecast | measured | ratio |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for one in forecasts:
        cells = [f"{one['limits'][n]:.3f}" if n in one["limits"] else "" for n in names]
        expected = one["milliseconds"]
        took = beside.get((one["adapters"], one["r"], one["form"], one["what"]))
        cells += [f"{expected:.3f}, {one['binding']}"]
        cells += [f"{took:.3f}", f"{took / expected:.1f}"] if took else ["", ""]
        lines.append(f"| {one['adapters']}, {one['form']} | {one['what']} | {' | '.join(cells)} |")
    return lines


def shares(forecasts: list[dict[str, Any]], gpu: Gpu) -> list[str]:
    """Rows of the page: all stages in milliseconds, and the share of it that a copy would take."""
    lines = ["| N, form | all stages | share of a copy |", "| --- | --- | --- |"]
    sums: dict[tuple[int, str], float] = {}
    for one in forecasts:
        case = one["adapters"], one["form"]
        sums[case] = sums.get(case, 0.0) + one["milliseconds"]
    for (adapters, form), total in sums.items():
        floor = Workload.of("llama-3.1-8b", adapters, 16, form).floor
        share = 1e3 * floor / gpu.dram / total
        lines.append(f"| {adapters}, {form} | {total:.2f} | {share:.0%} |")
    return lines


def counts() -> list[str]:
    """Rows of the page: bytes of each stage beside the floor's terms, and operations."""
    lines = [
        "| N, r, form | factors | basis | result | floor | project | solve | recompose | to the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    operations = ["", "| N, r, form | project | recompose |", "| --- | --- | --- |"]
    for form, adapters in itertools.product(FORMS, (1, 64)):
        work = Workload.of("llama-3.1-8b", adapters, 16, form)
        counted, flops = stage_bytes(work, work.tiles()), stage_flops(work, work.tiles())
        total = sum(counted.values())
        project = counted["project"] + counted.get("add partial sums", 0)
        numbers = (work.factors, work.basis, work.result, work.floor, project)
        numbers += (counted["solve"], counted["recompose"])
        cells = " | ".join(f"{n / 1e9:.3f}" for n in numbers)
        lines.append(f"| {adapters}, 16, {form} | {cells} | {total / work.floor:.2f} |")
        cells = " | ".join(f"{flops[stage] / 1e12:.3f}" for stage in ("project", "recompose"))
        operations.append(f"| {adapters}, 16, {form} | {cells} |")
    return lines + operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="of the table")
    known = RESULTS / "gpu-h200.json"
    parser.add_argument("--beside", type=Path, default=known, help="rows that bench/gpu.py wrote")
    parser.add_argument("--json", type=Path, help="write the forecasts for all GPUs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu = GPUS[arguments.gpu]
    found = rows(gpu)
    beside = measured(arguments.beside)
    print("\n".join([*counts(), "", *table(found, beside), "", *shares(found, gpu)]))
    if arguments.json:
        every = [row for gpu in GPUS.values() for row in rows(gpu)]
        arguments.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
