"""What a kernel compiles to: instructions of its loops, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Code(NamedTuple):
    """Instructions that one warp issues."""

    loops: tuple[
        int, ...
    ]  # of each turn of the innermost loops that hold a product, in their order
    outside: int  # of everything else
    warps: int


def compile_code(compilation: tuple[Any, ...], capability: int) -> Code:
    """compilation: of `launches.Launched`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, attributes, options = compilation
    source = ASTSource(function, signature, constants, attributes)
    kept = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={k: options[k] for k in kept})
    sass = disassembled(compiled.asm["cubin"])
    code = instructions(sass)
    loops = [lines for lines in innermost_loops(code) if any("MMA" in text for _, text in lines)]
    outside = len(code) - sum(map(len, loops))
    return Code(tuple(map(len, loops)), outside, options["num_warps"])


def disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction but padding."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    return [(int(at, 16), text) for at, text in found if text.strip() != "NOP"]


def innermost_loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The instructions of each loop that has no other in it."""
    jumps = [(at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in code]
    loops = {(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at}
    return [
        [(at, text) for at, text in code if first <= at <= last]
        for first, last in sorted(loops)
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
