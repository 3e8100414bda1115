"""Compiled for GPUs on a machine without one: registers, spills, load widths, tensor-core instructions.

The default set covers every kernel, type and form on sm_80 and sm_90; `-m exhaustive` adds every tile
that the chooser can return, sm_100, and every granularity for every tile.
"""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from csulora_kernels import displacement, plan
from csulora_kernels.api import KINDS
from csulora_kernels.layout import Shape
from csulora_kernels.settings import GRANULARITIES
from csulora_kernels.tiles import REALIGN_MATRICES, choose

pytest.importorskip("triton")

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB that one program may have
TYPES = ("bfloat16", "float16", "float32")
RANKS = (16, 32, 64, 128)
# The tiles that spill, and the most that each may: project for float32 factors of rank above 64 on sm_80;
# recompose of rank 128 for float32 and float16, and a few registers of it for other ranks; and of solve
# on sm_100, which has no float64 tensor cores.
# At rank 16 a loop over tiles turns once, so a spill in it is one before it.
KNOWN_SPILLS = {
    (80, "project", "float32", 128): 400,
    (80, "realign", "float32", 16): 8,
    (80, "recompose", "float16", 128): 2,
    (80, "solve", "float32", 16): 8,
    (90, "realign", "float32", 16): 8,
    (90, "realign", "float32", 32): 8,
    (90, "recompose", "bfloat16", 16): 4,
    (90, "recompose", "float16", 16): 4,
    (90, "recompose", "float16", 32): 8,
    (90, "recompose", "float16", 128): 40,
    (90, "recompose", "float32", 64): 8,
    (90, "recompose", "float32", 128): 140,
    (90, "solve", "float32", 16): 8,
    (100, "recompose", "bfloat16", 32): 16,
    (100, "recompose", "bfloat16", 64): 24,
    (100, "recompose", "float16", 64): 24,
    (100, "recompose", "float32", 128): 80,
    (100, "solve", "float32", 32): 8,
    (100, "solve", "float32", 128): 8,
}


def configurations(arch, dtype, r, k, adapters):
    """Every kernel, as the launchers call it with what the chooser returns."""
    shapes = (Shape(14336, 4096, k), Shape(1024, 4096, k))
    tiles = choose(shapes, adapters, r, getattr(torch, dtype), arch, 132)
    common = {"arch": arch, "dtype": dtype, "K": tiles.K, "R": tiles.R}
    vector = 4 if dtype == "float32" else 8
    vectors = {"VEC_R": vector, "VEC_D": vector}
    yield {
        **common,
        **vectors,
        "kernel": "project",
        "GROUP": tiles.group,
        "STRIPS": tiles.project.strips,
        "BLOCK_K": tiles.project.block_k,
        "BLOCK_D": tiles.project.block_d,
        "EMULATE": False,
        "warps": tiles.project.warps,
        "stages": tiles.project.stages,
    }
    yield {**common, "kernel": "add_splits", "BLOCK": 1024, "warps": 4, "stages": 3}
    for kind, number in KINDS.items():
        yield {
            **common,
            **vectors,
            "kernel": "recompose",
            "GROUP": tiles.group,
            "STRIPS": plan.recompose_strips(tiles, kind),
            "BLOCK_J": tiles.recompose.rows,
            "BLOCK_K": tiles.recompose.block_k,
            "BLOCK_D": tiles.recompose.block_d,
            "KIND": number,
            "STAGES": tiles.recompose.stages,
            "EMULATE": False,
            "warps": tiles.recompose.warps,
            "stages": tiles.recompose.stages,
            "registers": tiles.recompose.registers,
        }
    solve = {
        **common,
        "dtype": "float32",  # it never sees the adapters' type
        "T": tiles.solve.tile,
        "warps": tiles.solve.warps,
        "registers": tiles.solve.registers,
        "stages": 1,
    }
    for same in (False, True):
        for granularity in GRANULARITIES:
            yield {**solve, "kernel": "solve", "GRANULARITY": granularity, "SAME": same}
        size = REALIGN_MATRICES * tiles.R**2 + 2 * tiles.K * (tiles.R + 1)
        shares = {"EDGE": True, "OPPOSED": same, "SAME": same}
        yield {**solve, **shares, "kernel": "realign", "SIZE": size}


def displacements(arch, dtype):
    vector = 4 if dtype == "float32" else 8
    for transposed, width in itertools.product((False, True), (16, 32, 64)):
        yield {
            "kernel": "displacement",
            "arch": arch,
            "dtype": dtype,
            "BLOCK_I": displacement.BLOCK_I,
            "BLOCK_L": displacement.BLOCK_L,
            "BLOCK_C": width,
            "VEC_N": vector,
            "VEC_C": 4,
            "TRANSPOSED": transposed,
            "warps": 4,
            "stages": 1,
        }


def unique(chosen):
    return list({json.dumps(c, sort_keys=True): c for c in chosen}.values())


