"""CPU time and memory of a correction beside its floor and beside Safe LoRA, in one run.

    python bench/cpu.py [--layers 4] [--rounds 7] [--json FILE]

The floor is the matrix products that no implementation can avoid (U^T B, A V, U P, Q V^T and the two
Gram matrices) on float32 factors, at the same thread count. All are timed in turn, round by round, and
the ratios are medians over rounds, so that a machine whose speed drifts does not favour either side.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safe_lora import safe_lora
from shapes import LLAMA_3_1_8B, LLAMA_3_1_8B_LAYERS, make

from csulora import Correction, LoraAdapter, Realignment, SafetySubspace, correct


def products(adapter: LoraAdapter, subspace: SafetySubspace) -> Callable[[], None]:
    """A function that runs the unavoidable products alone, on factors already in float32."""
    items = [
        (m.B.float(), m.A.float(), subspace.modules[name].U, subspace.modules[name].V)
        for name, m in adapter.modules.items()
    ]

    def run() -> None:
        for B, A, U, V in items:
            P, Q = U.mT @ B, A @ V
            B.mT @ B
            A @ A.mT
            U @ P
            Q @ V.mT

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flops(adapter: LoraAdapter, k: int) -> float:
    """Multiply-adds of the floor, times two."""
    return sum(
        2.0 * (m.B.shape[0] + m.A.shape[1]) * m.rank * (2 * k + m.rank)
        for m in adapter.modules.values()
    )


def works_of(layers: int, r: int, k: int) -> tuple[LoraAdapter, dict[str, Callable[[], object]]]:
    """An adapter, and what is timed on it, the floor first."""
    adapter, subspace = make(layers, r, k, torch.float32)
    half, _ = make(layers, r, k, torch.bfloat16)
    return adapter, {
        "unavoidable products": products(adapter, subspace),
        "correct, exact, float32": lambda: correct(adapter, subspace, Correction()),
        "correct, exact, bfloat16": lambda: correct(half, subspace, Correction()),
        "correct, same, float32": lambda: correct(adapter, subspace, Correction(form="same")),
        "realign, same, float32": lambda: correct(adapter, subspace, Realignment(edge=False)),
        "realign, exact, float32": lambda: correct(
            adapter, subspace, Realignment(edge=False, form="exact")
        ),
    }


def compare(layers: int, r: int, k: int, rounds: int) -> list[dict]:
    """One row per kind of work, with its median time and its median ratio to the floor."""
    adapter, works = works_of(layers, r, k)
    times: dict[str, list[float]] = {name: [] for name in works}
    for count in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if count:  # the first round warms up
                times[name].append(spent)
    floor = times["unavoidable products"]
    share = LLAMA_3_1_8B_LAYERS / layers
    rows = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, floor, strict=True))
        rows.append(
            {
                "work": name,
                "seconds": statistics.median(values),
                "seconds_32_layers": statistics.median(values) * share,
                "ratio_to_products": ratio,
            }
        )
    rows[0]["gflops"] = flops(adapter, k) / rows[0]["seconds"] / 1e9
    return rows


def baseline(r: int) -> dict:
    """Safe LoRA on one q_proj; its cost for a layer follows from the module shapes by operations."""
    d_out, d_in = LLAMA_3_1_8B["self_attn.q_proj"]
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(d_out, d_in, generator=generator)
    B, A = (
        torch.randn(d_out, r, generator=generator),
        torch.randn(r, d_in, generator=generator),
    )
    adapter, subspace = make(1, r, 64, torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    one = LoraAdapter({name: adapter.modules[name]}, adapter.config)
    correct(one, subspace)
    ours = statistics.median(seconds(lambda: correct(one, subspace)) for _ in range(7))
    theirs = seconds(lambda: safe_lora(B, A, D))
    return {"module": "q_proj 4096 x 4096", "safe_lora_s": theirs, "ours_s": ours}


def environment() -> dict:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": platform.machine(),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {"environment": environment(), "layers": arguments.layers, "r": 16, "k": 64}
    print(f"Llama-3.1-8B shapes, {arguments.layers} of 32 layers, r = 16, k = 64")
    print(", ".join(f"{key} {value}" for key, value in result["environment"].items()))
    result["rows"] = compare(arguments.layers, 16, 64, arguments.rounds)
    for row in result["rows"]:
        print(
            f"{row['work']:28s} {1e3 * row['seconds']:8.1f} ms   scaled to 32 layers "
            f"{row['seconds_32_layers']:6.2f} s   {row['ratio_to_products']:5.2f} x the products"
        )
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {result['peak_rss_mb']:.0f} MB, of which bases and adapters are held")
    result["safe_lora"] = baseline(16)
    ratio = result["safe_lora"]["safe_lora_s"] / result["safe_lora"]["ours_s"]
    print(
        f"one q_proj: Safe LoRA's formula {result['safe_lora']['safe_lora_s']:.2f} s, ours "
        f"{1e3 * result['safe_lora']['ours_s']:.2f} ms, {ratio:.0f} times"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
