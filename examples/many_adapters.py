"""Correct every adapter below a folder, watch it happen, and sum up what became of them.

    python examples/many_adapters.py [--adapters DIR --subspace FILE] [--out-dir DIR]

Without arguments it makes six adapters of the shipped one, one of them broken: a bad adapter fails by
itself and stops none of the others.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

import csulora

ASSETS = Path(csulora.__file__).parent / "demo" / "assets"


def make_adapters(folder: Path) -> None:
    """Six of the shipped adapter, each scaled; the last one has lost its weights."""
    for i in range(6):
        adapter = csulora.LoraAdapter.load(ASSETS / "adapter")
        for module in adapter.modules.values():
            module.B.mul_(1 + i / 2)
        adapter.save(folder / f"customer-{i % 2}" / f"run-{i}", overwrite=True)
    (folder / "customer-1" / "run-5" / "adapter_model.safetensors").unlink()


def show(outcome: csulora.Outcome, done: int, total: int) -> None:
    text = outcome.error or f"{outcome.seconds:.2f} s, {outcome.bytes_out} bytes written"
    print(f"{done}/{total} {outcome.output.name}: {outcome.status}, {text}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--subspace", type=Path)
    parser.add_argument("--out-dir", type=Path, default=Path("csulora-examples"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # parallel over adapters, not within one
    adapters, target = arguments.adapters, arguments.out_dir / "many"
    if adapters is None:
        adapters, like = arguments.out_dir / "adapters", ASSETS / "adapter"
        make_adapters(adapters)
        subspace = csulora.estimate(ASSETS / "base", ASSETS / "aligned", rank=16, like=like)
    else:
        subspace = csulora.SafetySubspace.load(arguments.subspace)
    for _ in range(2):  # the second time everything that went well is recognised
        outcomes = csulora.correct_many(
            [adapters], subspace, target, jobs=2, existing="refresh", on_done=show
        )
        counts = Counter(outcome.status for outcome in outcomes)
        print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    print(f"written below: {target}")


if __name__ == "__main__":
    main()
