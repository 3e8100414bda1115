"""Processor time of a sweep of many settings, without an evaluation, beside that of one correction.

    python bench/sweep.py [--layers 8] [--rounds 7]

Module shapes of Llama-3.1-8B, r = 16, k = 64, one thread. All works are timed in turn, round by round,
and the ratios are medians over rounds. The form `same` of CSULoRA, a fit for every setting, is apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from cpu import environment
from shapes import make

from csulora import LoraAdapter, SafetySubspace, correct
from csulora.sweep import STRENGTHS, Energies, families

GRIDS = {
    "csulora exact": {"methods": ["csulora"]},
    "realign, both forms": {"methods": ["realign"]},
    "the default grid": {},
    "csulora by direction and component, realign": {"granularities": ["direction", "component"]},
    "csulora same": {"methods": ["csulora"], "forms": ["same"]},
}


def swept(adapter: LoraAdapter, subspace: SafetySubspace, options: dict) -> int:
    """The number of settings, after the energies of all are known."""
    grid = families(subspace.rank, **options)
    energies = Energies(adapter, subspace, grid)
    return sum(len(energies.totals(family, STRENGTHS)) for family in grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adapter, subspace = make(arguments.layers, 16, 64, torch.float32)
    print(f"Llama-3.1-8B shapes, {arguments.layers} of 32 layers, r = 16, k = 64")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    times: dict[str, list[float]] = {"correct": [], **{name: [] for name in GRIDS}}
    counts = {}
    for count in range(arguments.rounds + 1):
        start = time.process_time()
        correct(adapter, subspace)
        spent = {"correct": time.process_time() - start}
        for name, options in GRIDS.items():
            start = time.process_time()
            counts[name] = swept(adapter, subspace, options)
            spent[name] = time.process_time() - start
        if count:  # the first round warms up
            for name, value in spent.items():
                times[name].append(value)
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["correct"], strict=True))
        print(
            f"{name:46s}{counts.get(name, 1):5d} settings {1e3 * statistics.median(values):9.1f} ms "
            f"{ratio:6.2f} x one correction"
        )


if __name__ == "__main__":
    main()
