"""The chain of solve: what one program does one after the other for one module of one adapter.

    TRITON_INTERPRET=1 python bench/chain.py --form exact --r 16 --k 64

Counted under Triton's interpreter, as steps of the kernel as it is, on random factors as bench/gpu.py has
them. Functions end with barriers and most steps need the one before, so a program's time is close to the
sum of their latencies, if no other limit is in the way.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from workloads import Workload, batch, method_of, spectrum_of

import csulora_kernels as kernels
from csulora.method.stages import project
from csulora_kernels.layout import Shape

SIDE = 512  # of the module; the chain depends on ranks and directions alone
Steps = dict[str, int]  # kind to count; "kind elements" beside it


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Within, every step that the interpreter takes on float64 numbers and on memory is counted."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    seen: Counter[str] = Counter()

    def watch(stack: Any, home: Any, name: str, kind_of: Any) -> None:
        old = getattr(home, name)

        def counted(self: Any, *given: Any, **named: Any) -> Any:
            result = old(self, *given, **named)
            kind, size = kind_of(result, *given)
            if kind is not None:
                seen[kind] += 1
                seen[f"{kind} elements"] += size
            return result

        stack.append(patch.object(home, name, counted))

    def arithmetic(result: Any, *given: Any) -> tuple[str | None, int]:
        operation = given[-1]
        if result.dtype.scalar != tl.float64:
            return None, 0
        slow = operation in (np.divide, np.sqrt)
        return ("division" if slow else "arithmetic"), result.data.size

    def product(result: Any, a: Any, b: Any, *given: Any) -> tuple[str, int]:
        return "product", result.data.size * a.data.shape[-1]

    def reduced(result: Any, inputs: Any) -> tuple[str, int]:
        return "reduction", inputs[0].handle.data.size

    patches: list[Any] = []
    watch(patches, InterpreterBuilder, "binary_op", arithmetic)
    watch(patches, InterpreterBuilder, "unary_op", arithmetic)
    watch(patches, InterpreterBuilder, "create_dot", product)
    watch(patches, InterpreterBuilder, "create_barrier", lambda result: ("barrier", 1))
    watch(patches, InterpreterBuilder, "create_masked_load", lambda X, *_: ("load", X.data.size))
    watch(
        patches,
        InterpreterBuilder,
        "create_masked_store",
        lambda result, pointers, *_: ("store", pointers.data.size),
    )
    watch(patches, ReduceOps, "apply_impl", reduced)
    for one in patches:
        one.start()
    try:
        yield seen
    finally:
        for one in patches:
            one.stop()


def steps(form: str, r: int, k: int) -> Steps:
    """Of one module of one adapter."""
    torch.manual_seed(0)
    work = Workload((Shape(SIDE, SIDE, k),), 1, r, form, torch.float32)
    basis, table = batch(work, torch.device("cpu"))
    method = method_of(work)
    tiles = work.tiles()
    tiles = replace(tiles, solve=replace(tiles.solve, programs=1))
    ws = kernels.workspace(table, basis, method, tiles)
    found = project(table.B(0, 0), table.A(0, 0), basis.U(0), basis.V(0))
    for X, own in zip(ws.projection, found, strict=True):
        X[0, 0, : own.shape[0], : own.shape[1]] = own
    with counting() as seen:
        kernels.solve(
            ws.projection, method, spectrum_of(work, ws.tiles.K, basis.data.device), workspace=ws
        )
    return dict(seen)


# Cycles. Latencies of Hopper as published microbenchmarks have them (Luo et al., arXiv 2402.13499: L1 41,
# shared memory 29); shuffles, barriers and float64 arithmetic are of one order on all GPUs since Volta.
LATENCY = {
    "load": 41,
    "store": 4,
    "product": 33,
    "reduction": 5 * (23 + 8),
    "barrier": 25,
    "division": 120,
    "arithmetic": 8,
}
ACROSS_WARPS = 2 * 29 + 25  # more of a reduction: through shared memory and a barrier
# Elements a cycle of one warp: float64 multiply-adds of its tensor core and of its lanes, and 64 bytes.
RATE = {"load": 8, "store": 8, "product": 34, "reduction": 16, "division": 1, "arithmetic": 16}


def cycles(counted: Steps, warps: int) -> float:
    """Of one module, all steps one after the other."""
    total = 0.0
    for kind, latency in LATENCY.items():
        n = counted.get(kind, 0)
        spread = counted.get(f"{kind} elements", 0) / (RATE.get(kind, math.inf) * warps)
        total += n * (latency + (ACROSS_WARPS if kind == "reduction" and warps > 1 else 0)) + spread
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", default="exact")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--k", type=int, default=64)
    arguments = parser.parse_args()
    print(json.dumps(steps(arguments.form, arguments.r, arguments.k)))


if __name__ == "__main__":
    main()
