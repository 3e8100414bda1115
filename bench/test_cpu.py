"""The CPU works of bench/cpu.py, and Safe LoRA's arithmetic beside ours, under pytest-benchmark.

    python -m pytest bench/test_cpu.py --benchmark-columns=median,iqr,rounds

The table's ratios stand in brackets, the fastest of a group being 1. For ratios that survive a
machine whose speed drifts, take bench/cpu.py, which runs the works in turn.
"""

import pytest
import torch
from cpu import works_of
from safe_lora import safe_lora
from shapes import LLAMA_3_1_8B, make

from csulora import LoraAdapter, correct

LAYERS, RANK, DIRECTIONS = 2, 16, 64
ADAPTER, WORKS = works_of(LAYERS, RANK, DIRECTIONS)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.benchmark(group=f"{LAYERS} of 32 layers, r = {RANK}, k = {DIRECTIONS}", warmup=True)
def test_correct(benchmark, work):
    result = benchmark(WORKS[work])
    if result is not None:
        corrected, report = result
        assert corrected.modules.keys() == ADAPTER.modules.keys()
        assert 0 < report.totals.relative_change < 1


@pytest.mark.parametrize("kind", ["self_attn.k_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("method", ["csulora", "Safe LoRA"])
@pytest.mark.benchmark(max_time=2, min_rounds=2)
def test_beside_safe_lora(benchmark, method, kind):
    benchmark.group = f"one {kind} of {LLAMA_3_1_8B[kind][0]} x {LLAMA_3_1_8B[kind][1]}"
    adapter, subspace = make(1, RANK, DIRECTIONS, torch.float32)
    name = f"model.layers.0.{kind}"
    module = adapter.modules[name]
    if method == "csulora":
        one = LoraAdapter({name: module}, adapter.config)
        benchmark(correct, one, subspace)
    else:
        D = torch.randn(*LLAMA_3_1_8B[kind], generator=torch.Generator().manual_seed(1))
        assert benchmark(safe_lora, module.B, module.A, D).shape == D.shape
