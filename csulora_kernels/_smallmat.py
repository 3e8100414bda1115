"""Small dense float64 algebra for one program: matrices of R x R in scratch memory, by tiles of T x T.

Scratch is global memory that one program alone uses and that stays in cache; with it one code serves
every rank, where registers would end at 64. `p_s` is the scratch of the program, and a matrix is its number there: a
number is one register where a pointer is two, and the solve kernel holds many. Each function ends with a barrier: what its threads wrote
is what the next function's threads read. A result may not be one of its own operands.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(i, j, R: tl.constexpr, T: tl.constexpr):
    """(T, T) offsets of tile (i, j) of a row-major matrix with R columns."""
    return (i * T + tl.arange(0, T))[:, None] * R + (j * T + tl.arange(0, T))[None, :]


@triton.jit
def tile_count(SIZE: tl.constexpr, T: tl.constexpr):
    """SIZE // T, hidden from the compiler by a factor that is always 1 (the grid is flat): with the
    loops over tiles unrolled, the kernel for rank 128 is thirty times the code and spills."""
    return (SIZE // T) * tl.num_programs(1)


@triton.jit(noinline=True)
def multiply(
    p_s,
    c,
    a,
    b,
    base,
    alpha,
    gamma,
    R: tl.constexpr,
    T: tl.constexpr,
    TRANS_A: tl.constexpr = False,
    TRANS_B: tl.constexpr = False,
    BASE: tl.constexpr = False,
):
    """c = alpha a b + gamma I (+ base), with a and b transposed as asked."""
    p_c = p_s + c * (R * R)
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    p_base = p_s + base * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_c = tl.zeros([T, T], tl.float64)
            for n in range(tile_count(R, T)):
                if TRANS_A:
                    b_a = tl.trans(tl.load(p_a + tile(n, i, R, T)))
                else:
                    b_a = tl.load(p_a + tile(i, n, R, T))
                if TRANS_B:
                    b_b = tl.trans(tl.load(p_b + tile(j, n, R, T)))
                else:
                    b_b = tl.load(p_b + tile(n, j, R, T))
                b_c = tl.dot(b_a, b_b, b_c, out_dtype=tl.float64)
            row = i * T + tl.arange(0, T)
            column = j * T + tl.arange(0, T)
            b_c = alpha * b_c + tl.where(row[:, None] == column[None, :], gamma, 0.0)
            if BASE:
                b_c += tl.load(p_base + tile(i, j, R, T))
            tl.store(p_c + tile(i, j, R, T), b_c)
    tl.debug_barrier()


@triton.jit(noinline=True)
def inner(p_s, a, b, c, d, R: tl.constexpr, T: tl.constexpr, MINUS: tl.constexpr):
    """<a, c>, or <a - b, c - d> if MINUS, as one number."""
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    p_c = p_s + c * (R * R)
    p_d = p_s + d * (R * R)
    total = tl.zeros([T], tl.float64)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            o_tile = tile(i, j, R, T)
            b_a = tl.load(p_a + o_tile)
            b_c = tl.load(p_c + o_tile)
            if MINUS:
                b_a -= tl.load(p_b + o_tile)
                b_c -= tl.load(p_d + o_tile)
            total += tl.sum(b_a * b_c, axis=1)
    tl.debug_barrier()
    return tl.sum(total, axis=0)


@triton.jit(noinline=True)
def scaled_identity(p_s, c, value, R: tl.constexpr, T: tl.constexpr):
    """c = value I."""
    p_c = p_s + c * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            row = i * T + tl.arange(0, T)
            column = j * T + tl.arange(0, T)
            b_c = tl.where(row[:, None] == column[None, :], value, 0.0).to(tl.float64)
            tl.store(p_c + tile(i, j, R, T), b_c)
    tl.debug_barrier()


@triton.jit(noinline=True)
def copy(p_s, c, a, R: tl.constexpr, T: tl.constexpr):
    """c = a."""
    p_c = p_s + c * (R * R)
    p_a = p_s + a * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            tl.store(p_c + tile(i, j, R, T), tl.load(p_a + tile(i, j, R, T)))
    tl.debug_barrier()


@triton.jit(noinline=True)
def extrapolate(p_s, c, a, b, factor, R: tl.constexpr, T: tl.constexpr):
    """c = b + factor (b - a), then a = b."""
    p_c = p_s + c * (R * R)
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_b = tl.load(p_b + tile(i, j, R, T))
            b_a = tl.load(p_a + tile(i, j, R, T))
            tl.store(p_c + tile(i, j, R, T), b_b + factor * (b_b - b_a))
            tl.store(p_a + tile(i, j, R, T), b_b)
    tl.debug_barrier()


@triton.jit
def _largest(b_x):
    """The largest entry of a vector and where it is; a NaN counts as -1, which is no pivot.

    Without that the place would be any, and Triton's interpreter (3.9.0) fails where all are NaN.
    """
    return tl.max(tl.where(b_x == b_x, b_x, -1.0), axis=0, return_indices=True)


@triton.jit
def _sweep_tile(b_s, smallest, T: tl.constexpr, PIVOTED: tl.constexpr):
    """-(s^-1) for a symmetric positive semidefinite tile, and its smallest pivot: the sweep operator.

    PIVOTED: largest pivot first, to pivots of `smallest`: what is left is the null space, whose rows and
    columns come back as zeros, and the rest is the inverse of a largest regular part (a reflexive
    generalized inverse). Else in the order of the rows, where a pivot that is not positive counts as 1.
    The sweep keeps the matrix symmetric, so a row serves as its column too.
    """
    index = tl.arange(0, T)
    row = index[:, None]
    column = index[None, :]
    b_left = tl.full([T], 1, tl.int32)
    lowest = tl.full([], float("inf"), tl.float64)
    for step in range(T):
        if PIVOTED:
            b_diagonal = tl.sum(tl.where(row == column, b_s, 0.0), axis=0)
            pivot, n = _largest(tl.where(b_left > 0, b_diagonal, -1.0))
            regular = pivot > smallest
        else:
            n = step
            pivot = tl.sum(tl.sum(tl.where((row == n) & (column == n), b_s, 0.0), axis=0), axis=0)
            regular = pivot > 0
        lowest = tl.where(pivot >= lowest, lowest, pivot)  # a NaN too
        inverse = 1.0 / tl.where(regular, pivot, 1.0)
        if PIVOTED:
            inverse = tl.where(regular, inverse, 0.0)
        b_row = tl.sum(tl.where(row == n, b_s, 0.0), axis=0)
        b_column = tl.sum(tl.where(column == n, b_s, 0.0), axis=1)
        b_swept = b_s - b_column[:, None] * (b_row * inverse)[None, :]
        b_swept = tl.where(row == n, (b_row * inverse)[None, :], b_swept)
        b_swept = tl.where(column == n, (b_column * inverse)[:, None], b_swept)
        b_swept = tl.where((row == n) & (column == n), -inverse, b_swept)
        if PIVOTED:
            b_s = tl.where(regular, b_swept, b_s)
            b_left = tl.where(index == n, tl.where(regular, 0, 1), b_left)
        else:
            b_s = b_swept
    if PIVOTED:
        b_s = tl.where((b_left[:, None] > 0) | (b_left[None, :] > 0), 0.0, b_s)
    return b_s, lowest


@triton.jit(noinline=True)
def negative_inverse(
    p_s, m, tolerance, R: tl.constexpr, T: tl.constexpr, PIVOTED: tl.constexpr = True
):
    """m = -(m^-1) in place, m symmetric positive semidefinite: the sweep operator by blocks of T.

    Pivots below `tolerance` times the largest diagonal entry count as zero; see _sweep_tile. Without pivoting
    returns the smallest pivot, that of a Cholesky factorization squared.
    """
    p_m = p_s + m * (R * R)
    smallest = tolerance * tl.max(tl.load(p_m + tl.arange(0, R) * (R + 1)), axis=0)
    lowest = tl.full([], float("inf"), tl.float64)
    tl.debug_barrier()
    for n in range(tile_count(R, T)):
        b_pivot, found = _sweep_tile(tl.load(p_m + tile(n, n, R, T)), smallest, T, PIVOTED)
        lowest = tl.where(found >= lowest, lowest, found)
        for i in range(tile_count(R, T)):
            if i != n:
                b_left = tl.load(p_m + tile(i, n, R, T))
                b_factor = tl.dot(b_left, -b_pivot)
                for j in range(tile_count(R, T)):
                    if j != n:
                        b_s = tl.load(p_m + tile(i, j, R, T))
                        b_s -= tl.dot(b_factor, tl.load(p_m + tile(n, j, R, T)))
                        tl.store(p_m + tile(i, j, R, T), b_s)
        tl.debug_barrier()
        for i in range(tile_count(R, T)):
            if i != n:
                b_factor = tl.dot(tl.load(p_m + tile(i, n, R, T)), -b_pivot)
                tl.debug_barrier()
                tl.store(p_m + tile(i, n, R, T), b_factor)
                tl.store(p_m + tile(n, i, R, T), tl.trans(b_factor))
        tl.debug_barrier()
        tl.store(p_m + tile(n, n, R, T), b_pivot)
        tl.debug_barrier()
    return lowest


@triton.jit(noinline=True)
def pivoted_cholesky(p_s, l, g, p_scale, tolerance, R: tl.constexpr, T: tl.constexpr):
    """l with l l^T = g up to rounding, for g positive semidefinite up to rounding.

    Takes the largest remaining diagonal entry relative to the diagonal
    of the float32 matrix p_scale as the next pivot and stops at `tolerance`: what is left then is noise in every
    entry, the negative eigenvalues of a difference of Grams among it, and is dropped. Columns of l
    come in pivot order; the ones not reached are zero.
    """
    b_i = tl.arange(0, R)
    p_l = p_s + l * (R * R)
    p_g = p_s + g * (R * R)
    scaled_identity(p_s, l, 0.0, R, T)
    b_rest = tl.load(p_g + b_i * (R + 1))
    b_scale = tl.load(p_scale + b_i * (R + 1)).to(tl.float64)
    b_scale = tl.where(b_scale > 0, 1.0 / tl.where(b_scale > 0, b_scale, 1.0), 0.0)
    step = 0
    largest, n = _largest(b_rest * b_scale)
    while (step < R) & (largest > tolerance):
        pivot = tl.sum(tl.where(b_i == n, b_rest, 0.0), axis=0)
        b_column = tl.load(p_g + n * R + b_i)
        for j in range((step + T - 1) // T):
            column = j * T + tl.arange(0, T)
            b_done = tl.load(p_l + b_i[:, None] * R + column[None, :])
            b_row = tl.load(p_l + n * R + column)
            b_column -= tl.sum(b_done * b_row[None, :], axis=1)
        # Indices already taken have nothing left but rounding.
        b_column = tl.where(b_rest > 0, b_column * (1.0 / tl.sqrt(pivot)), 0.0)
        b_rest = tl.where(b_i == n, 0.0, tl.maximum(b_rest - b_column * b_column, 0.0))
        tl.store(p_l + b_i * R + step, b_column)
        tl.debug_barrier()
        largest, n = _largest(b_rest * b_scale)
        step += 1
    tl.debug_barrier()


@triton.jit(noinline=True)
def gram_of_coordinates(
    p_s, g, p_x, stride_k, stride_r, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr
):
    """g = x^T x for x (K, R) with the given strides."""
    p_g = p_s + g * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_g = tl.zeros([T, T], tl.float64)
            for n in range(tile_count(K, T)):
                b_k = (n * T + tl.arange(0, T)) * stride_k
                o_i = (i * T + tl.arange(0, T)) * stride_r
                o_j = (j * T + tl.arange(0, T)) * stride_r
                b_i = tl.load(p_x + o_i[:, None] + b_k[None, :]).to(tl.float64)
                b_j = tl.load(p_x + b_k[:, None] + o_j[None, :]).to(tl.float64)
                b_g = tl.dot(b_i, b_j, b_g, out_dtype=tl.float64)
            tl.store(p_g + tile(i, j, R, T), b_g)
    tl.debug_barrier()


@triton.jit(noinline=True)
def symmetric_difference(p_s, c, p_g, h, R: tl.constexpr, T: tl.constexpr):
    """c = (g + g^T)/2 - h for a float32 matrix p_g and h symmetric."""
    p_c = p_s + c * (R * R)
    p_h = p_s + h * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_g = tl.load(p_g + tile(i, j, R, T)).to(tl.float64)
            b_t = tl.trans(tl.load(p_g + tile(j, i, R, T)).to(tl.float64))
            b_h = tl.load(p_h + tile(i, j, R, T))
            tl.store(p_c + tile(i, j, R, T), 0.5 * (b_g + b_t) - b_h)
    tl.debug_barrier()
