"""The one place that decides where and by which implementation a correction runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

import csulora_kernels
from csulora.errors import CsuloraError, UsageError
from csulora.pipeline import by_torch, by_triton
from csulora.pipeline.plan import Plan
from csulora.pipeline.solved import Solved
from csulora.settings import BACKENDS

Solver = Callable[[Sequence[Plan], torch.device], Iterator[Solved | CsuloraError]]


def pick_solver(backend: str, device: torch.device) -> Solver:
    """The backend's function from plans to solutions; raises as `pick_backend`."""
    return by_triton.solve if pick_backend(backend, device) == "triton" else by_torch.solve


def pick_backend(backend: str, device: torch.device) -> Literal["torch", "triton"]:
    """ "torch" or "triton" for work on that device.

    "auto" takes Triton on CUDA and torch elsewhere. An explicit choice works or fails: UsageError says
    why Triton cannot run there.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend must be auto, torch or triton, not {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = csulora_kernels.unavailable(device)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "torch"
    raise UsageError(f"backend triton cannot run: {reason}")


def check_backend(backend: str, device: str = "auto") -> None:
    """Raise UsageError for a backend that cannot run on the device of that name."""
    pick_backend(backend, pick_device(device))


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