def representative():
    cases = [
        *itertools.product((80, 90), TYPES, (16,), (64,), (64,)),
        *itertools.product((80, 90), ("bfloat16",), (64, 128), (100,), (1,)),
        # What csulora runs, however many adapters there are.
        *((arch, "bfloat16", 16, 64, 1) for arch in (80, 90)),
    ]
    chosen = unique(c for case in cases for c in configurations(*case))
    chosen += [c for c in displacements(90, "bfloat16") if c["BLOCK_C"] == 32]
    # Realignment is a part of what the other forms compile; large ranks of it are in the full set.
    chosen = [c for c in chosen if c.get("R") == 16 or not _realigns(c)]
    # Granularities differ in a few instructions, which have to compile; the full set has all of all.
    usual = {"R": 16, "arch": 90, "SAME": False}
    return [
        c
        for c in chosen
        if c.get("GRANULARITY", "direction") == "direction" or usual.items() <= c.items()
    ]


def _realigns(c):
    return c["kernel"] == "realign" or c.get("KIND") in (plan.SHIFTED, plan.EXTENDED)


def everything():
    cases = itertools.product((80, 90, 100), TYPES, RANKS, (64, 256), (1, 64))
    done = {json.dumps(c, sort_keys=True) for c in representative()}
    chosen = unique(c for case in cases for c in configurations(*case))
    chosen += [c for pair in itertools.product((80, 90, 100), TYPES) for c in displacements(*pair)]
    return [c for c in chosen if json.dumps(c, sort_keys=True) not in done]


def compile_all(chosen, cache):
    """Facts of each configuration, from two processes that share the work."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parents[1])}

    def part(share):
        done = subprocess.run(
            [sys.executable, str(HERE / "compiled.py")],
            input=json.dumps(share),
            env=environment,
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        even, odd = pool.map(part, (chosen[::2], chosen[1::2]))
    facts = [None] * len(chosen)
    facts[::2], facts[1::2] = even, odd
    return facts


def complaints(c, found):
    """What the compiled kernel fails in, as text; empty if nothing."""
    name = c["kernel"]
    allowed = KNOWN_SPILLS.get((c["arch"], name, c["dtype"], c.get("R")), 0)
    spilled = max(found["spill_stores"], found["spill_loads"])
    if name in ("solve", "realign") and c["arch"] < 100:  # around its calls it may spill
        spilled = found["spills_in_loops"]
    if spilled > allowed:
        yield f"spills: {found['spill_stores']} stores, {found['spill_loads']} loads"
    if found["shared"] > SHARED_MEMORY[c["arch"]] * 1024:
        yield f"{found['shared']} bytes of shared memory"
    held = name == "project" or (name == "recompose" and c["arch"] == 90 and c["GROUP"] > 1)
    if found["gaps"] and held:
        yield f"copies with gaps: {found['gaps']}"
    if found["beyond"]:
        yield f"operands read past their end: {found['beyond']}"
    if name in ("project", "recompose", "displacement"):
        vectors = sum(n for load, n in found["loads"].items() if load.endswith(".128"))
        narrow = [load for load in found["loads"] if "LDGSTS" in load and not load.endswith(".128")]
        if not vectors or narrow:
            yield f"global loads below 16 bytes: {found['loads']}"
        if c["arch"] < 100 and not any("MMA" in op for op in found["tensor_core"]):
            yield f"no tensor-core instructions: {found['tensor_core']}"
        single = sum(n for load, n in found["loads"].items() if load in ("LDG.E.U16", "LDG.E.U8"))
        if single:
            yield f"{single} two-byte loads"
        narrow = {store for store in found["stores"] if not store.endswith((".128", ".64"))}
        if name == "recompose" and narrow:
            yield f"global stores below 8 bytes: {found['stores']}"


def check(chosen, cache, capsys):
    facts = compile_all(chosen, cache)
    failed = [
        f"{c}: {text}"
        for c, found in zip(chosen, facts, strict=True)
        for text in complaints(c, found)
    ]
    report = os.environ.get("PYTEST_XDIST_WORKER") is None
    if report:
        with capsys.disabled():
            print_table(chosen, facts)
    assert not failed, "\n".join(failed)


def print_table(chosen, facts):
    print()
    for c, f in zip(chosen, facts, strict=True):
        constants = " ".join(
            f"{k}={c[k]}"
            for k in (
                "R",
                "K",
                "GROUP",
                "STRIPS",
                "KIND_A",
                "SAME",
                "GRANULARITY",
                "BLOCK_C",
                "TRANSPOSED",
            )
            if k in c
        )
        print(
            f"sm_{c['arch']} {c['kernel']:10} {c['dtype']:8} {constants:40} registers {f['registers']:3} "
            f"shared {f['shared']:6} spills {f['spill_stores']}/{f['spill_loads']} "
            f"loads {f['loads']} {f['tensor_core']}"
        )


@pytest.mark.slow
def test_compiled_kernels_do_not_spill_and_load_whole_vectors(tmp_path, capsys):
    check(representative(), tmp_path, capsys)


@pytest.mark.exhaustive
def test_every_tile_of_the_chooser_compiles_as_well(tmp_path, capsys):
    check(everything(), tmp_path, capsys)
