"""One adapter of a PEFT model, corrected where it lies."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import nn

from csulora import (
    CsuloraError,
    LoraAdapter,
    Report,
    SafetySubspace,
    correct,
    estimate,
)
from csulora.integrations.peft.reading import Found, read
from csulora.integrations.peft.writing import digest, write
from csulora.settings import Method

# Of a configuration of PEFT: what was written, and how. PEFT neither compares nor saves it.
MARK = "_csulora"


def correct_model(
    model: nn.Module,
    subspace: SafetySubspace,
    correction: Method | None = None,
    adapter_name: str | None = None,
    *,
    again: bool = False,
    device: str = "auto",
) -> Report:
    """Correct one adapter of a PeftModel in place; the model gives what PEFT makes of a corrected folder.

    Other adapters and the base weights are not touched. Type, device and `requires_grad` of each factor
    stay, and so does the Parameter. Where the rank stays (`Correction(form="same")`, `Realignment()`) its
    memory stays too, and with it whatever an optimizer keeps. Form "exact" has rank 2r, for which every
    factor gets new memory and loses its gradient: an optimizer that has stepped must be made anew, as the
    report warns. The ranks and alphas in `model.peft_config` and in the layers follow. A model that
    `prepare_model_for_compiled_hotswap` has padded stays in its padding.

    Args:
        model: a `peft.PeftModel`, or what `torch.compile` made of one.
        correction: a `Correction` or a `Realignment`, `Correction()` if not given.
        adapter_name: the active adapter if not given.
        again: correct an adapter that is as an earlier call left it, instead of refusing it. PEFT does
            not save the mark by which this is known.
        device: "auto", "cpu" or "cuda", where to compute.

    Returns the report of `csulora.correct`. Raises CsuloraError, and leaves the model as it was, for what
    is not plain LoRA on linear weights and embeddings (DoRA and other variants, convolutions,
    `modules_to_save`, biases, trainable tokens, `target_parameters`, other tuners), merged adapters,
    scalings that are not those of the configuration, results that do not fit a padding, and as `correct`.
    """
    found = read(model, adapter_name)
    return _corrected(found, _marked(found, again), subspace, correction, again, device)


def _corrected(
    found: Found,
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Method | None,
    again: bool,
    device: str,
) -> Report:
    """`correct_model`, of an adapter that was read."""
    # What is computed here may become part of the model, which may be trained outside of this mode.
    with torch.inference_mode(False), torch.no_grad():
        corrected, report = correct(adapter, subspace, correction, again=again, device=device)
        grown = write(found, corrected)
    setattr(found.configs[found.name], MARK, (digest(found), corrected.made))
    if grown and any(X.requires_grad for slot in found.slots.values() for X in (slot.A, slot.B)):
        warning = (
            "the factors have new shapes, which what an optimizer keeps of the old ones does not fit: "
            "make it anew before the next step"
        )
        report = replace(report, warnings=[*report.warnings, warning])
    return report


def repair(
    model: nn.Module,
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    correction: Method | None = None,
    *,
    adapter_name: str | None = None,
    rank: int = 64,
    again: bool = False,
    device: str = "auto",
) -> Report:
    """Estimate the subspace for an adapter's modules and correct the adapter in place.

    Args:
        base, aligned: the checkpoints before and after alignment, folders or hub ids, as in
            `csulora.estimate`. The model's own weights are not read; it may be quantised.
        rank: directions of the subspace per module.
        The rest as in `correct_model`.

    Raises as `correct_model`, before anything is read where the adapter is none that can be corrected,
    and as `csulora.estimate`.
    """
    found = read(model, adapter_name)
    adapter = _marked(found, again)
    subspace = estimate(base, aligned, rank=rank, like=adapter, device=device)
    return _corrected(found, adapter, subspace, correction, again, device)


def _marked(found: Found, again: bool) -> LoraAdapter:
    """The adapter, with how it was corrected where it is as an earlier call left it.

    Raises CsuloraError for such an adapter without `again`.
    """
    written, made = getattr(found.configs[found.name], MARK, (None, {}))
    if written is None or written != digest(found):
        return found.adapter
    if not again:
        raise CsuloraError(
            f"adapter {found.name!r}: was corrected by csulora already and is unchanged since; "
            "load it anew, or correct it once more with again=True"
        )
    return replace(found.adapter, made=made)
