"""Bytes and operations of the kernels, stage by stage, counted from the shapes and the work lists.

    python bench/roofline.py

prints the table of docs/kernels.md. A byte counts once for every time the launch asks DRAM for it: the
work lists put programs that share a tile side by side, so that all but the first find it in L2.
"""

from __future__ import annotations

import itertools

import torch
from workloads import FORMS, Workload

from csulora_kernels import Tiles
from csulora_kernels.plan import recompose_group


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


def stage_flops(work: Workload, tiles: Tiles) -> dict[str, int]:
    """Multiply-adds on the tensor cores, times two, as often as a product is split, padding included."""
    K, R, N = tiles.K, tiles.R, work.adapters
    parts = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 3}[work.dtype]
    gram = 3 if work.dtype == torch.float32 else 1
    groups = -(-N // tiles.group)
    C = tiles.group * R
    project = 2 * work.length * groups * (parts * K * C + gram * C * C)
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


def table() -> list[str]:
    """Rows of the page: bytes of each stage beside the floor's terms."""
    lines = [
        "| N, r, form | factors | basis | result | floor | project | solve | recompose | to the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form, adapters in itertools.product(FORMS, (1, 64)):
        r = 16
        work = Workload.of("llama-3.1-8b", adapters, r, form)
        counted = stage_bytes(work, work.tiles())
        total = sum(counted.values())
        project = counted["project"] + counted.get("add partial sums", 0)
        numbers = (work.factors, work.basis, work.result, work.floor, project)
        numbers += (counted["solve"], counted["recompose"])
        cells = " | ".join(f"{n / 1e9:.3f}" for n in numbers)
        lines.append(f"| {adapters}, {r}, {form} | {cells} | {total / work.floor:.2f} |")
    return lines


def flops_table() -> list[str]:
    lines = ["| N, r, form | project | recompose |", "| --- | --- | --- |"]
    for form, adapters in itertools.product(FORMS, (1, 64)):
        r = 16
        work = Workload.of("llama-3.1-8b", adapters, r, form)
        counted = stage_flops(work, work.tiles())
        cells = " | ".join(f"{counted[stage] / 1e12:.3f}" for stage in ("project", "recompose"))
        lines.append(f"| {adapters}, {r}, {form} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(), "", *flops_table()]))
