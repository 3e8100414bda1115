"""Correct an adapter when somebody first asks for it, as a server does, and keep the result.

    python examples/correct_folder_on_demand.py [--adapter DIR] [--subspace FILE] [--out-dir DIR]

Several threads ask for one output folder at the same moment. One of them does the work, the others wait
for it. A later call finds the folder up to date; one with another setting makes it anew.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import csulora

ASSETS = Path(csulora.__file__).parent / "demo" / "assets"


def subspace_of(file: Path | None) -> csulora.SafetySubspace:
    if file is not None:
        return csulora.SafetySubspace.load(file)
    like = ASSETS / "adapter"
    return csulora.estimate(ASSETS / "base", ASSETS / "aligned", rank=16, like=like)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", type=Path, default=ASSETS / "adapter")
    parser.add_argument("--subspace", type=Path)
    parser.add_argument("--out-dir", type=Path, default=Path("csulora-examples"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the threads below share the cores
    subspace, target = subspace_of(arguments.subspace), arguments.out_dir / "on-demand"

    def ask(correction: csulora.Correction) -> csulora.Outcome:
        return csulora.correct_folder(arguments.adapter, subspace, target, correction)

    def show(title: str, outcomes: list[csulora.Outcome]) -> None:
        made = sum(outcome.status == "corrected" for outcome in outcomes)
        change = {f"{o.totals.relative_change:.3f}" for o in outcomes if o.totals is not None}
        print(
            f"{title}: {made} of {len(outcomes)} did the work, relative change {', '.join(change)}"
        )

    mild, strong = csulora.Correction(), csulora.Correction().with_strength(100)
    with ThreadPoolExecutor(8) as threads:
        show("eight at once", list(threads.map(ask, [mild] * 8)))
        show("eight again", list(threads.map(ask, [mild] * 8)))
        show("other strengths", list(threads.map(ask, [strong] * 8)))
    show("asked once more", [ask(strong)])
    print(f"served from: {target}")


if __name__ == "__main__":
    main()
