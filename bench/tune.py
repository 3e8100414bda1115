"""Times tiles of project and recompose on this GPU and prints what to put into csulora_kernels/tiles.py.

    python bench/tune.py [--adapters 64] [--ranks 16,64]

Every candidate has to pass the check of bench/gpu.py first. Compile the winners with
tests/kernels/test_compiled.py (the slow set) before they go in: a tile that spills may still win here.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
from gpu import TOLERANCE, cuda_clock, error, no_clock, quantiles
from workloads import Workload, batch, spectrum_of

import csulora_kernels as kernels
from csulora import Correction
from csulora_kernels.tiles import Tiles


def candidates(chosen: Tiles) -> Iterator[tuple[str, Tiles]]:
    """The chosen tiles and their neighbours, one kernel changed at a time."""
    project, solve, recompose = chosen.project, chosen.solve, chosen.recompose
    yield "chosen", chosen
    for block_d, warps, stages in itertools.product((16, 32, 64), (4, 8), (2, 3, 4)):
        launch = replace(project, block_d=block_d, warps=warps, stages=stages)
        for group in {1, chosen.group, 2 * chosen.group}:
            yield "project", replace(chosen, project=launch, group=group)
    for length, strips in itertools.product((1024, 4096, 16384), (1, 2)):
        launch = replace(project, split_length=length, strips=strips)
        yield "project", replace(chosen, project=launch)
    for block_d, warps, stages, rows in itertools.product(
        (32, 64, 128), (4, 8), (2, 3, 4), (64, 128)
    ):
        launch = replace(recompose, block_d=block_d, warps=warps, stages=stages, rows=rows)
        yield "recompose", replace(chosen, recompose=launch)
    for length, strips in itertools.product((512, 1024, 2048, 4096), (1, recompose.strips)):
        yield (
            "recompose",
            replace(chosen, recompose=replace(recompose, length=length, strips=strips)),
        )
    for programs, warps in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        count = max(1, solve.programs * programs // 2)
        yield "solve", replace(chosen, solve=replace(solve, programs=count, warps=warps))


def tune(work: Workload, device: torch.device, clock, limit: int | None) -> None:
    correction = Correction(form=work.form)
    basis, table = batch(work, device)
    out = kernels.empty_like(table, correction)
    chosen = kernels.workspace(table, basis, correction).tiles
    best: dict[str, tuple[float, Tiles]] = {}
    for stage, tiles in itertools.islice(candidates(chosen), limit):
        try:
            ws = kernels.workspace(table, basis, correction, tiles)
            run = partial(kernels.correct, table, basis, correction, out=out, workspace=ws)
            wrong = error(basis, table, run(), correction, spectrum_of(work, tiles.K, device))
        except (ValueError, triton.runtime.errors.OutOfResources):
            continue
        if wrong > TOLERANCE:
            print(f"{stage}: error {wrong:.1e} with {tiles}: left out")
            continue
        milliseconds = quantiles(clock, run)[0] or 0.0
        if stage not in best or milliseconds < best[stage][0]:
            best[stage] = milliseconds, tiles
            print(f"{stage}: {milliseconds:.3f} ms", flush=True)
    print(f"R = {chosen.R}, K = {chosen.K}, {work.dtype}, {work.adapters} adapters, {work.form}:")
    for stage, (milliseconds, tiles) in best.items():
        launch = tiles if stage == "chosen" else getattr(tiles, stage)
        print(f"  {stage}: {milliseconds:.3f} ms with group {tiles.group}, {launch}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--ranks", default="16,64", help="LoRA ranks, with commas between")
    parser.add_argument("--dry", action="store_true", help="a toy model, two candidates, no clock")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry runs without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for r in map(int, arguments.ranks.split(",")):
        if arguments.dry:
            tune(Workload.of("toy", 2, r, "exact"), device, no_clock, 2)
            continue
        for form in ("exact", "same"):
            work = Workload.of("llama-3.1-8b", arguments.adapters, r, form)
            tune(work, device, cuda_clock, None)


if __name__ == "__main__":
    main()
