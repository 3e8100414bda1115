"""Second stage: every r x r core of every adapter's modules in one launch, in float64.

A persistent program takes one module of one adapter after the other. With L L^T = G_B of a part,

    K = (I + c G_A G_B)^-1 = I - c G_A L (I + c L^T G_A L)^-1 L^T,   c = lambda / E

asks for the inverse of one symmetric matrix with eigenvalues from 1 to 1 + lambda, so elimination
needs no pivoting. L, and with it the Gram matrices outside the subspace, come from a pivoted Cholesky
factorization that stops at the noise of the float32 difference G - G_in: the difference is thereby
positive semidefinite, whatever lambda multiplies it. An infinite lambda is K = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._smallmat import (
    copy,
    extrapolate,
    gram_of_coordinates,
    inner,
    multiply,
    negative_inverse,
    pivoted_cholesky,
    scaled_identity,
    symmetric_difference,
    tile,
    tile_count,
)
from csulora_kernels.tiles import SOLVE_MATRICES

# Noise of a float32 Gram matrix relative to its diagonal, and of the float64 ones formed here.
NOISE_SINGLE = tl.constexpr(2.0**-21)
NOISE_DOUBLE = tl.constexpr(2.0**-44)
# Lambdas are float32 arguments; anything beyond is infinity.
LARGEST = tl.constexpr(3.0e38)
# The alternating fit of `same`, as the reference has it, but each module stops for itself.
FIT_STALL = tl.constexpr(1e-4)
FIT_MAX_STEPS = tl.constexpr(16)
# Pivots below this share of the largest are the null space of rank-deficient factors.
SINGULAR = tl.constexpr(1e-11)

# Scratch matrices of one program. Of four: G_B in, out and G_A in, out; cores ff, fo, of, oo.
GRAMS = tl.constexpr(0)
FACTORS = tl.constexpr(4)  # L of G_B in, out
CORES = tl.constexpr(6)
RESULT = tl.constexpr(10)  # cores of the written form, where it is not the exact one
WORK = tl.constexpr(14)  # four
FIT = tl.constexpr(18)  # seven
IDENTITY = tl.constexpr(25)
MATRICES = tl.constexpr(SOLVE_MATRICES)


@triton.jit(do_not_specialize=["n_entries"])
def solve_kernel(
    p_P,  # (N, M, K, R) float32
    p_Q,  # (N, M, R, K)
    p_G_B,  # (N, M, R, R)
    p_G_A,
    p_X_in,  # (N, M, R, R) float32, not touched for `exact`
    p_X_out,
    p_Y_in,  # (N, M, H R, R) float32, H = 1 (same) or 2 (exact)
    p_Y_out,
    p_W,  # (N, M, K, R) float32: P (X_in - X_out), not touched for `exact`
    p_Z,  # (N, M, K, H R) float32: ((Y_in - Y_out) Q)^T
    p_energy,  # (N, M) float64
    p_before,  # (N, M, 4)
    p_after,  # (N, M, 4)
    p_change,  # (N, M)
    p_error,  # (N, M)
    p_scratch,  # (programs, MATRICES, R, R) float64
    n_entries,
    lambda_aligned,
    lambda_left,
    lambda_right,
    lambda_off,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    GRANULARITY: tl.constexpr,
    SAME: tl.constexpr,
):
    RR: tl.constexpr = R * R
    p_s = p_scratch + tl.program_id(0).to(tl.int64) * (MATRICES * RR)
    scaled_identity(p_s, IDENTITY, 1.0, R, T)
    first = tl.program_id(0)
    for step in range(0, n_entries - first, tl.num_programs(0)):
        e = (first + step).to(tl.int64)
        p_Pe = p_P + e * K * R
        p_Qe = p_Q + e * K * R
        _grams(p_s, p_Pe, p_Qe, p_G_B + e * RR, p_G_A + e * RR, K, R, T)
        energy = tl.full([], 0.0, tl.float64)
        for block in range(4):
            energy += _energy_before(p_s, block, R, T)
        inverse_energy = tl.where(energy > 0, 1.0 / tl.where(energy > 0, energy, 1.0), 0.0)
        tl.store(p_energy + e, energy)
        for block in range(4):
            share = _energy_before(p_s, block, R, T) * inverse_energy
            tl.store(p_before + e * 4 + block, share)
            strength = tl.where(block == 0, lambda_aligned, lambda_left)
            strength = tl.where(block == 2, lambda_right, strength)
            strength = tl.where(block == 3, lambda_off, strength).to(tl.float64)
            if strength > LARGEST:
                scaled_identity(p_s, CORES + block, 0.0, R, T)
            elif GRANULARITY == "component":
                scaled_identity(p_s, CORES + block, 1.0 / (1.0 + strength * share), R, T)
            else:
                tl.static_assert(GRANULARITY == "direction")
                if strength == 0:
                    scaled_identity(p_s, CORES + block, 1.0, R, T)
                else:
                    _direction_core(p_s, block, strength * inverse_energy, R, T)
        # With the pinned side p: B' = B_p C + B_q K_B, A' = A_p + K_A A_q.
        p = 0
        if SAME:
            p = tl.where(lambda_aligned <= lambda_off, 0, 1)
            _fit(p_s, p, R, T)
        change = tl.full([], 0.0, tl.float64)
        misfit = tl.full([], 0.0, tl.float64)
        exact = tl.full([], 0.0, tl.float64)
        for block in range(4):
            k = CORES + block
            x = RESULT + block if SAME else k
            g_B = GRAMS + block // 2
            g_A = GRAMS + 2 + block % 2
            multiply(p_s, WORK, g_B, x, 0, 1.0, 0.0, R, T)
            multiply(p_s, WORK + 1, x, g_A, 0, 1.0, 0.0, R, T)
            after = tl.maximum(inner(p_s, WORK, 0, WORK + 1, 0, R, T, False), 0.0)
            tl.store(p_after + e * 4 + block, after * inverse_energy)
            change += inner(p_s, WORK, g_B, WORK + 1, g_A, R, T, True)
            if SAME:
                multiply(p_s, WORK + 2, g_B, k, 0, 1.0, 0.0, R, T)
                multiply(p_s, WORK + 3, k, g_A, 0, 1.0, 0.0, R, T)
                misfit += inner(p_s, WORK, WORK + 2, WORK + 1, WORK + 3, R, T, True)
                exact += inner(p_s, WORK + 2, 0, WORK + 3, 0, R, T, False)
        tl.store(p_change + e, tl.sqrt(tl.maximum(change * inverse_energy, 0.0)))
        relative = tl.maximum(misfit, 0.0) / tl.where(exact > 0, exact, 1.0)
        tl.store(p_error + e, tl.sqrt(relative.to(tl.float64)))
        _write(
            p_s,
            p,
            p_Pe,
            p_Qe,
            p_X_in,
            p_X_out,
            p_Y_in,
            p_Y_out,
            p_W,
            p_Z,
            e,
            K,
            R,
            T,
            SAME,
        )


@triton.jit(noinline=True)
def _grams(p_s, p_P, p_Q, p_G_B, p_G_A, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """The four Gram matrices, and L of the two on the B side."""
    gram_of_coordinates(p_s, GRAMS, p_P, R, 1, K, R, T)
    gram_of_coordinates(p_s, GRAMS + 2, p_Q, 1, K, K, R, T)
    pivoted_cholesky(p_s, FACTORS, GRAMS, p_G_B, NOISE_DOUBLE, R, T)
    symmetric_difference(p_s, WORK, p_G_B, GRAMS, R, T)
    pivoted_cholesky(p_s, FACTORS + 1, WORK, p_G_B, NOISE_SINGLE, R, T)
    multiply(p_s, GRAMS + 1, FACTORS + 1, FACTORS + 1, 0, 1.0, 0.0, R, T, TRANS_B=True)
    symmetric_difference(p_s, WORK, p_G_A, GRAMS + 2, R, T)
    pivoted_cholesky(p_s, WORK + 1, WORK, p_G_A, NOISE_SINGLE, R, T)
    multiply(p_s, GRAMS + 3, WORK + 1, WORK + 1, 0, 1.0, 0.0, R, T, TRANS_B=True)


@triton.jit(noinline=True)
def _energy_before(p_s, block, R: tl.constexpr, T: tl.constexpr):
    g_B = GRAMS + block // 2
    g_A = GRAMS + 2 + block % 2
    return tl.maximum(inner(p_s, g_B, 0, g_A, 0, R, T, False), 0.0)


@triton.jit(noinline=True)
def _direction_core(p_s, block, c, R: tl.constexpr, T: tl.constexpr):
    """K = I - c G_A L (I + c L^T G_A L)^-1 L^T."""
    l = FACTORS + block // 2
    g_A = GRAMS + 2 + block % 2
    multiply(p_s, WORK, g_A, l, 0, 1.0, 0.0, R, T)
    multiply(p_s, WORK + 1, l, WORK, 0, c, 1.0, R, T, TRANS_A=True)
    negative_inverse(p_s, WORK + 1, 0.0, R, T, PIVOTED=False)
    multiply(p_s, WORK + 2, WORK, WORK + 1, 0, c, 0.0, R, T)
    multiply(p_s, CORES + block, WORK + 2, l, 0, 1.0, 1.0, R, T, TRANS_B=True)


@triton.jit(noinline=True)
def _fit(p_s, p, R: tl.constexpr, T: tl.constexpr):
    """RESULT: the four cores of the rank-r form, by alternating least squares for K_A and K_B.

    C K_A stands for K_pq, K_B for K_qp and K_B K_A for K_qq; the pinned C is met whatever they are.
    K_A is left in FIT.
    """
    q = 1 - p
    Bp = GRAMS + p
    Bq = GRAMS + q
    Ap = GRAMS + 2 + p
    Aq = GRAMS + 2 + q
    C = CORES + 3 * p
    K_pq = CORES + 2 * p + q
    K_qp = CORES + 2 * q + p
    K_qq = CORES + 3 * q
    K_A = FIT
    K_B = RESULT + 2 * q + p
    CtG = FIT + 1  # C^T G_Bp
    CtGC = FIT + 2
    CtGK = FIT + 3  # C^T G_Bp K_pq
    KG = FIT + 4  # K_qp G_Ap
    KtG = FIT + 5  # K_qp^T G_Bq
    GKt = FIT + 6  # G_Ap K_qp^T
    t = WORK
    S = WORK + 1
    rhs = WORK + 2
    found = WORK + 3
    multiply(p_s, CtG, C, Bp, 0, 1.0, 0.0, R, T, TRANS_A=True)
    multiply(p_s, CtGC, CtG, C, 0, 1.0, 0.0, R, T)
    multiply(p_s, CtGK, CtG, K_pq, 0, 1.0, 0.0, R, T)
    multiply(p_s, KG, K_qp, Ap, 0, 1.0, 0.0, R, T)
    multiply(p_s, KtG, K_qp, Bq, 0, 1.0, 0.0, R, T, TRANS_A=True)
    multiply(p_s, GKt, Ap, K_qp, 0, 1.0, 0.0, R, T, TRANS_B=True)
    # What the misfit of pq and qq would be at K_A = 0.
    multiply(p_s, t, Bq, K_qq, 0, 1.0, 0.0, R, T)
    multiply(p_s, S, K_qq, t, 0, 1.0, 0.0, R, T, TRANS_A=True)
    multiply(p_s, t, Bp, K_pq, 0, 1.0, 0.0, R, T)
    multiply(p_s, rhs, K_pq, t, S, 1.0, 0.0, R, T, TRANS_A=True, BASE=True)
    constant = inner(p_s, rhs, 0, Aq, 0, R, T, False)

    start = FIT + 1  # CtG has served
    copy(p_s, K_A, IDENTITY, R, T)
    copy(p_s, start, IDENTITY, R, T)
    step = 0
    falls = constant * 0.0  # steps in sequence that lowered the error
    improving = 1
    previous = constant * 0.0 + float("inf")
    while (step < FIT_MAX_STEPS) & (improving > 0):
        # K_B (G_Ap + K_A G_Aq K_A^T) = K_qp G_Ap + K_qq G_Aq K_A^T
        multiply(p_s, t, start, Aq, 0, 1.0, 0.0, R, T)
        multiply(p_s, S, t, start, Ap, 1.0, 0.0, R, T, TRANS_B=True, BASE=True)
        multiply(p_s, rhs, K_qq, t, KG, 1.0, 0.0, R, T, TRANS_B=True, BASE=True)
        negative_inverse(p_s, S, SINGULAR, R, T)
        multiply(p_s, K_B, rhs, S, 0, -1.0, 0.0, R, T)
        # (C^T G_Bp C + K_B^T G_Bq K_B) K_A = C^T G_Bp K_pq + K_B^T G_Bq K_qq
        multiply(p_s, t, K_B, Bq, 0, 1.0, 0.0, R, T, TRANS_A=True)
        multiply(p_s, S, t, K_B, CtGC, 1.0, 0.0, R, T, BASE=True)
        multiply(p_s, rhs, t, K_qq, CtGK, 1.0, 0.0, R, T, BASE=True)
        negative_inverse(p_s, S, SINGULAR, R, T)
        multiply(p_s, found, S, rhs, 0, -1.0, 0.0, R, T)
        # Squared error: of qp, <G_Bq D, D G_Ap> with D = K_B - K_qp; of pq and qq at their minimum
        # in K_A, the constant less <rhs G_Aq, K_A>.
        multiply(p_s, S, rhs, Aq, 0, 1.0, 0.0, R, T)
        multiply(p_s, rhs, Ap, K_B, 0, 1.0, 0.0, R, T, TRANS_B=True)
        error = constant - inner(p_s, S, 0, found, 0, R, T, False)
        error += inner(p_s, t, KtG, rhs, GKt, R, T, True)
        error = tl.maximum(error, 0.0)
        rises = error > previous
        improving = tl.where(rises | (previous - error > error * FIT_STALL), 1, 0)  # NaN stops too
        # The next step starts beyond the last one, the farther the longer the error has fallen.
        falls = tl.where(rises, 0.0, falls + 1.0)
        beyond = tl.maximum((falls - 1.0) / (falls + 1.0), 0.0)
        extrapolate(p_s, start, K_A, found, beyond, R, T)
        previous = error
        step += 1
    copy(p_s, RESULT + 3 * p, C, R, T)
    multiply(p_s, RESULT + 2 * p + q, C, K_A, 0, 1.0, 0.0, R, T)
    multiply(p_s, RESULT + 3 * q, K_B, K_A, 0, 1.0, 0.0, R, T)


@triton.jit
def _write(
    p_s,
    p,
    p_P,
    p_Q,
    p_X_in,
    p_X_out,
    p_Y_in,
    p_Y_out,
    p_W,
    p_Z,
    e,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    SAME: tl.constexpr,
):
    """The cores in float32, and their products with the coordinates that recompose multiplies."""
    RR: tl.constexpr = R * R
    if SAME:
        C = CORES + 3 * p
        K_B = RESULT + 2 * (1 - p) + p
        X_in = tl.where(p == 0, C, K_B)
        X_out = tl.where(p == 0, K_B, C)
        Y_in = tl.where(p == 0, IDENTITY, FIT)
        Y_out = tl.where(p == 0, FIT, IDENTITY)
        _store_single(p_X_in + e * RR, p_s, X_in, R, T)
        _store_single(p_X_out + e * RR, p_s, X_out, R, T)
        _store_single(p_Y_in + e * RR, p_s, Y_in, R, T)
        _store_single(p_Y_out + e * RR, p_s, Y_out, R, T)
        _coordinates(p_W + e * K * R, p_P, R, 1, p_s, X_in, X_out, R, K, R, T, False)
        _coordinates(p_Z + e * K * R, p_Q, 1, K, p_s, Y_in, Y_out, R, K, R, T, True)
    else:
        for half in range(2):
            k_in = CORES + 2 * half
            _store_single(p_Y_in + (e * 2 + half) * RR, p_s, k_in, R, T)
            _store_single(p_Y_out + (e * 2 + half) * RR, p_s, k_in + 1, R, T)
            p_Ze = p_Z + e * 2 * K * R + half * R
            _coordinates(p_Ze, p_Q, 1, K, p_s, k_in, k_in + 1, 2 * R, K, R, T, True)


@triton.jit(noinline=True)
def _store_single(p_out, p_s, a, R: tl.constexpr, T: tl.constexpr):
    """A scratch matrix as float32."""
    p_a = p_s + a * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            tl.store(p_out + tile(i, j, R, T), tl.load(p_a + tile(i, j, R, T)).to(tl.float32))


@triton.jit(noinline=True)
def _coordinates(
    p_out,
    p_x,
    stride_k,
    stride_r,
    p_s,
    a,
    b,
    ROW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    TRANS: tl.constexpr,
):
    """x (a - b), or x (a - b)^T, (K, R) with rows ROW apart, for x (K, R) with the given strides."""
    p_a = p_s + a * (R * R)
    p_b = p_s + b * (R * R)
    for n in range(tile_count(K, T)):
        for j in range(tile_count(R, T)):
            b_out = tl.zeros([T, T], tl.float64)
            for i in range(tile_count(R, T)):
                b_k = (n * T + tl.arange(0, T)) * stride_k
                o_i = (i * T + tl.arange(0, T)) * stride_r
                b_x = tl.load(p_x + b_k[:, None] + o_i[None, :]).to(tl.float64)
                if TRANS:
                    o_tile = tile(j, i, R, T)
                    b_m = tl.trans(tl.load(p_a + o_tile) - tl.load(p_b + o_tile))
                else:
                    o_tile = tile(i, j, R, T)
                    b_m = tl.load(p_a + o_tile) - tl.load(p_b + o_tile)
                b_out = tl.dot(b_x, b_m, b_out, out_dtype=tl.float64)
            tl.store(p_out + tile(n, j, ROW, T), b_out.to(tl.float32))
    tl.debug_barrier()
