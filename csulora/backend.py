"""The one place that decides where and by which implementation a correction runs."""

from __future__ import annotations

import torch

from csulora.errors import UsageError


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot run: an explicit choice works or fails, it never falls back.

    "auto" and "torch" both take the PyTorch reference; there are no Triton kernels to choose yet.
    """
    if backend not in ("auto", "torch", "triton"):
        raise UsageError(f"backend must be auto, torch or triton, not {backend!r}")
    if backend == "triton":
        raise UsageError("backend triton is not available in this version; use torch")


def pick_device(device: str) -> torch.device:
    """The device for "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, not {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch finds no CUDA device")
    return chosen
