"""Correct an adapter of a PEFT model that is already in memory; no file is written.

    python examples/in_memory_peft.py [--base DIR] [--aligned DIR] [--adapter DIR]

Needs transformers and peft (`pip install 'csulora[demo]'`).
"""

import argparse
from pathlib import Path

import peft
import torch
import transformers

import csulora
from csulora.integrations.peft import correct_model

ASSETS = Path(csulora.__file__).parent / "demo" / "assets"


def update_norm(model: peft.PeftModel) -> float:
    """Of everything that PEFT adds to the weights, by its own reckoning."""
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    updates = [layer.get_delta_weight("default").detach() for layer in layers]
    return float(torch.stack([dW.norm() for dW in updates]).norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "aligned", "adapter"):
        parser.add_argument(f"--{name}", type=Path, default=ASSETS / name)
    arguments = parser.parse_args()
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments.aligned, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, arguments.adapter)  # or the one you just trained
    before = update_norm(model)

    rank = 16 if arguments.base == ASSETS / "base" else 64
    subspace = csulora.estimate(
        arguments.base, arguments.aligned, rank=rank, like=arguments.adapter
    )
    # "exact" doubles the rank, and the model follows; "same" keeps every shape.
    report = correct_model(model, subspace, csulora.Correction(form="same"))

    print(f"norm of the update {before:.3f} -> {update_norm(model):.3f}")
    print(f"relative change {report.totals.relative_change:.3f}")
    for warning in report.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
