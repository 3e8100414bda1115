"""Bytes and operations of the kernels, stage by stage, counted from the shapes and the work lists.

A byte counts once for every time the launch asks DRAM for it: the work lists put programs that share a
tile side by side, so that all but the first find it in L2. bench/forecast.py makes milliseconds of them.
"""

from __future__ import annotations

import torch
from workloads import Workload

from csulora_kernels import Tiles
from csulora_kernels.plan import project_groups, recompose_group


def stage_bytes(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Bytes that each launch moves, intermediate results included."""
    K, R = tiles.K, tiles.R
    entries = work.adapters * len(work.shapes)
    projection = 4 * entries * (2 * K * R + 2 * R * R)
    partial = 0
    for s in work.shapes:
        for d in (s.d_out, s.d_in):
            cut = -(-d // tiles.split_length) - 1
            partial += 4 * work.adapters * (K * R + R * R) * cut
    kind = work.kind
    H, same = kind.halves, kind.form == "same"
    # Written by solve and read by recompose: Y_out and Z, and X_out and W or P. Written only: the rest.
    read = 4 * entries * (H * R * R + H * K * R + K * R + (R * R if same else 0))
    written = 4 * entries * (2 * H * R * R + H * K * R + (K * R + 2 * R * R if same else 0))
    again = work.factors + work.basis
    if kind.method == "realign":
        read = 4 * entries * (K * R + (0 if same else K))
        written = read + 8 * entries * R
        if same:  # nothing of the side of B
            d_in = sum(s.d_in for s in work.shapes)
            again = again * d_in // work.length
    # A factor is read once for each block of directions; models have one.
    blocks = K // tiles.project.block_k
    counted = {"project": blocks * work.factors + work.basis + projection + partial}
    if partial:
        counted["add partial sums"] = 2 * partial + partial
    counted["solve"] = projection + written + 8 * entries * 11
    counted["recompose"] = again + read + work.result
    return counted


def stage_l2_bytes(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Bytes between L2 and the processors: what each program asks for, as often as it does."""
    counted = stage_bytes(work, tiles)
    H, N = work.kind.halves, work.adapters
    d_out, d_in = (sum(getattr(s, side) for s in work.shapes) for side in ("d_out", "d_in"))
    k = max(s.k for s in work.shapes)
    groups_B, groups_A = (-(-N // recompose_group(tiles, h)) for h in (1, H))
    writes_B = work.kind.writes_B
    project = counted["project"] + (project_groups(N, tiles) - 1) * work.basis
    again = 4 * k * ((groups_B - 1) * d_out * writes_B + (groups_A - 1) * d_in)
    # The coefficients of an adapter come once a program, that is once a stretch.
    stretches = sum(-(-d // tiles.recompose_length) for s in work.shapes for d in s[:2])
    each = 4 * (tiles.K * H * tiles.R + H * tiles.R * tiles.R)
    coefficients = max(0, stretches - len(work.shapes)) * N * each
    return {**counted, "project": project, "recompose": counted["recompose"] + again + coefficients}


def stage_flops(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Multiply-adds on the tensor cores, times two, as often as a product is split, padding included."""
    K, R, N = tiles.K, tiles.R, work.adapters
    parts = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 3}[work.dtype]
    gram = 3 if work.dtype == torch.float32 else 1
    C = tiles.group * tiles.strips * R
    project = 2 * work.length * project_groups(N, tiles) * (parts * K * C + gram * C * R)
    # A product with the cores of several adapters is one with the zeros between them.
    H, split = work.kind.halves, 3
    core = 3 if work.dtype != torch.bfloat16 else 2
    width_B, width_A = (recompose_group(tiles, h) * R for h in (1, H))
    cores_B = core * width_B * R if work.form == "same" else 0
    cores_A = core * width_A * H * R if work.kind.method == "csulora" else 0
    per_row = 2 * (split * K * R + cores_B) if work.kind.method == "csulora" else 0  # of B
    per_column = 2 * (split * K * H * R + cores_A)  # of A
    d_out, d_in = (sum(getattr(s, side) for s in work.shapes) for side in ("d_out", "d_in"))
    return {"project": project, "recompose": N * (d_out * per_row + d_in * per_column)}
