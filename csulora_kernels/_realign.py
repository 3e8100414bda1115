"""Second stage of realignment: what is added to the factors of every adapter's modules, in float64.

A persistent program takes one module of one adapter after the other. With the shares f of the directions
that are replaced and t = (gamma / s) S f,

    same     Y = G_B^-1 P^T t - Q f           A' = A + Y V^T
    exact    Y = -Q f,  c = t                 A' = [A + Y V^T ; V^T],  B' = [B, U c]

Where a column of B, scaled to norm 1, is nearly dependent on those before it, G_B^-1 counts as zero and its
diagonal as infinite: the caller solves such modules otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from csulora_kernels._smallmat import (
    block_energies,
    gram_of_coordinates,
    inner,
    negative_inverse,
    slot,
    symmetric_difference,
    tile,
    tile_count,
)
from csulora_kernels.tiles import DIRECTIONS, REALIGN_MATRICES

LARGEST = tl.constexpr(3.0e38)  # a strength is a float32 argument: anything beyond is infinity
SMALLEST_PIVOT = tl.constexpr(1e-5)  # of B's correlations, as the reference has it
SMALLEST_NORMAL = tl.constexpr(2.0**-1022)
STEP = tl.constexpr(DIRECTIONS)  # K is a multiple of it

# Scratch of one program: matrices; then Y^T and Z^T (K, R) and f, t (K).
GRAMS = tl.constexpr(0)  # G_B in, out and G_A in, out
INVERSE = tl.constexpr(4)  # of G_B
ZZ = tl.constexpr(5)
YY = tl.constexpr(6)
MATRICES = tl.constexpr(REALIGN_MATRICES)


@triton.jit(do_not_specialize=["n_entries", "n_modules"])
def realign_kernel(
    p_P,  # (N, M, K, R) float32
    p_Q,  # (N, M, R, K)
    p_G_B,  # (N, M, R, R)
    p_G_A,
    p_S,  # (M, K) float64
    p_edge,  # (M) float64
    p_scaling,  # (N, M) float64
    p_Z,  # (N, M, K, R) float32: Y^T
    p_c,  # (N, M, K) float32, not touched for `same`
    p_inverse,  # (N, M, R) float64
    p_energy,  # (N, M) float64
    p_before,  # (N, M, 4)
    p_after,  # (N, M, 4)
    p_change,  # (N, M)
    p_error,  # (N, M)
    p_scratch,  # (programs, SIZE) float64
    n_entries,
    n_modules,
    strength,
    gamma,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    EDGE: tl.constexpr,
    OPPOSED: tl.constexpr,
    SAME: tl.constexpr,
):
    RR: tl.constexpr = R * R
    p_s = p_scratch + tl.program_id(0).to(tl.int64) * SIZE
    p_y = p_s + MATRICES * RR
    p_z = p_y + K * R
    p_f = p_z + K * R
    p_t = p_f + K
    first = tl.program_id(0)
    for step in range(0, n_entries - first, tl.num_programs(0)):
        e = (first + step).to(tl.int64)
        p_Pe = p_P + e * K * R
        p_Qe = p_Q + e * K * R
        p_G = p_G_B + e * RR
        in_B = slot(GRAMS)
        out_B = slot(GRAMS) + 1
        in_A = slot(GRAMS) + 2
        gram_of_coordinates(p_s, in_B, p_Pe, R, 1, K, R, T)
        gram_of_coordinates(p_s, in_A, p_Qe, 1, K, K, R, T)
        symmetric_difference(p_s, out_B, p_G, in_B, R, T)
        symmetric_difference(p_s, in_A + 1, p_G_A + e * RR, in_A, R, T)
        ff, fo, of, oo = block_energies(p_s, in_B, R, T)
        energy = ff + fo + of + oo
        inverse_energy = tl.where(energy > 0, 1.0 / tl.where(energy > 0, energy, 1.0), 0.0)
        tl.store(p_energy + e, energy)
        p_shares = p_before + e * 4
        tl.store(p_shares, ff * inverse_energy)
        tl.store(p_shares + 1, fo * inverse_energy)
        tl.store(p_shares + 2, of * inverse_energy)
        tl.store(p_shares + 3, oo * inverse_energy)

        i_module = e % n_modules
        scaling = tl.load(p_scaling + e)
        something = (energy > 0) & (scaling != 0)
        known = (p_S + i_module * K, tl.load(p_edge + i_module), scaling)
        shares = (p_f, p_t, p_c + e * K)
        _shares(p_Pe, p_Qe, known, something, strength, gamma, shares, K, R, EDGE, OPPOSED, SAME)
        if SAME:
            _correlations(p_s, INVERSE, p_G, R, T)
            # What is no positive pivot counts as 1.
            nothing = tl.full([], 0.0, tl.float64)
            smallest = negative_inverse(p_s, INVERSE, nothing, nothing + 1.0, R, T)
            _scaled_back(p_s, INVERSE, p_G, smallest > SMALLEST_PIVOT, p_inverse + e * R, R, T)
        else:
            tl.store(p_inverse + e * R + tl.arange(0, R), tl.zeros([R], tl.float64))
        lost, along_z, along_y, put = _shift(
            p_s, p_Pe, p_Qe, p_f, p_t, p_y, p_z, p_Z + e * K * R, K, R, T, SAME
        )
        gram_of_coordinates(p_s, slot(ZZ), p_z, R, 1, K, R, T)
        gram_of_coordinates(p_s, slot(YY), p_y, R, 1, K, R, T)
        # Inside of V the update is B Z, and for `exact` U c besides.
        new_ff = inner(p_s, in_B, slot(ZZ), R, T)
        new_of = inner(p_s, out_B, slot(ZZ), R, T)
        change = inner(p_s, in_B, slot(YY), R, T) + inner(p_s, out_B, slot(YY), R, T)
        if not SAME:
            new_ff += 2 * along_z + put
            change += 2 * along_y + put
        new_ff = tl.maximum(new_ff, 0.0)
        new_of = tl.maximum(new_of, 0.0)
        p_new = p_after + e * 4
        tl.store(p_new, new_ff * inverse_energy)
        tl.store(p_new + 1, fo * inverse_energy)
        tl.store(p_new + 2, new_of * inverse_energy)
        tl.store(p_new + 3, oo * inverse_energy)
        tl.store(p_change + e, tl.sqrt(tl.maximum(change * inverse_energy, 0.0)))
        exact = new_ff + fo + new_of + oo + lost
        relative = tl.where(exact > 0, lost / tl.where(exact > 0, exact, 1.0), 0.0)
        tl.store(p_error + e, tl.sqrt(relative))


@triton.jit
def _shares(
    p_P,
    p_Q,
    known,  # of the module
    something,
    strength,
    gamma,
    shares,  # where they go
    K: tl.constexpr,
    R: tl.constexpr,
    EDGE: tl.constexpr,
    OPPOSED: tl.constexpr,
    SAME: tl.constexpr,
):
    """f and t of all directions, and c; nothing where the update is not something."""
    p_S, edge, scaling = known
    p_f, p_t, p_c = shares
    largest = tl.load(p_S)
    largest *= largest
    if EDGE:
        largest = tl.maximum(largest - edge * edge, 0.0)
    strength = tl.full([], 0.0, tl.float64) + strength
    gamma = tl.full([], 0.0, tl.float64) + gamma
    for k_from in range(0, K, STEP):
        b_k = k_from + tl.arange(0, STEP)
        b_S = tl.load(p_S + b_k)
        b_t = b_S * b_S
        if EDGE:
            b_t = tl.maximum(b_t - edge * edge, 0.0)
        b_t = b_t / tl.maximum(largest, SMALLEST_NORMAL)
        if strength > LARGEST:
            b_f = tl.where(b_t > 0, 1.0, 0.0).to(tl.float64)
        else:
            b_f = strength * b_t / (1.0 + strength * b_t)
        if OPPOSED:
            b_r = tl.arange(0, R)
            b_P = tl.load(p_P + b_k[:, None] * R + b_r[None, :]).to(tl.float64)
            b_Q = tl.load(p_Q + b_r[None, :] * K + b_k[:, None]).to(tl.float64)
            b_f = tl.where(scaling * tl.sum(b_P * b_Q, axis=1) < 0, b_f, 0.0)
        b_f = tl.where(something, b_f, 0.0)
        b_t = gamma / tl.where(scaling == 0, 1.0, scaling) * b_S * b_f
        tl.store(p_f + b_k, b_f)
        tl.store(p_t + b_k, b_t)
        if not SAME:
            tl.store(p_c + b_k, b_t.to(tl.float32))
    tl.debug_barrier()


@triton.jit
def _scales(p_G, b_i, R: tl.constexpr):
    """1 / norm of each column of a factor with the float32 Gram matrix p_G; 0 for a zero column."""
    b_norm = tl.load(p_G + b_i * (R + 1)).to(tl.float64)
    return tl.where(b_norm > 0, 1.0 / tl.sqrt(tl.where(b_norm > 0, b_norm, 1.0)), 0.0)


@triton.jit(noinline=True)
def _correlations(p_s, c, p_G, R: tl.constexpr, T: tl.constexpr):
    """c = the symmetric p_G with its columns scaled to norm 1; 1 on the diagonal of zero columns."""
    p_c = p_s + c * (R * R)
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            row = i * T + tl.arange(0, T)
            column = j * T + tl.arange(0, T)
            b_g = tl.load(p_G + tile(i, j, R, T)).to(tl.float64)
            b_g = 0.5 * (b_g + tl.trans(tl.load(p_G + tile(j, i, R, T)).to(tl.float64)))
            b_row = _scales(p_G, row, R)
            b_g = b_g * b_row[:, None] * _scales(p_G, column, R)[None, :]
            empty = (row[:, None] == column[None, :]) & (b_row == 0)[:, None]
            tl.store(p_c + tile(i, j, R, T), tl.where(empty, 1.0, b_g))
    tl.debug_barrier()


@triton.jit(noinline=True)
def _scaled_back(p_s, c, p_G, regular, p_diagonal, R: tl.constexpr, T: tl.constexpr):
    """c = the inverse of p_G from the negative one of its correlations, and its diagonal."""
    p_c = p_s + c * (R * R)
    for i in range(tile_count(R, T)):
        row = i * T + tl.arange(0, T)
        b_row = _scales(p_G, row, R)
        b_diagonal = -tl.load(p_c + row * (R + 1)) * b_row * b_row
        infinite = tl.where(b_row > 0, float("inf"), 0.0)
        tl.store(p_diagonal + row, tl.where(regular, b_diagonal, infinite))
    tl.debug_barrier()
    for i in range(tile_count(R, T)):
        for j in range(tile_count(R, T)):
            b_row = _scales(p_G, i * T + tl.arange(0, T), R)
            b_column = _scales(p_G, j * T + tl.arange(0, T), R)
            b_c = -tl.load(p_c + tile(i, j, R, T)) * b_row[:, None] * b_column[None, :]
            tl.store(p_c + tile(i, j, R, T), tl.where(regular, b_c, 0.0))
    tl.debug_barrier()


@triton.jit
def _shift(
    p_s,
    p_P,
    p_Q,
    p_f,
    p_t,
    p_y,
    p_z,
    p_Z,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    SAME: tl.constexpr,
):
    """Y^T and (Q + Y)^T, (K, R) each. Returns

    the energy of t that no combination of the columns of B reaches (`same`), the inner products of t with
    the diagonals of P (Q + Y) and of P Y, and the energy of t.
    """
    p_i = p_s + INVERSE * (R * R)
    lost = tl.full([], 0.0, tl.float64)
    along_z = tl.full([], 0.0, tl.float64)
    along_y = tl.full([], 0.0, tl.float64)
    put = tl.full([], 0.0, tl.float64)
    for n in range(tile_count(K, T)):
        b_k = n * T + tl.arange(0, T)
        b_f = tl.load(p_f + b_k)
        b_t = tl.load(p_t + b_k)
        b_reached = tl.zeros([T], tl.float64)
        b_along_z = tl.zeros([T], tl.float64)
        b_along_y = tl.zeros([T], tl.float64)
        for j in range(tile_count(R, T)):
            b_j = j * T + tl.arange(0, T)
            o_kj = b_k[:, None] * R + b_j[None, :]
            b_Q = tl.load(p_Q + b_j[None, :] * K + b_k[:, None]).to(tl.float64)
            b_P = tl.load(p_P + o_kj).to(tl.float64)
            b_y = -b_Q * b_f[:, None]
            if SAME:
                b_m = tl.zeros([T, T], tl.float64)
                for i in range(tile_count(R, T)):
                    b_i = i * T + tl.arange(0, T)
                    b_Pi = tl.load(p_P + b_k[:, None] * R + b_i[None, :]).to(tl.float64)
                    b_m = tl.dot(b_Pi, tl.load(p_i + tile(i, j, R, T)), b_m, out_dtype=tl.float64)
                b_reached += tl.sum(b_m * b_P, axis=1)
                b_y += b_m * b_t[:, None]
            b_z = b_Q + b_y
            b_along_z += tl.sum(b_P * b_z, axis=1)
            b_along_y += tl.sum(b_P * b_y, axis=1)
            tl.store(p_y + o_kj, b_y)
            tl.store(p_z + o_kj, b_z)
            tl.store(p_Z + o_kj, b_y.to(tl.float32))
        b_missed = 1.0 - tl.minimum(tl.maximum(b_reached, 0.0), 1.0)
        lost += tl.sum(b_t * b_t * b_missed, axis=0)
        along_z += tl.sum(b_t * b_along_z, axis=0)
        along_y += tl.sum(b_t * b_along_y, axis=0)
        put += tl.sum(b_t * b_t, axis=0)
    tl.debug_barrier()
    if not SAME:
        lost = lost * 0.0
    return lost, along_z, along_y, put
