"""Putting a corrected adapter where it came from in a PEFT model, whole or not at all."""

from __future__ import annotations

import copy
import hashlib
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from csulora import CsuloraError, LoraAdapter, LoraModule
from csulora.files.peft_ranks import alpha_for_rank
from csulora.files.safetensors import tensor_bytes
from csulora.integrations.peft.reading import Found, Slot, stated_config


def write(found: Found, corrected: LoraAdapter) -> bool:
    """Put the corrected factors, their ranks and alphas in place; returns whether shapes have changed.

    Raises CsuloraError where they do not fit a padding. Whatever is raised, the model is as it was.
    """
    rslora = bool(found.config.get("use_rslora"))
    modules = {
        name: _padded(found.name, name, slot, corrected.modules[name], rslora)
        for name, slot in found.slots.items()
    }
    config = corrected.config
    if any(slot.fixed for slot in found.slots.values()):
        config = stated_config(corrected.config, modules)
    new_config = copy.copy(found.configs[found.name])  # two adapters may have been given the same
    for field, value in config.items():
        if value != found.config.get(field):
            setattr(new_config, field, value)
    staged = [
        (X, new.to(X.device, X.dtype, copy=True))
        for name, slot in found.slots.items()
        for X, new in ((slot.A, modules[name].A), (slot.B, modules[name].B))
    ]
    grown = any(X.shape != new.shape for X, new in staged)
    with ExitStack() as undo:
        for X, new in staged:
            old = X.detach().clone() if X.shape == new.shape else X.data
            undo.callback(_put, X, old, X.grad)
            _put(X, new, X.grad if X.shape == new.shape else None)
        for name, slot in found.slots.items():
            _tell(undo, slot, found.name, modules[name])
        undo.callback(found.configs.__setitem__, found.name, found.configs[found.name])
        found.configs[found.name] = new_config
        undo.pop_all()
    return grown


def digest(found: Found) -> str:
    """Of the factors as they lie in the model."""
    total = hashlib.sha256()
    for name, slot in sorted(found.slots.items()):
        for X in (slot.A, slot.B):
            total.update(f"{name}\0{X.dtype}\0{tuple(X.shape)}\0".encode())
            total.update(tensor_bytes(X.detach().cpu().contiguous()))
    return total.hexdigest()


def _padded(adapter: str, name: str, slot: Slot, new: LoraModule, rslora: bool) -> LoraModule:
    """The module with zeros up to the rank that a prepared model has for it."""
    missing = slot.rank - new.rank if slot.fixed else 0
    if missing < 0:
        raise CsuloraError(
            f"adapter {adapter!r}: the corrected {name} has rank {new.rank}, but the model was prepared "
            f"for hot swaps of rank {slot.rank} at most; use form 'same', or prepare it for more"
        )
    if not missing:
        return new
    return replace(
        new,
        A=nn.functional.pad(new.A, (0, 0, 0, missing)),
        B=nn.functional.pad(new.B, (0, missing)),
        alpha=alpha_for_rank(new.alpha, new.rank, slot.rank, rslora),
    )


def _put(X: nn.Parameter, new: Tensor, grad: Tensor | None) -> None:
    """Give a parameter other values; in its own memory, where they fit."""
    with torch.inference_mode(X.is_inference()), torch.no_grad():
        if X.shape == new.shape:
            X.copy_(new)
        else:
            X.data = new
        X.grad = grad


def _tell(undo: ExitStack, slot: Slot, adapter: str, new: LoraModule) -> None:
    """Let a layer know the rank and alpha of its factors, where the rank is another."""
    layer = slot.layer
    if (layer.r[adapter], layer.lora_alpha[adapter]) == (new.rank, new.alpha):
        return
    values: list[tuple[dict[str, Any], str, Any]] = [
        (layer.r, adapter, new.rank),
        (layer.lora_alpha, adapter, new.alpha),
    ]
    if not slot.fixed:  # the tensor stays, and a correction leaves the scaling as it is
        values.append((layer.scaling, adapter, new.scaling))
    if not slot.embedding:
        values.append((vars(layer.lora_A[adapter]), "out_features", new.rank))
        values.append((vars(layer.lora_B[adapter]), "in_features", new.rank))
    for holder, key, value in values:
        undo.callback(holder.__setitem__, key, holder[key])
        holder[key] = value
