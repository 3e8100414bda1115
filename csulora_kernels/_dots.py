"""Matrix products on the tensor cores that are as accurate as float32.

A bfloat16 or float16 factor is exact as it is stored, so only the float32 operand beside it is split:
into three bfloat16 parts (24 mantissa bits) or, scaled, two float16 parts (22 bits). Each part is one
tensor-core product with float32 accumulation. Two float32 operands take tf32x3.

EMULATE upcasts bfloat16 operands: the interpreter's `tl.dot` multiplies their raw bits. The parts
are the same, so the interpreter tests the splitting.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Powers of two that lift the parts of a subspace entry (at most 1) out of float16's subnormals.
LIFT = tl.constexpr(4096.0)
# Any nonzero value keeps `acc += dot(...)` two additions: the compiler would otherwise run the sum
# over all of d inside the tensor cores' accumulator, which loses bits as it grows. Only float8
# products read the number itself.
SEPARATE = tl.constexpr(16)


@triton.jit
def _product(a, b, acc, EMULATE: tl.constexpr):
    """acc + a b for a (m, n), b (n, p) of one 16-bit type, acc (m, p) float32."""
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def basis_product(w, x, EMULATE: tl.constexpr):
    """w x, (K, C) float32, for a basis tile w (K, D) float32 and a factor tile x (D, C)."""
    acc = tl.zeros([w.shape[0], x.shape[1]], tl.float32)
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = _product(low, x, acc, EMULATE)
        acc = _product(middle, x, acc, EMULATE)
        acc = _product(high, x, acc, EMULATE)
    elif x.dtype == tl.float16:
        w = w * LIFT
        high = w.to(tl.float16)
        low = (w - high.to(tl.float32)).to(tl.float16)
        acc = _product(low, x, acc, EMULATE)
        acc = _product(high, x, acc, EMULATE) * (1.0 / LIFT)
    else:
        acc = tl.dot(w, x, input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
    return acc


@triton.jit
def gram_product(x, EMULATE: tl.constexpr):
    """x^T x, (C, C) float32, for a factor tile x (D, C); products of 16-bit entries are exact."""
    y = x
    if EMULATE:
        y = x.to(tl.float32)
    return tl.dot(tl.trans(y), y, input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
