"""Bytes and operations of the kernels, stage by stage, counted from the shapes and the work lists.

A byte counts once for every time the launch asks DRAM for it: the work lists put programs that share a
tile side by side, so that all but the first find it in L2. bench/forecast.py makes milliseconds of them.
"""

from __future__ import annotations

import torch
from workloads import Workload

from csulora_kernels import Tiles
from csulora_kernels.plan import (
    RecomposeItem,
    product_rows,
    project_groups,
    recompose_group,
    recompose_strips,
    recompose_work,
    strip_group,
)


def stage_bytes(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Bytes that each launch moves, intermediate results included."""
    K, R = tiles.K, tiles.R
    entries = work.adapters * len(work.shapes)
    projection = 4 * entries * (2 * K * R + 2 * R * R)
    partial = 0
    for s in work.shapes:
        for d in (s.d_out, s.d_in):
            cut = -(-d // tiles.project.split_length) - 1
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
    N, R, k = work.adapters, tiles.R, max(s.k for s in work.shapes)
    project = counted["project"] + (project_groups(N, tiles) - 1) * work.basis
    # Counted already: the basis for the first group, an adapter's coefficients for the first stretch.
    again = 0
    for item in items(work, tiles):
        if item.group:
            again += 4 * k * (item.d_to - item.d_from)
        if item.d_from:
            width = recompose_group(tiles, work.kind, item.wide)
            rows = product_rows(tiles, work.kind, item.wide)
            cores = 0 if item.wide or work.kind.method == "realign" else rows * R
            again += 4 * min(width, N - item.group * width) * (tiles.K * rows + cores)
    return {**counted, "project": project, "recompose": counted["recompose"] + again}


def stage_flops(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Multiply-adds on the tensor cores, times two, as often as a product is split, padding included."""
    K, R, N = tiles.K, tiles.R, work.adapters
    parts = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 3}[work.dtype]
    gram = 3 if work.dtype == torch.float32 else 1
    C = tiles.group * tiles.project.strips * R
    project = 2 * work.length * project_groups(N, tiles) * (parts * K * C + gram * C * R)
    # A product with the cores of several adapters is one with the zeros between them.
    split, core = 3, 3 if work.dtype != torch.bfloat16 else 2
    strips = recompose_strips(tiles, work.kind)
    recompose = 0
    for item in items(work, tiles):
        group = strip_group(tiles, work.kind, item.wide)
        width, rows = group * R, group * product_rows(tiles, work.kind, item.wide)
        if work.kind.method == "realign":
            each = split * K * rows if item.side else 0
        else:
            each = split * K * rows + (0 if item.wide else core * width * rows)
        recompose += 2 * (item.d_to - item.d_from) * strips * each
    return {"project": project, "recompose": recompose}


def items(work: Workload, tiles: Tiles) -> list[RecomposeItem]:
    """The programs of recompose."""
    rows = recompose_work(work.shapes, work.adapters, tiles, work.kind)
    return [RecomposeItem(*row) for row in rows.tolist()]
