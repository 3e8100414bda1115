"""Small dense float64 algebra for one program: matrices of R x R in scratch memory, by tiles of T x T.

Scratch is global memory that one program alone uses and that stays in cache; with it one code serves
every rank, where registers would end at 64. `p_s` is the scratch of the program, and a matrix is its number there,
a `slot`: one register where a pointer is two. Each function ends with a barrier, after which every thread may read
what any thread wrote. A result may not be one of its own operands.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot(NUMBER: tl.constexpr):
    """A matrix's number as a value of run time: a literal would make a copy of each function it is passed to."""
    return tl.full([], NUMBER, tl.int32)


@triton.jit
def tile(i, j, R: tl.constexpr, T: tl.constexpr):
    """(T, T) offsets of tile (i, j) of a row-major matrix with R columns."""
    return (i * T + tl.arange(0, T))[:, None] * R + (j * T + tl.arange(0, T))[None, :]


@triton.jit
def tile_count(SIZE: tl.constexpr, T: tl.constexpr):
    """SIZE // T, hidden from the compiler by a factor that is always 1 (the grid is flat): with the
    loops over tiles unrolled, the kernel for rank 128 is thirty times the code and spills."""
    return (SIZE // T) * tl.num_programs(1)


@triton.jit
def _product_tile(
    p_a, p_b, i, j, R: tl.constexpr, T: tl.constexpr, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr
):
    """Tile (i, j) of a b."""
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
    return b_c


@triton.jit(noinline=True)
def multiply(
    p_s,
    c,
    a,
    b,
    alpha,
    R: tl.constexpr,
    T: tl.constexpr,
    TRANS_A: tl.constexpr = False,
    TRANS_B: tl.constexpr = False,
):
    """c = alpha a b, with a and b transposed as asked."""
    p_c = p_s + c * (R * R)
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_c = _product_tile(p_a, p_b, i, j, R, T, TRANS_A, TRANS_B)
            tl.store(p_c + tile(i, j, R, T), alpha * b_c)
    tl.debug_barrier()


@triton.jit(noinline=True)
def multiply_add(
    p_s,
    c,
    a,
    b,
    base,
    alpha,
    R: tl.constexpr,
    T: tl.constexpr,
    TRANS_A: tl.constexpr = False,
    TRANS_B: tl.constexpr = False,
):
    """c = base + alpha a b, with a and b transposed as asked."""
    p_c = p_s + c * (R * R)
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    p_base = p_s + base * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_c = _product_tile(p_a, p_b, i, j, R, T, TRANS_A, TRANS_B)
            tl.store(p_c + tile(i, j, R, T), alpha * b_c + tl.load(p_base + tile(i, j, R, T)))
    tl.debug_barrier()


@triton.jit(noinline=True)
def inner(p_s, a, b, R: tl.constexpr, T: tl.constexpr):
    """<a, b>, as one number."""
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    total = tl.full([], 0.0, tl.float64)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            o_tile = tile(i, j, R, T)
            total += tl.sum(tl.load(p_a + o_tile) * tl.load(p_b + o_tile))
    tl.debug_barrier()
    return total


@triton.jit(noinline=True)
def inner_of_differences(p_s, a, b, c, d, R: tl.constexpr, T: tl.constexpr):
    """<a - b, c - d>, as one number."""
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    p_c = p_s + c * (R * R)
    p_d = p_s + d * (R * R)
    total = tl.full([], 0.0, tl.float64)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            o_tile = tile(i, j, R, T)
            b_left = tl.load(p_a + o_tile) - tl.load(p_b + o_tile)
            total += tl.sum(b_left * (tl.load(p_c + o_tile) - tl.load(p_d + o_tile)))
    tl.debug_barrier()
    return total


@triton.jit(noinline=True)
def block_energies(p_s, grams, R: tl.constexpr, T: tl.constexpr):
    """<B_in, A_in>, <B_in, A_out>, <B_out, A_in>, <B_out, A_out>, at least 0, of the Gram matrices B_in, B_out,
    A_in and A_out that lie side by side from `grams` on."""
    p_g = p_s + grams * (R * R)
    ff = tl.full([], 0.0, tl.float64)
    fo = tl.full([], 0.0, tl.float64)
    of = tl.full([], 0.0, tl.float64)
    oo = tl.full([], 0.0, tl.float64)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            p_tile = p_g + tile(i, j, R, T)
            b_B_in = tl.load(p_tile)
            b_B_out = tl.load(p_tile + R * R)
            b_A_in = tl.load(p_tile + 2 * R * R)
            b_A_out = tl.load(p_tile + 3 * R * R)
            ff += tl.sum(b_B_in * b_A_in)
            fo += tl.sum(b_B_in * b_A_out)
            of += tl.sum(b_B_out * b_A_in)
            oo += tl.sum(b_B_out * b_A_out)
    tl.debug_barrier()
    return tl.maximum(ff, 0.0), tl.maximum(fo, 0.0), tl.maximum(of, 0.0), tl.maximum(oo, 0.0)


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
    """The largest entry of each row and where it is; a NaN counts as -1, which is no pivot.

    Without that the place would be any, and Triton's interpreter (3.9.0) fails where all are NaN.
    """
    return tl.max(tl.where(b_x == b_x, b_x, -1.0), axis=1, return_indices=True, keep_dims=True)


@triton.jit
def _sweep_tile(b_s, smallest, substitute, T: tl.constexpr):
    """-(s^-1) for a symmetric positive semidefinite tile, and its smallest pivot: the sweep operator.

    In the order of the rows: on such matrices nothing grows, whatever the order. The sweep keeps the matrix
    symmetric, so a row serves as its column too.
    """
    index = tl.arange(0, T)
    row = index[:, None]
    column = index[None, :]
    lowest = tl.full([], float("inf"), tl.float64)
    for n in range(T):
        b_row = tl.sum(tl.where(row == n, b_s, 0.0), axis=0)
        pivot = tl.sum(tl.where(index == n, b_row, 0.0), axis=0)
        lowest = tl.where(pivot >= lowest, lowest, pivot)  # a NaN too
        regular = pivot > smallest
        inverse = tl.where(regular, 1.0 / tl.where(regular, pivot, 1.0), substitute)
        b_scaled = b_row * inverse
        b_swept = b_s - b_row[:, None] * b_scaled[None, :]
        b_scaled = tl.where(index == n, -inverse, b_scaled)
        b_s = tl.where(row == n, b_scaled[None, :], b_swept)
        b_s = tl.where(column == n, b_scaled[:, None], b_s)
    return b_s, lowest


@triton.jit(noinline=True)
def negative_inverse(p_s, m, tolerance, substitute, R: tl.constexpr, T: tl.constexpr):
    """m = -(m^-1) in place, m symmetric positive semidefinite: the sweep operator by blocks of T.

    A pivot of at most `tolerance` times the largest diagonal entry has the inverse `substitute`: with 0 its row and
    column come back as zeros, and the rest is the inverse of a regular part (a reflexive generalized inverse). Returns
    the smallest pivot, that of a Cholesky factorization squared.
    """
    p_m = p_s + m * (R * R)
    smallest = tolerance * tl.max(tl.load(p_m + tl.arange(0, R) * (R + 1)), axis=0)
    lowest = tl.full([], float("inf"), tl.float64)
    tl.debug_barrier()
    for n in range(tile_count(R, T)):
        b_pivot, found = _sweep_tile(tl.load(p_m + tile(n, n, R, T)), smallest, substitute, T)
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
def pivoted_cholesky(
    p_s, f, g, apart, p_scale, p_scale_2, tolerance, R: tl.constexpr, T: tl.constexpr
):
    """f with f^T f = g up to rounding, for g positive semidefinite up to rounding, and f + apart of g + apart.

    Two factorizations side by side take the time of one, which is that of waiting for the last pivot; apart = 0 is
    one, twice. Takes the largest remaining diagonal entry relative to the diagonal of the float32 matrix p_scale as
    the next pivot and stops at `tolerance`: what is left then is noise in every entry, the negative eigenvalues of a
    difference of Grams among it, and is dropped. Rows of f come in pivot order; the ones not reached are zero.
    """
    scaled_identity(p_s, f, tolerance * 0.0, R, T)
    scaled_identity(p_s, f + apart, tolerance * 0.0, R, T)
    b_i = tl.arange(0, R)[None, :]
    b_two = tl.arange(0, 2)[:, None]
    p_f = p_s + f * (R * R) + b_two * (apart * (R * R))
    p_g = p_s + g * (R * R) + b_two * (apart * (R * R))
    b_rest = tl.load(p_g + b_i * (R + 1))
    b_scale = tl.load(tl.where(b_two == 0, p_scale, p_scale_2) + b_i * (R + 1)).to(tl.float64)
    b_scale = tl.where(b_scale > 0, 1.0 / tl.where(b_scale > 0, b_scale, 1.0), 0.0)
    step = 0
    largest, n = _largest(b_rest * b_scale)
    going = tl.max(tl.where(largest > tolerance, 1, 0))
    while (step < R) & (going > 0):
        pivot = tl.sum(tl.where(b_i == n, b_rest, 0.0), axis=1, keep_dims=True)
        b_new = tl.load(p_g + n * R + b_i)
        for j in range((step + T - 1) // T):
            # The row that this step stores is still zero here.
            row = j * T + tl.arange(0, T)[None, :]
            b_done = tl.load((p_f + row * R)[:, :, None] + b_i[:, None, :])
            b_factor = tl.load(p_f + row * R + n)
            b_new -= tl.sum(b_done * b_factor[:, :, None], axis=1)
        # Indices already taken have nothing left but rounding.
        taken = (b_rest > 0) & (largest > tolerance)
        inverse = tl.rsqrt(tl.where(largest > tolerance, pivot, 1.0))
        b_new = tl.where(taken, b_new * inverse, 0.0)
        b_rest = tl.where(b_i == n, 0.0, tl.maximum(b_rest - b_new * b_new, 0.0))
        tl.debug_barrier()
        tl.store(p_f + step * R + b_i, b_new)
        tl.debug_barrier()
        largest, n = _largest(b_rest * b_scale)
        going = tl.max(tl.where(largest > tolerance, 1, 0))
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


@triton.jit(noinline=True)
def store_single(p_out, p_s, a, R: tl.constexpr, T: tl.constexpr):
    """A scratch matrix as float32."""
    p_a = p_s + a * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            tl.store(p_out + tile(i, j, R, T), tl.load(p_a + tile(i, j, R, T)).to(tl.float32))


@triton.jit(noinline=True)
def times_difference(
    p_out,
    p_x,
    stride_k,
    stride_r,
    p_s,
    a,
    b,
    stride_i,
    stride_j,
    ROW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """x (a - b), (K, R) with rows ROW apart, for x (K, R) and matrices whose elements have the given strides."""
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    for n in range(tile_count(K, T)):
        for j in range(tile_count(R, T)):
            b_out = tl.zeros([T, T], tl.float64)
            b_j = (j * T + tl.arange(0, T)) * stride_j
            for i in range(tile_count(R, T)):
                b_k = (n * T + tl.arange(0, T)) * stride_k
                b_i = i * T + tl.arange(0, T)
                b_x = tl.load(p_x + b_k[:, None] + (b_i * stride_r)[None, :]).to(tl.float64)
                o_m = (b_i * stride_i)[:, None] + b_j[None, :]
                b_m = tl.load(p_a + o_m) - tl.load(p_b + o_m)
                b_out = tl.dot(b_x, b_m, b_out, out_dtype=tl.float64)
            tl.store(p_out + tile(n, j, ROW, T), b_out.to(tl.float32))
    tl.debug_barrier()
