"""How much of D's energy its leading directions hold in trained worlds, by world.

python -m bench.safety.spectra OUT/models --worlds main,flat --seeds 10,11,12,13,14
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from bench.safety.results import spread, table
from bench.safety.stages import Trained, load_trained
from bench.safety.worlds import WORLDS

KS = (2, 4, 16, 64)


def shares(trained: Trained) -> list[float]:
    """The share of ||D||^2 in its k leading directions for each of KS, mean over modules."""
    rows = []
    for name in trained.lora.A:
        key = f"{name}.weight"
        D = (trained.aligned[key] - trained.base[key])[0].double()
        held = torch.linalg.svdvals(D).square().cumsum(0)
        rows.append([float(held[min(k, len(held)) - 1] / held[-1]) for k in KS])
    return [fmean(column) for column in zip(*rows, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="models of bench.safety.run")
    parser.add_argument("--worlds", default="main,flat,dpo,mixed,mixed_flat")
    parser.add_argument("--seeds", default="10,11,12,13,14")
    given = parser.parse_args(arguments)
    rows = []
    for name in given.worlds.split(","):
        found = [
            shares(load_trained(given.models, WORLDS[name], int(seed)))
            for seed in given.seeds.split(",")
        ]
        rows.append([name, *(spread([100 * x for x in ks]) for ks in zip(*found, strict=True))])
    print(table(["world", *(f"k {k}" for k in KS)], rows))


if __name__ == "__main__":
    main()
