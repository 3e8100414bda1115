"""Matrix products on the tensor cores that are as accurate as float32.

A bfloat16 or float16 factor is exact as it is stored, so only the float32 operand beside it is split:
into three bfloat16 parts (24 mantissa bits, cut apart exactly) or, scaled, two float16 parts (22 bits). Each part is one
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
def product(a, b, acc, EMULATE: tl.constexpr):
    """acc + a b for a (m, n), b (n, p) of one 16-bit type, acc (m, p) float32."""
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _cut(w):
    """The leading eight bits of a float32 as bfloat16, and the rest, exactly: no conversion unit."""
    bits = w.to(tl.uint32, bitcast=True)
    high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, w - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_parts(w):
    """Two bfloat16 numbers that give a float32 to 2^-17; w finite. Rounded by hand, without the conversion unit."""
    bits = (w.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, (w - bits.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def basis_parts(w, stored: tl.constexpr):
    """What products of a float32 basis tile with factors of that type multiply: high, middle, low."""
    if stored == tl.bfloat16:
        high, rest = _cut(w)
        middle, rest = _cut(rest)
        return high, middle, rest.to(tl.bfloat16)  # eight bits are left: exact
    elif stored == tl.float16:
        w = w * LIFT
        high = w.to(tl.float16)
        low = (w - high.to(tl.float32)).to(tl.float16)
        return high, low, low
    else:
        return w, w, w


@triton.jit
def basis_product(parts, x, EMULATE: tl.constexpr):
    """w x, (K, C) float32, for the parts of a basis tile w (K, D) and a factor tile x (D, C)."""
    high, middle, low = parts
    acc = tl.zeros([high.shape[0], x.shape[1]], tl.float32)
    if x.dtype == tl.bfloat16:
        acc = product(low, x, acc, EMULATE)
        acc = product(middle, x, acc, EMULATE)
        acc = product(high, x, acc, EMULATE)
    elif x.dtype == tl.float16:
        acc = product(low, x, acc, EMULATE)
        acc = product(high, x, acc, EMULATE) * (1.0 / LIFT)
    else:
        acc = tl.dot(high, x, input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
    return acc


@triton.jit
def gram_products(x, GROUP: tl.constexpr, EMULATE: tl.constexpr):
    """(GROUP, R, R): x^T x of each of the GROUP blocks of R columns of a factor tile x (D, GROUP R).

    Products of 16-bit entries are exact. A block alone wastes nothing on products of two adapters.
    """
    y = tl.trans(x)
    if EMULATE:
        y = y.to(tl.float32)
    if GROUP == 1:
        one = tl.dot(y, tl.trans(y), input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
        return tl.reshape(one, (1, x.shape[1], x.shape[1]))
    y = tl.reshape(y, (GROUP, x.shape[1] // GROUP, x.shape[0]))
    return tl.dot(
        y, tl.permute(y, (0, 2, 1)), input_precision="tf32x3", max_num_imprecise_acc=SEPARATE
    )


@triton.jit
def times_factor(y, x, acc, EMULATE: tl.constexpr):
    """acc + y x for a 16-bit factor tile x and the two parts of a float32 y."""
    y_high, y_low = y
    if x.dtype == tl.bfloat16:
        acc = product(y_low, x, acc, EMULATE)
        acc = product(y_high, x, acc, EMULATE)
    else:
        high, low = rounded_parts(x.to(tl.float32))
        acc = product(y_low, high, acc, EMULATE)
        acc = product(y_high, low, acc, EMULATE)
        acc = product(y_high, high, acc, EMULATE)
    return acc


@triton.jit
def full_product(a, b, acc, WIDE: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a b for float32 a, b: to 2^-21 for WIDE, else 2^-16."""
    if WIDE:
        acc += tl.dot(a, b, input_precision="tf32x3", max_num_imprecise_acc=SEPARATE)
    else:
        a_high, a_low = rounded_parts(a)
        b_high, b_low = rounded_parts(b)
        acc = product(a_low, b_high, acc, EMULATE)
        acc = product(a_high, b_low, acc, EMULATE)
        acc = product(a_high, b_high, acc, EMULATE)
    return acc
