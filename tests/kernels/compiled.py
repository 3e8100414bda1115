"""What the compiler makes of each kernel, on a machine without a GPU.

    python tests/kernels/compiled.py < configurations.json > facts.json

A configuration is {kernel, arch, dtype, warps, stages, registers and the kernel's constants by name}.
Compiling needs Triton without its interpreter, so the tests call this in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
# Arguments that are not pointers to float32, by name.
POINTERS = {
    "p_entries": "*i64",
    "p_out_entries": "*i64",
    "p_modules": "*i64",
    "p_work": "*i32",
    "p_energy": "*fp64",
    "p_before": "*fp64",
    "p_after": "*fp64",
    "p_change": "*fp64",
    "p_error": "*fp64",
    "p_scratch": "*fp64",
    "p_S": "*fp64",
    "p_edge": "*fp64",
    "p_scaling": "*fp64",
    "p_inverse": "*fp64",
}
STORED = ("p_data", "p_out", "p_base", "p_aligned")  # of the adapters' or checkpoints' own type


def kernel(name: str) -> Any:
    module = {"add_splits": "project"}.get(name, name)
    return getattr(__import__(f"csulora_kernels._{module}", fromlist=["_"]), f"{name}_kernel")


def facts(configuration: dict[str, Any]) -> dict[str, Any]:
    """Registers, bytes of shared and local memory, and counts of the instructions that matter."""
    given = dict(configuration)
    fn = kernel(given.pop("kernel"))
    arch, warps, stages = given.pop("arch"), given.pop("warps"), given.pop("stages")
    registers = given.pop("registers", None)
    stored = DTYPES[given.pop("dtype")]
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in given:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = stored if name in STORED else POINTERS.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            real = name.startswith("lambda") or name in ("strength", "gamma")
            signature[name] = "fp32" if real else "i32"
    source = ASTSource(fn=fn, signature=signature, constexprs=given, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _dump("-res-usage", file.name)
        sass = _dump("-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": compiled.metadata.shared,
        "spill_stores": len(re.findall(r"\bSTL\b", sass)),
        "spill_loads": len(re.findall(r"\bLDL\b", sass)),
        "loads": _count(sass, r"\b(LDG\.E[.\w]*|LDGSTS\.E[.\w]*)"),
        "stores": _count(sass, r"\b(STG\.E[.\w]*)"),
        "tensor_core": _count(sass, r"\b((?:HMMA|HGMMA|DMMA|QGMMA|UTCHMMA|UTCQMMA)[.\w]*)"),
        "spills_in_loops": _spills_in_product_loops(sass),
        "beyond": _beyond(compiled.asm["ttgir"]),
        "gaps": _gaps(compiled.asm["ttgir"]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
    }


def _gaps(ttgir: str) -> list[str]:
    """Copies past L1 in which a thread takes more elements side by side than one instruction copies: each
    instruction then leaves gaps, and L2 is asked for the same 32 bytes several times."""
    widths = {
        name: max(map(int, sizes.split(",")))
        for name, sizes in re.findall(
            r"(#blocked\d*) = #ttg\.blocked<{sizePerThread = \[([^]]*)", ttgir
        )
    }
    copies = re.findall(
        r"async_copy_global_to_local .*{contiguity = (\d+) .*: tensor<([^,]*), (#blocked\d*)>",
        ttgir,
    )
    return sorted({tile for width, tile, name in copies if widths[name] > int(width)})


def _beyond(ttgir: str) -> list[str]:
    """Products of warp groups whose left operand lies in shared memory and has fewer rows than the groups
    would read."""
    groups = {
        name: int(warps)
        for name, warps in re.findall(
            r"(#mma\d*) = #ttg\.nvidia_mma<.*warpsPerCTA = \[(\d+)", ttgir
        )
    }
    products = re.findall(
        r"ttng\.warp_group_dot .*: !ttg\.memdesc<(\d+)x\w+, .* -> tensor<[^#]*(#mma\d*)>", ttgir
    )
    return [f"{rows} rows of {name}" for rows, name in products if int(rows) < 16 * groups[name]]


def _spills_in_product_loops(sass: str) -> int:
    """Spilling instructions inside of an innermost loop that has a tensor-core product."""
    code = [
        (int(at, 16), text)
        for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    ]
    jumps = [(at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    innermost = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    inside = {
        at
        for first, last in innermost
        if any(first <= at <= last and "MMA" in text for at, text in code)
        for at, text in code
        if first <= at <= last and re.search(r"\b(STL|LDL)\b", text)
    }
    return len(inside)


def _dump(option: str, file: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, option, file], check=True, capture_output=True, text=True
    ).stdout


def _count(sass: str, pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in re.findall(pattern, sass):
        counts[name] = counts.get(name, 0) + 1
    return counts


if __name__ == "__main__":
    print(json.dumps([facts(one) for one in json.load(sys.stdin)]))
