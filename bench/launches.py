"""Processor time of one `csulora_kernels.correct` on the host, without a GPU.

    python bench/launches.py

A stand-in takes each launch where Triton hands it to the driver. Needs Triton without its interpreter:
our own code and Triton's run as on a GPU, but for what the driver does in a launch. bench/roofline.py
takes from the same stand-in what would be compiled.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from workloads import FORMS, Workload, batch, method_of, spectrum_of

import csulora_kernels as kernels
from csulora_kernels import buffers

ROUNDS, CALLS = 20, 100
PROCESSORS = 132


class Launched(NamedTuple):
    """One launch."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    compilation: tuple[Any, ...]  # function, signature, constants, attributes and options


_takers: list[
    Callable[[Launched], object]
] = []  # Triton keeps what it compiled; the last one takes


class Driver:
    """Triton's driver for one GPU that does nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def stand_in(take: Callable[[Launched], object], capability: int = 90) -> Iterator[None]:
    """Within, kernels launch with tensors on no GPU, "meta" included, and `take` is given each launch."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Compiled(CompiledKernel):
        """What Triton keeps of a compiled kernel."""

        def __init__(self, name: str, compilation: tuple[Any, ...]) -> None:
            self.name, self.function, self.packed_metadata, self.src = name, None, None, None
            self._run = lambda *given: _takers[-1](
                Launched(name, given[:3], given[9:], compilation)
            )

        def _init_handles(self) -> None:
            pass

    def compiled(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any,
        attributes: Any, *_: Any,
    ) -> Compiled:  # fmt: skip
        compilation = self, signature, constants, attributes, options.__dict__
        kernel = self.device_caches[device][0][key] = Compiled(self.fn.__name__, compilation)
        return kernel

    known = driver._active
    driver.set_active(Driver(capability))
    _takers.append(take)
    try:
        with (
            patch.object(JITFunction, "_do_compile", compiled),
            patch.object(buffers, "hardware", lambda device: (capability, PROCESSORS)),
            patch.object(buffers, "unavailable", lambda device: None),
            patch.object(torch.cuda, "current_device", lambda: -1),  # as of tensors on the CPU
        ):
            yield
    finally:
        _takers.pop()
        driver._active = known


def ready(work: Workload, device: torch.device | str = "meta") -> Callable[[], object]:
    """A call with `out` and `workspace`; on "meta" without memory."""
    method = method_of(work)
    basis, table = batch(work, torch.device(device))
    ws = kernels.workspace(table, basis, method)
    spectrum = spectrum_of(work, ws.tiles.K, table.data.device)
    out = kernels.empty_like(table, method)
    return partial(kernels.correct, table, basis, method, spectrum, out=out, workspace=ws)


def microseconds(work: Callable[[], object]) -> float:
    """Processor time of a call, the least of several rounds."""
    work()
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            work()
        least = min(least, time.process_time() - start)
    return least / CALLS * 1e6


def main() -> None:
    with stand_in(lambda launched: None):
        for form, adapters in itertools.product(FORMS, (1, 64)):
            call = ready(Workload.of("llama-3.1-8b", adapters, 16, form))
            print(f"N={adapters:<2} {form:13} {microseconds(call):6.1f} microseconds a call")


if __name__ == "__main__":
    main()
