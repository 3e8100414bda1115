"""Second stage: every r x r core of every adapter's modules in one launch, in float64.

A persistent program takes one module of one adapter after the other. With L L^T = G_B of a part,

    K = (I + c G_A G_B)^-1 = I - c G_A L (I + c L^T G_A L)^-1 L^T,   c = lambda / E

asks for the inverse of one symmetric matrix with eigenvalues from 1 to 1 + lambda, so elimination
needs no pivoting; so it is with a factor M M^T = G_A,

    K = I - c M (I + c M^T G_B M)^-1 M^T G_B.

The Gram matrices outside the subspace, and factors of them, come from pivoted Cholesky factorizations that stop
at the noise of the float32 difference G - G_in: the difference is thereby
positive semidefinite, whatever lambda multiplies it. They serve all cores but that of the aligned part, which
is the identity for its usual strength 0. From REMOVES on K = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels import settings, tiles
from csulora_kernels._smallmat import (
    block_energies,
    copy,
    extrapolate,
    gram_of_coordinates,
    inner,
    inner_of_differences,
    multiply,
    multiply_add,
    negative_inverse,
    pivoted_cholesky,
    scaled_identity,
    slot,
    store_single,
    symmetric_difference,
    times_difference,
)
from csulora_kernels._tables import side_of

# Noise of a float32 Gram matrix relative to its diagonal, and of the float64 ones formed here.
NOISE_SINGLE = tl.constexpr(2.0**-21)
NOISE_DOUBLE = tl.constexpr(2.0**-44)
REMOVES = tl.constexpr(settings.REMOVES)
UNPINNED = tl.constexpr(settings.UNPINNED)
# The alternating fit of `same`, as the reference has it, but each module stops for itself.
FIT_STALL = tl.constexpr(1e-4)
FIT_MAX_STEPS = tl.constexpr(16)
# Pivots below this share of the largest are the null space of rank-deficient factors.
SINGULAR = tl.constexpr(1e-11)

# Scratch matrices of one program. Of four: G_B in, out and G_A in, out; cores ff, fo, of, oo.
IDENTITY = tl.constexpr(0)
GRAMS = tl.constexpr(1)
FACTORS = tl.constexpr(5)  # L^T of G_B out, M^T of G_A out, L^T of G_B in
CORES = tl.constexpr(8)
WORK = tl.constexpr(12)  # three, or four for `same`
EXACT_MATRICES = tl.constexpr(tiles.EXACT_MATRICES)
RESULT = tl.constexpr(16)  # cores of the written form, where it is not the exact one
FIT = tl.constexpr(20)  # seven
SAME_MATRICES = tl.constexpr(tiles.SAME_MATRICES)


@triton.jit(do_not_specialize=["n_entries", "n_modules"])
def solve_kernel(
    p_P,  # (N, M, K, R) float32
    p_Q,  # (N, M, R, K)
    p_G_B,  # (N, M, R, R)
    p_G_A,
    p_modules,  # (M, 5) int64: d_out, d_in, k, o_U, o_V
    p_X_in,  # (N, M, R, R) float32, not touched for `exact`
    p_X_out,
    p_Y_in,  # (N, M, H R, R) float32, H = 1 (same) or 2 (exact)
    p_Y_out,
    p_W,  # (N, M, K, R) float32: P (X_in - X_out), not touched for `exact`
    p_Z,  # (N, M, K, H R) float32: ((Y_in - Y_out) Q)^T, or P (X_in - X_out) where `exact` has its cores on B
    p_energy,  # (N, M) float64
    p_before,  # (N, M, 4)
    p_after,  # (N, M, 4)
    p_change,  # (N, M)
    p_error,  # (N, M)
    p_scratch,  # (programs, EXACT_MATRICES or SAME_MATRICES, R, R) float64
    n_entries,
    n_modules,
    lambda_aligned,  # at most REMOVES, as the others
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
    MATRICES: tl.constexpr = SAME_MATRICES if SAME else EXACT_MATRICES
    p_s = p_scratch + tl.program_id(0).to(tl.int64) * (MATRICES * RR)
    zero = tl.full([], 0.0, tl.float64)
    one = zero + 1.0
    left = slot(WORK)
    right = slot(WORK) + 1
    scaled_identity(p_s, slot(IDENTITY), one, R, T)
    # Of `same`, with the pinned side p: B' = B_p C + B_q K_B, A' = A_p + K_A A_q. Where next to
    # nothing is left of both blocks that could be pinned, the largest block alone.
    p = tl.where(lambda_aligned <= lambda_off, 0, 1)
    unpinned = tl.minimum(lambda_aligned, lambda_off) >= UNPINNED
    first = tl.program_id(0)
    for step in range(0, n_entries - first, tl.num_programs(0)):
        e = (first + step).to(tl.int64)
        p_Pe = p_P + e * K * R
        p_Qe = p_Q + e * K * R
        p_G = p_G_B + e * RR
        _grams(p_s, p_Pe, p_Qe, p_G, p_G_A + e * RR, K, R, T)
        if GRANULARITY == "direction":  # noqa: SIM102 - the one at compile time, the other not
            if lambda_aligned > 0:
                factor = slot(FACTORS) + 2
                pivoted_cholesky(
                    p_s, factor, slot(GRAMS), slot(0), p_G, p_G, zero + NOISE_DOUBLE, R, T
                )
        ff, fo, of, oo = block_energies(p_s, slot(GRAMS), R, T)
        energy = ff + fo + of + oo
        inverse_energy = tl.where(energy > 0, 1.0 / tl.where(energy > 0, energy, 1.0), 0.0)
        tl.store(p_energy + e, energy)
        for block in range(4):
            share = _of_block(block, ff, fo, of, oo) * inverse_energy
            tl.store(p_before + e * 4 + block, share)
            strength = _of_block(block, lambda_aligned, lambda_left, lambda_right, lambda_off)
            strength = strength.to(tl.float64)
            core = slot(CORES) + block
            if strength == REMOVES:
                scaled_identity(p_s, core, zero, R, T)
            elif GRANULARITY == "component":
                scaled_identity(p_s, core, 1.0 / (1.0 + strength * share), R, T)
            else:
                tl.static_assert(GRANULARITY == "direction")
                if strength == 0:
                    scaled_identity(p_s, core, one, R, T)
                else:
                    _direction_core(p_s, core, block, strength * inverse_energy, R, T)
        largest = p
        if SAME:
            if unpinned:
                largest = _largest_block(p_s, R, T)
            else:
                _fit(p_s, p, R, T)
        change = tl.full([], 0.0, tl.float64)
        misfit = tl.full([], 0.0, tl.float64)
        exact = tl.full([], 0.0, tl.float64)
        for block in range(4):
            k = slot(CORES) + block
            x = slot(RESULT) + block if SAME else k
            g_B = slot(GRAMS) + block // 2
            g_A = slot(GRAMS) + 2 + block % 2
            multiply(p_s, left, g_B, x, one, R, T)
            multiply(p_s, right, x, g_A, one, R, T)
            after = tl.maximum(inner(p_s, left, right, R, T), 0.0)
            tl.store(p_after + e * 4 + block, after * inverse_energy)
            change += inner_of_differences(p_s, left, g_B, right, g_A, R, T)
            if SAME:
                multiply(p_s, left + 2, g_B, k, one, R, T)
                multiply(p_s, right + 2, k, g_A, one, R, T)
                exact += inner(p_s, left + 2, right + 2, R, T)
                misfit += inner_of_differences(p_s, left, left + 2, right, right + 2, R, T)
        tl.store(p_change + e, tl.sqrt(tl.maximum(change * inverse_energy, 0.0)))
        tl.store(p_error + e, tl.sqrt(tl.maximum(misfit, 0.0) / tl.where(exact > 0, exact, 1.0)))
        if SAME:
            found = _same_cores(p, unpinned, largest)
            _write_same(
                p_s, found, p_Pe, p_Qe, (p_X_in, p_X_out, p_Y_in, p_Y_out, p_W, p_Z), e, K, R, T
            )
        else:
            # On A where B is the wide side, as `Shape.wide_side` has it.
            d_out, _, _ = side_of(p_modules, e % n_modules, 0, 1)
            d_in, _, _ = side_of(p_modules, e % n_modules, 1, 1)
            _write_exact(p_s, d_out >= d_in, p_Pe, p_Qe, (p_Y_in, p_Y_out, p_Z), e, K, R, T)


@triton.jit
def _of_block(block, ff, fo, of, oo):
    """One of four numbers."""
    return tl.where(block < 2, tl.where(block == 0, ff, fo), tl.where(block == 2, of, oo))


@triton.jit(noinline=True)
def _grams(p_s, p_P, p_Q, p_G_B, p_G_A, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """The four Gram matrices, and factors of the two outside the subspace."""
    noise = tl.full([], NOISE_SINGLE, tl.float64)
    one = tl.full([], 1.0, tl.float64)
    gram_of_coordinates(p_s, slot(GRAMS), p_P, R, 1, K, R, T)
    gram_of_coordinates(p_s, slot(GRAMS) + 2, p_Q, 1, K, K, R, T)
    symmetric_difference(p_s, slot(WORK), p_G_B, slot(GRAMS), R, T)
    symmetric_difference(p_s, slot(WORK) + 1, p_G_A, slot(GRAMS) + 2, R, T)
    pivoted_cholesky(p_s, slot(FACTORS), slot(WORK), slot(1), p_G_B, p_G_A, noise, R, T)
    for side in range(2):
        f = slot(FACTORS) + side
        multiply(p_s, slot(GRAMS) + 2 * side + 1, f, f, one, R, T, TRANS_A=True)


@triton.jit(noinline=True)
def _direction_core(p_s, core, block, c, R: tl.constexpr, T: tl.constexpr):
    """K = (I + c G_A G_B)^-1 of one block, from a factor of either Gram matrix."""
    of_A = block % 2 == 1  # whose side outside has one
    factor = slot(FACTORS) + tl.where(of_A, 1, tl.where(block == 0, 2, 0))
    other = slot(GRAMS) + tl.where(of_A, block // 2, 2)
    product = slot(WORK)
    S = slot(WORK) + 1
    rest = slot(WORK) + 2
    one = tl.full([], 1.0, tl.float64)
    multiply(p_s, product, other, factor, one, R, T, TRANS_B=True)
    multiply_add(p_s, S, factor, product, slot(IDENTITY), c, R, T)
    negative_inverse(p_s, S, 0.0 * one, one, R, T)
    if of_A:
        multiply(p_s, rest, S, product, c, R, T, TRANS_B=True)
        multiply_add(p_s, core, factor, rest, slot(IDENTITY), one, R, T, TRANS_A=True)
    else:
        multiply(p_s, rest, product, S, c, R, T)
        multiply_add(p_s, core, rest, factor, slot(IDENTITY), one, R, T)


@triton.jit(noinline=True)
def _fit(p_s, p, R: tl.constexpr, T: tl.constexpr):
    """RESULT: the four cores of the rank-r form, by alternating least squares for K_A and K_B.

    C K_A stands for K_pq, K_B for K_qp and K_B K_A for K_qq; the pinned C is met whatever they are.
    K_A is left in FIT.
    """
    q = 1 - p
    B_p = slot(GRAMS) + p
    B_q = slot(GRAMS) + q
    A_p = slot(GRAMS) + 2 + p
    A_q = slot(GRAMS) + 2 + q
    C = slot(CORES) + 3 * p
    K_pq = slot(CORES) + 2 * p + q
    K_qp = slot(CORES) + 2 * q + p
    K_qq = slot(CORES) + 3 * q
    K_B = slot(RESULT) + 2 * q + p
    K_A = slot(FIT)
    CtG = slot(FIT) + 1  # C^T G_Bp
    CtGC = slot(FIT) + 2
    CtGK = slot(FIT) + 3  # C^T G_Bp K_pq
    KG = slot(FIT) + 4  # K_qp G_Ap
    KtG = slot(FIT) + 5  # K_qp^T G_Bq
    GKt = slot(FIT) + 6  # G_Ap K_qp^T
    t = slot(WORK)
    S = slot(WORK) + 1
    rhs = slot(WORK) + 2
    found = slot(WORK) + 3
    nothing = tl.full([], 0.0, tl.float64)
    one = nothing + 1.0
    singular = nothing + SINGULAR
    multiply(p_s, CtG, C, B_p, one, R, T, TRANS_A=True)
    multiply(p_s, CtGC, CtG, C, one, R, T)
    multiply(p_s, CtGK, CtG, K_pq, one, R, T)
    multiply(p_s, KG, K_qp, A_p, one, R, T)
    multiply(p_s, KtG, K_qp, B_q, one, R, T, TRANS_A=True)
    multiply(p_s, GKt, A_p, K_qp, one, R, T, TRANS_B=True)
    # What the misfit of pq and qq would be at K_A = 0.
    multiply(p_s, t, B_q, K_qq, one, R, T)
    multiply(p_s, S, K_qq, t, one, R, T, TRANS_A=True)
    multiply(p_s, t, B_p, K_pq, one, R, T)
    multiply_add(p_s, rhs, K_pq, t, S, one, R, T, TRANS_A=True)
    constant = inner(p_s, rhs, A_q, R, T)

    start = CtG  # has served
    copy(p_s, K_A, slot(IDENTITY), R, T)
    copy(p_s, start, slot(IDENTITY), R, T)
    step = 0
    falls = nothing  # steps in sequence that lowered the error
    improving = 1
    previous = nothing + float("inf")
    while (step < FIT_MAX_STEPS) & (improving > 0):
        # K_B (G_Ap + K_A G_Aq K_A^T) = K_qp G_Ap + K_qq G_Aq K_A^T
        multiply(p_s, t, start, A_q, one, R, T)
        multiply_add(p_s, S, t, start, A_p, one, R, T, TRANS_B=True)
        multiply_add(p_s, rhs, K_qq, t, KG, one, R, T, TRANS_B=True)
        negative_inverse(p_s, S, singular, nothing, R, T)
        multiply(p_s, K_B, rhs, S, -one, R, T)
        # (C^T G_Bp C + K_B^T G_Bq K_B) K_A = C^T G_Bp K_pq + K_B^T G_Bq K_qq
        multiply(p_s, t, K_B, B_q, one, R, T, TRANS_A=True)
        multiply_add(p_s, S, t, K_B, CtGC, one, R, T)
        multiply_add(p_s, rhs, t, K_qq, CtGK, one, R, T)
        negative_inverse(p_s, S, singular, nothing, R, T)
        multiply(p_s, found, S, rhs, -one, R, T)
        # Squared error: of qp, <G_Bq D, D G_Ap> with D = K_B - K_qp; of pq and qq at their minimum
        # in K_A, the constant less <rhs G_Aq, K_A>.
        multiply(p_s, S, rhs, A_q, one, R, T)
        multiply(p_s, rhs, A_p, K_B, one, R, T, TRANS_B=True)
        error = constant - inner(p_s, S, found, R, T)
        error += inner_of_differences(p_s, t, KtG, rhs, GKt, R, T)
        error = tl.maximum(error, 0.0)
        rises = error > previous
        improving = tl.where(rises | (previous - error > error * FIT_STALL), 1, 0)  # NaN stops too
        # The next step starts beyond the last one, the farther the longer the error has fallen.
        falls = tl.where(rises, 0.0, falls + 1.0)
        beyond = tl.maximum((falls - 1.0) / (falls + 1.0), 0.0)
        extrapolate(p_s, start, K_A, found, beyond, R, T)
        previous = error
        step += 1
    copy(p_s, slot(RESULT) + 3 * p, C, R, T)
    multiply(p_s, slot(RESULT) + 2 * p + q, C, K_A, one, R, T)
    multiply(p_s, slot(RESULT) + 3 * q, K_B, K_A, one, R, T)


@triton.jit(noinline=True)
def _largest_block(p_s, R: tl.constexpr, T: tl.constexpr):
    """RESULT: the block of most energy alone, which has rank r by itself. Returns its number."""
    left = slot(WORK)
    right = slot(WORK) + 1
    nothing = tl.full([], 0.0, tl.float64)
    one = nothing + 1.0
    largest = slot(0)
    most = nothing
    for block in range(4):
        scaled_identity(p_s, slot(RESULT) + block, nothing, R, T)
        k = slot(CORES) + block
        multiply(p_s, left, slot(GRAMS) + block // 2, k, one, R, T)
        multiply(p_s, right, k, slot(GRAMS) + 2 + block % 2, one, R, T)
        energy = inner(p_s, left, right, R, T)
        largest = tl.where(energy > most, block, largest)
        most = tl.maximum(energy, most)
    copy(p_s, slot(RESULT) + largest, slot(CORES) + largest, R, T)
    return largest


@triton.jit
def _same_cores(p, unpinned, largest):
    """Where X_in, X_out, Y_in and Y_out are."""
    C = slot(CORES) + 3 * p
    K_B = slot(RESULT) + 2 * (1 - p) + p
    X_in = tl.where(p == 0, C, K_B)
    X_out = tl.where(p == 0, K_B, C)
    Y_in = tl.where(p == 0, IDENTITY, FIT)
    Y_out = tl.where(p == 0, FIT, IDENTITY)
    if unpinned:  # of `_largest_block`
        block = slot(RESULT) + largest
        zero = slot(RESULT) + 3 - largest
        X_in = tl.where(largest < 2, block, zero)
        X_out = tl.where(largest < 2, zero, block)
        Y_in = tl.where(largest % 2 == 0, IDENTITY, zero)
        Y_out = tl.where(largest % 2 == 0, zero, IDENTITY)
    return X_in, X_out, Y_in, Y_out


@triton.jit
def _write_same(p_s, found, p_P, p_Q, out, e, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """The cores in float32, and their products with the coordinates that recompose multiplies."""
    RR: tl.constexpr = R * R
    X_in, X_out, Y_in, Y_out = found
    p_X_in, p_X_out, p_Y_in, p_Y_out, p_W, p_Z = out
    store_single(p_X_in + e * RR, p_s, X_in, R, T)
    store_single(p_X_out + e * RR, p_s, X_out, R, T)
    store_single(p_Y_in + e * RR, p_s, Y_in, R, T)
    store_single(p_Y_out + e * RR, p_s, Y_out, R, T)
    times_difference(p_W + e * K * R, p_P, R, 1, p_s, X_in, X_out, R, 1, R, K, R, T)
    times_difference(p_Z + e * K * R, p_Q, 1, K, p_s, Y_in, Y_out, 1, R, R, K, R, T)


@triton.jit
def _write_exact(p_s, on_A, p_P, p_Q, out, e, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """The same; on_A: whether A is the side that the cores are on."""
    RR: tl.constexpr = R * R
    p_Y_in, p_Y_out, p_Z = out
    for half in range(2):
        k_in = slot(CORES) + 2 * half
        store_single(p_Y_in + (e * 2 + half) * RR, p_s, k_in, R, T)
        store_single(p_Y_out + (e * 2 + half) * RR, p_s, k_in + 1, R, T)
        p_Ze = p_Z + e * 2 * K * R + half * R
        if on_A:
            times_difference(p_Ze, p_Q, 1, K, p_s, k_in, k_in + 1, 1, R, 2 * R, K, R, T)
        else:
            k_of_B = slot(CORES) + half
            times_difference(p_Ze, p_P, R, 1, p_s, k_of_B, k_of_B + 2, R, 1, 2 * R, K, R, T)
