"""Correct the adapter of a PEFT model that is already in memory, and put it back; no file is written.

    python examples/in_memory_peft.py [--base DIR] [--aligned DIR] [--adapter DIR]

Needs transformers and peft (`pip install 'csulora[demo]'`).
"""

import argparse
from pathlib import Path

import peft
import torch
import transformers

import csulora

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

    # save_embedding_layers: PEFT would add whole embedding weights where LoRA has touched them.
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = csulora.LoraAdapter.from_tensors(tensors, model.peft_config["default"].to_dict())

    rank = 16 if arguments.base == ASSETS / "base" else 64
    subspace = csulora.estimate(arguments.base, arguments.aligned, rank=rank, like=adapter)
    # "exact" doubles the rank, for which the model has no room; "same" keeps every shape.
    corrected, report = csulora.correct(adapter, subspace, csulora.Correction(form="same"))
    # `adapter` is the model's own memory, so this changes it too; `corrected` is a copy.
    loaded = peft.set_peft_model_state_dict(model, corrected.tensors())
    assert not loaded.unexpected_keys

    print(f"{adapter}: norm of the update {before:.3f} -> {update_norm(model):.3f}")
    print(f"relative change {report.totals.relative_change:.3f}")
    for warning in report.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
