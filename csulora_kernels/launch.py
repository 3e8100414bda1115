"""How kernels are started: on their tensors' device, without what a launch by Triton does every time, and
under Triton's interpreter one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from csulora_kernels.layout import ALIGNMENT

# Triton's interpreter keeps the grid and the place in it for the whole process, and puts its own functions
# into triton.language while a kernel runs.
_INTERPRETER = threading.Lock()


class Launcher:
    """A kernel with its grid and constants. The first call has Triton compile it, later ones start what came of it.

    So all calls have to be alike in what Triton specializes a kernel for: types, and pointers to multiples of
    16 bytes (`check_alignment`). The kernels' integers are not specialized. Calls may come from several threads.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: Mapping[str, Any],
        *,
        warps: int,
        stages: int,
        registers: int | None = None,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._keywords = {
            **constants,
            "num_warps": warps,
            "num_stages": stages,
            "maxnreg": registers,
            "enable_fp_fusion": True,  # the default of Triton before 3.10
        }
        # As a compiled kernel takes them: by position, behind the other arguments.
        self._constants = tuple(constants[n] for n in kernel.arg_names if n in constants)
        self._interpreted = interpreted(kernel)
        self._start: Callable[..., object] | None = None

    def __call__(self, data: Tensor, *arguments: Any) -> None:
        """Launch on the device of `data`, the first argument; Triton itself takes the current one."""
        if self._interpreted:
            with _INTERPRETER:
                self._kernel[self._grid](data, *arguments, **self._keywords)
        elif torch.cuda.current_device() == data.get_device():
            self._launch(data, *arguments)
        else:
            with torch.cuda.device(data.device):
                self._launch(data, *arguments)

    def _launch(self, *arguments: Any) -> None:
        if self._start is None:
            compiled = self._kernel[self._grid](*arguments, **self._keywords)
            self._start = compiled[self._grid]
        else:
            self._start(*arguments, *self._constants)


def interpreted(kernel: Any) -> bool:
    """Whether Triton interprets the kernel, as it does all or none of a process."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


class Turn:
    """For what one thread at a time may use: entering refuses, instead of waiting, while another is inside."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"{self._what} is in use by another thread; each needs its own")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def check_alignment(*tensors: Tensor) -> None:
    """Raise ValueError for a tensor that does not begin at a multiple of 16 bytes."""
    for X in tensors:
        if X.data_ptr() % ALIGNMENT:
            raise ValueError(f"a tensor at {X.data_ptr():#x} is not {ALIGNMENT}-byte aligned")
