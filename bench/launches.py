"""Processor time of one `csulora_kernels.correct` on the host, without a GPU.

    python bench/launches.py

A stand-in takes each launch where Triton hands it to the driver. Needs Triton without its interpreter:
our own code and Triton's run as on a GPU, but for what the driver does in a launch.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu import method_of, spectrum_of
from roofline import FORMS, Workload

import csulora_kernels as kernels

ROUNDS, CALLS = 20, 100


class Driver:
    """Triton's driver for one GPU that does nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stand_in(take: Callable[..., object]) -> Iterator[None]:
    """Within, kernels launch from the CPU, and `take` is given the name and arguments of each launch."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Compiled(CompiledKernel):
        """What Triton keeps of a compiled kernel."""

        def __init__(self, name: str) -> None:
            self._run = lambda *given: take(name, *given[9:])
            self.name, self.function, self.packed_metadata, self.src = name, None, None, None

        def _init_handles(self) -> None:
            pass

    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any) -> Compiled:
        kernel = self.device_caches[device][0][key] = Compiled(self.fn.__name__)
        return kernel

    known = driver._active
    workspaces = sys.modules["csulora_kernels.workspace"]  # `kernels.workspace` is its function
    driver.set_active(Driver())
    try:
        with (
            patch.object(JITFunction, "_do_compile", compiled),
            patch.object(workspaces, "hardware", lambda device: (90, 132)),
            patch.object(workspaces, "unavailable", lambda device: None),
            patch.object(torch.cuda, "current_device", lambda: -1),  # as of tensors on the CPU
        ):
            yield
    finally:
        driver._active = known


def ready(adapters: int, form: str) -> Callable[[], object]:
    """A call with `out` and `workspace`, of the size of Llama-3.1-8B but for rank and directions."""
    r = 2
    work = Workload.of("llama-3.1-8b", adapters, r, form, k=8)
    method = method_of(work)
    zero = torch.zeros(())
    bases, factors = {}, {}
    for m, (d_out, d_in, k) in enumerate(work.shapes):
        bases[f"m{m}"] = zero.expand(d_out, k), zero.expand(d_in, k)
        factors[f"m{m}"] = tuple(
            X.to(work.dtype) for X in (zero.expand(d_out, r), zero.expand(r, d_in))
        )
    basis = kernels.pack_basis(bases)
    table = kernels.pack([factors] * adapters, basis)
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
    with stand_in(lambda *launch: None):
        for form, adapters in itertools.product(FORMS, (1, 8)):
            call = ready(adapters, form)
            print(f"N={adapters} {form:13} {microseconds(call):6.1f} microseconds a call")


if __name__ == "__main__":
    main()
