"""One adapter from end to end: estimate the subspace, look, correct, save, read what was done.

    python examples/correct_one.py [--base DIR] [--aligned DIR] [--adapter DIR] [--out-dir DIR]

Without arguments it takes the small model that ships with the package.
"""

import argparse
from pathlib import Path

import csulora

ASSETS = Path(csulora.__file__).parent / "demo" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "aligned", "adapter"):
        parser.add_argument(f"--{name}", type=Path, default=ASSETS / name)
    parser.add_argument("--out-dir", type=Path, default=Path("csulora-examples"))
    arguments = parser.parse_args()

    adapter = csulora.LoraAdapter.load(arguments.adapter)
    # The shipped model is small: 16 directions a module. Leave `rank` out for a real one.
    rank = 16 if arguments.base == ASSETS / "base" else 64
    subspace = csulora.estimate(arguments.base, arguments.aligned, rank=rank, like=adapter)
    subspace.save(arguments.out_dir / "subspace.safetensors")  # one file serves every adapter
    print(adapter, subspace, sep="\n")

    # Where the update lies, before anything is decided.
    shares = csulora.decompose(adapter, subspace).totals.relative_energy_before
    print("energy: " + ", ".join(f"{block} {100 * x:.1f} %" for block, x in shares.items()))

    correction = csulora.Correction(lambda_left=10, lambda_right=10, lambda_off=100)
    corrected, report = csulora.correct(adapter, subspace, correction)
    target = arguments.out_dir / "one"
    corrected.save(target, overwrite=True, report=report)  # replaces what was there

    total = report.totals
    kept = total.energy_after / total.energy_before
    print(f"{total.modules} modules, relative change {total.relative_change:.3f}")
    print(f"energy kept {100 * kept:.1f} %, of which:")
    for block, share in total.relative_energy_after.items():
        print(
            f"  {block:13} {100 * shares[block]:5.1f} % -> {100 * share:5.1f} % of the energy before"
        )
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
