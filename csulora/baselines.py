"""Controls and published methods that a correction has to be compared with.

Each takes an adapter and returns one, in factor form: no d_out x d_in matrix is formed. D = W_aligned -
W_base is given as a SafetySubspace, which stands for D_k = U S V^T, or whole, as a matrix (d_out, d_in)
for each module; then the published formulas are followed to the letter. Where a method comes from, and
what is different here, is said in its docstring.

Symbols as in docs/method.md: dW = s B A, E the energy ||dW||_F^2. Arithmetic is float64, results have the
type of the factors they replace. Tensors that the adapter passes through stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from csulora.adapter import LoraAdapter, LoraModule
from csulora.errors import CsuloraError, UsageError
from csulora.files.layouts import match_layouts
from csulora.files.peft_ranks import alpha_for_rank
from csulora.pipeline.memory import balance
from csulora.pipeline.plan import Plan
from csulora.report import Totals
from csulora.settings import Correction
from csulora.subspace import ModuleSubspace, SafetySubspace

Displacement = SafetySubspace | Mapping[str, Tensor]
Side = Literal["left", "right", "both"]

# What is kept of the blocks (aligned, left, right, off) by a hard projection of these sides.
_KEPT = {"left": (1, 1, 0, 0), "right": (1, 0, 1, 0), "both": (1, 0, 0, 0)}


def scaled(adapter: LoraAdapter, factor: float) -> LoraAdapter:
    """Every update multiplied by one number: what any correction must beat.

    Known as WiSE-FT (arXiv 2109.01903): the weights between the aligned and the fine-tuned model.
    """
    modules = {
        name: replace(m, B=_finite(name, m.B.detach() * factor))
        for name, m in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def equal_norm_factor(totals: Totals) -> float:
    """The factor that scales the adapter before to the norm of the one after; 1 for a zero update."""
    before = totals.energy_before
    return math.sqrt(totals.energy_after / before) if before else 1.0


def equal_change_factor(change: float) -> float:
    """The factor at which `scaled` changes the adapter by `change`, relative to its norm.

    0 beyond a change of 1, which no scaling down reaches.
    """
    return max(0.0, 1.0 - change)


def projected(adapter: LoraAdapter, subspace: SafetySubspace, sides: Side = "both") -> LoraAdapter:
    """The hard projection: P_U dW ("left"), dW P_V ("right") or P_U dW P_V ("both"); rank r."""
    if sides not in _KEPT:
        raise UsageError(f"sides must be one of {', '.join(_KEPT)}, not {sides!r}")
    aligned, left, right, off = (0.0 if kept else math.inf for kept in _KEPT[sides])
    correction = Correction(aligned, left, right, off)
    modules = {}
    for member in Plan.of(adapter, subspace, correction).members:
        m, U, V = member.module, member.U.double(), member.V.double()
        assert isinstance(member.correction, Correction)
        # Its own strengths: the sides of an embedding that is tied to the head are the head's.
        B, A = m.B.double(), m.A.double()
        if member.correction.lambda_right > 0:
            B = U @ (U.mT @ B)
        if member.correction.lambda_left > 0:
            A = (A @ V) @ V.mT
        modules[member.name] = _stored(member.name, m, B, A)
    return replace(adapter, modules=modules)


def safe_lora(adapter: LoraAdapter, D: Displacement, threshold: float = 0.5) -> LoraAdapter:
    """Safe LoRA (arXiv 2405.16833): dW becomes C dW, C = D D^T / ||D||_F, where their cosine is small.

    threshold: of the cosine of dW and C dW; modules below it are projected (the public code also takes
        those at it). 0.5 is the public code's default.

    A subspace stands for D_k in D D^T; the norm is that of the whole D, by the stored energy share.
    """
    values = cosines(adapter, D)
    return _projected_by_safe_lora(adapter, D, {n for n, c in values.items() if c < threshold})


def safe_lora_of(adapter: LoraAdapter, D: Displacement, count: int) -> LoraAdapter:
    """Safe LoRA that projects the `count` modules of lowest cosine, the public code's other choice."""
    return _projected_by_safe_lora(adapter, D, _lowest(cosines(adapter, D), count))


def cosines(adapter: LoraAdapter, D: Displacement) -> dict[str, float]:
    """Safe LoRA's cosine of dW and C dW by module, 0 to 1.

    Ours: 1, so that it is left alone, for a zero update and where alignment moved nothing.
    """
    found = {}
    for pair in _pairs(adapter, D):
        own, other, inner = _moments(pair)
        found[pair.name] = inner / math.sqrt(own * other) if own * other > 0 else 1.0
    return found


def pruned(adapter: LoraAdapter, names: Collection[str]) -> LoraAdapter:
    """The adapter without the updates of some modules: their B is zero, which any server reads."""
    modules = {
        name: replace(m, B=torch.zeros_like(m.B)) if name in names else m
        for name, m in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def prune_lowest_cosine(adapter: LoraAdapter, D: Displacement, count: int) -> LoraAdapter:
    """Without the `count` modules that Safe LoRA would project first: is its projection needed at all?"""
    return pruned(adapter, _lowest(cosines(adapter, D), count))


def prune_highest_e_diem(adapter: LoraAdapter, D: Displacement, count: int) -> LoraAdapter:
    """SPLoRA (arXiv 2506.18931): without the `count` modules furthest from their projection by E-DIEM."""
    return pruned(
        adapter, _lowest({n: -x for n, x in e_diem(adapter, D).items() if x is not None}, count)
    )


def prune_random(adapter: LoraAdapter, count: int, seed: int = 0) -> LoraAdapter:
    """Without `count` modules drawn at random: what any choice of modules must beat."""
    names = sorted(adapter.modules)
    _check_count(count, len(names))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return pruned(adapter, {names[i] for i in order[:count].tolist()})


def e_diem(adapter: LoraAdapter, D: Displacement) -> dict[str, float | None]:
    """How far dW is from Safe LoRA's C dW, by module, in a measure that does not grow with dimension.

    DIEM (arXiv 2407.08623) is a Euclidean distance d, less its expected value E[d] for unrelated vectors,
    over its spread. SPLoRA's E-DIEM takes both from data. Ours: E[d]^2 = ||dW||^2 + ||C dW||^2 and spread
    E[d] / sqrt(2n), what n unrelated Gaussian entries of the same norms have. (The public code's samples
    are copies of the pair itself, so that its d - E[d] is rounding; and it also scales by quartiles.)

    None for a zero update and where alignment moved nothing.
    """
    found: dict[str, float | None] = {}
    for pair in _pairs(adapter, D):
        own, other, inner = _moments(pair)
        n = pair.module.B.shape[0] * pair.module.A.shape[1]
        distance = math.sqrt(max(own + other - 2 * inner, 0.0))
        expected = math.sqrt(own + other)
        moved = own > 0 and other > 0
        found[pair.name] = math.sqrt(2 * n) * (distance / expected - 1) if moved else None
    return found


def add_back(adapter: LoraAdapter, D: Displacement, gamma: float) -> LoraAdapter:
    """RESTA (arXiv 2402.11746): dW + gamma D, rank r + k (r + min(d_out, d_in) for a whole D).

    RESTA's safety vector is an aligned model less one made harmful by training; ours is D, which needs no
    training. With DARE first it is `add_back(dropped(adapter, rate), D, gamma)`.
    """
    modules, ranks = {}, {name: m.rank for name, m in adapter.modules.items()}
    rslora = bool(adapter.config.get("use_rslora"))
    for pair in _pairs(adapter, D):
        m = pair.module
        if m.scaling == 0:
            raise CsuloraError(f"{pair.name}: its scaling is 0, so nothing can be added to it")
        left, right = _balanced(pair.D, gamma / m.scaling)
        A, B = torch.cat([m.A.double(), right]), torch.cat([m.B.double(), left], dim=1)
        alpha = alpha_for_rank(m.alpha, m.rank, A.shape[0], rslora)
        modules[pair.name] = replace(_stored(pair.name, m, B, A), alpha=alpha)
    new = replace(adapter, modules=modules)
    return replace(new, config=new.written_config(ranks))


def gamma_for_change(
    adapter: LoraAdapter, D: Displacement, change: float, start: LoraAdapter | None = None
) -> float:
    """The gamma >= 0 at which `add_back` changes the adapter by `change`, relative to its norm.

    start: what D is added to, where that is not the adapter itself (`dropped(adapter, ...)`).

    Raises UsageError where no gamma does: `start` alone changes more, or nothing is there to add.
    """
    start = adapter if start is None else start
    target = change**2 * energy(adapter)
    c = relative_change(adapter, start) ** 2 * energy(adapter)
    pairs = list(_pairs(start, D))
    a = sum(_energy_of(pair.D) for pair in pairs)
    # <start - adapter, D>; 0 where they are one.
    b = sum(_inner(pair.module, pair.D) for pair in pairs)
    b -= sum(_inner(pair.module, pair.D) for pair in _pairs(adapter, D))
    if a == 0 or c > target:
        raise UsageError(f"no gamma changes the adapter by {change:g}: it is at {c**0.5:g} before")
    return (math.sqrt(b * b + a * (target - c)) - b) / a


def dropped(adapter: LoraAdapter, rate: float, seed: int = 0) -> LoraAdapter:
    """DARE (arXiv 2311.03099): entries dropped with probability `rate`, the others over 1 - rate.

    On the entries of B and of A, as PEFT's `dare_linear` has it: dropping those of dW would leave no low
    rank. The expected update is the same.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"rate must be at least 0 and below 1, not {rate}")
    generator = torch.Generator().manual_seed(seed)

    def drop(X: Tensor) -> Tensor:
        keep = torch.rand(X.shape, generator=generator) >= rate
        return X.detach().double() * keep.to(X.device) / (1 - rate)

    modules = {name: _stored(name, m, drop(m.B), drop(m.A)) for name, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


def lox(adapter: LoraAdapter, subspace: SafetySubspace, rank: int, alpha: float) -> LoraAdapter:
    """LoX (arXiv 2506.15606): dW + alpha D_rank, D's leading `rank` triplets; rank r + `rank`.

    The paper extrapolates the aligned weights so before they are fine-tuned; here it comes after.
    """
    return add_back(adapter, subspace.leading(rank), alpha)


def random_subspace(subspace: SafetySubspace, seed: int = 0) -> SafetySubspace:
    """Random orthonormal directions, as many as `subspace` has in every module, with its S.

    So its U S V^T is a random matrix with the singular values of D_k.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(like: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(like.shape, generator=generator)).Q

    modules = {
        name: replace(module, U=directions(module.U), V=directions(module.V))
        for name, module in subspace.modules.items()
    }
    return replace(subspace, modules=modules, path=None)


def energy(adapter: LoraAdapter) -> float:
    """||dW||_F^2 over all modules, scaling included."""
    return math.fsum(_energy_of(_factors(m)) for m in adapter.modules.values())


def relative_change(adapter: LoraAdapter, other: LoraAdapter) -> float:
    """||dW' - dW||_F / ||dW||_F over all modules: the currency in which methods are compared.

    0 for a zero update that stays one, infinite for one that does not. Raises UsageError for adapters of
    other modules.
    """
    if _shapes(adapter) != _shapes(other):
        raise UsageError("the adapters update other modules, or with other shapes")
    parts = []
    for name, m in adapter.modules.items():
        (B, A), (new_B, new_A) = _factors(m), _factors(other.modules[name])
        parts.append(_energy_of((torch.cat([new_B, -B], dim=1), torch.cat([new_A, A]))))
    change, before = math.fsum(parts), energy(adapter)
    if before == 0:
        return math.inf if change else 0.0
    return math.sqrt(change / before)


def _shapes(adapter: LoraAdapter) -> dict[str, tuple[int, int]]:
    return {name: (m.B.shape[0], m.A.shape[1]) for name, m in adapter.modules.items()}


class _Pair(NamedTuple):
    """A module of the adapter and its D, as a product of float64 matrices (one, or U S and V^T)."""

    name: str
    module: LoraModule
    D: tuple[Tensor, ...]
    norm: float  # ||D||_F of the whole D


def _pairs(adapter: LoraAdapter, D: Displacement) -> Iterator[_Pair]:
    """Each module with its D, in the order of the adapter."""
    if isinstance(D, SafetySubspace):
        for member in Plan.of(adapter, D, Correction()).members:
            found = D.modules[member.target]
            factors = member.U.double() * found.S.double(), member.V.double().mT
            yield _Pair(member.name, member.module, factors, _whole_norm(found))
        return
    remedy = "give a D for every module that the adapter updates"
    targets = match_layouts(adapter.modules, D.keys(), "D", remedy)
    shapes = _shapes(adapter)
    for name, m in adapter.modules.items():
        matrix, shape = D[targets[name]], shapes[name]
        if matrix.shape != shape:
            raise CsuloraError(
                f"D of {targets[name]} is {tuple(matrix.shape)}, but {name} is {shape}"
            )
        matrix = matrix.double()
        yield _Pair(name, m.detached(), (matrix,), float(torch.linalg.matrix_norm(matrix)))


def _whole_norm(found: ModuleSubspace) -> float:
    """||D||_F, by the share of its square that S holds; ||S|| where a file does not say that share."""
    kept = float(found.S.double().square().sum())
    return math.sqrt(kept / found.energy_share if found.energy_share > 0 else kept)


def _moments(pair: _Pair) -> tuple[float, float, float]:
    """||dW||^2, ||C dW||^2 and <dW, C dW>, all over s^2."""
    B, A = pair.module.B.double(), pair.module.A.double()
    CB, G_A = _onto(pair, B), A @ A.mT
    own, other, inner = B.mT @ B, CB.mT @ CB, B.mT @ CB
    return tuple(max(float((X * G_A).sum()), 0.0) for X in (own, other, inner))  # type: ignore[return-value]


def _onto(pair: _Pair, X: Tensor) -> Tensor:
    """C X = D D^T X / ||D||_F; zero where D is."""
    for factor in pair.D:
        X = factor.mT @ X
    for factor in reversed(pair.D):
        X = factor @ X
    return X / pair.norm if pair.norm else X


def _projected_by_safe_lora(
    adapter: LoraAdapter, D: Displacement, names: Collection[str]
) -> LoraAdapter:
    modules = dict(adapter.modules)
    for pair in _pairs(adapter, D):
        if pair.name in names:
            m = pair.module
            modules[pair.name] = _stored(pair.name, m, _onto(pair, m.B.double()), m.A)
    return replace(adapter, modules=modules)


def _lowest(values: Mapping[str, float], count: int) -> set[str]:
    """The `count` names of lowest value; equal values in the order of names."""
    _check_count(count, len(values))
    return set(sorted(values, key=lambda name: (values[name], name))[:count])


def _check_count(count: int, largest: int) -> None:
    if not 0 <= count <= largest:
        raise UsageError(f"count must be between 0 and {largest}, not {count}")


def _factors(m: LoraModule) -> tuple[Tensor, Tensor]:
    """dW as a product of two float64 matrices."""
    return m.scaling * m.B.detach().double(), m.A.detach().double()


def _energy_of(factors: tuple[Tensor, ...]) -> float:
    """The squared Frobenius norm of a product of one or two matrices."""
    if len(factors) == 1:
        return float(factors[0].square().sum())
    left, right = factors
    return max(float(((left.mT @ left) * (right @ right.mT)).sum()), 0.0)


def _inner(m: LoraModule, D: tuple[Tensor, ...]) -> float:
    """<dW, D>."""
    X = m.B.double()
    for factor in D:
        X = factor.mT @ X
    return m.scaling * float((X * m.A.double().mT).sum())


def _balanced(D: tuple[Tensor, ...], factor: float) -> tuple[Tensor, Tensor]:
    """factor * D as two factors: of about equal norms, or for one whole matrix beside the identity."""
    if len(D) == 1:
        (matrix,) = D
        eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        return (
            (factor * matrix, eye) if matrix.shape[0] >= matrix.shape[1] else (factor * eye, matrix)
        )
    left, right = D
    size = torch.linalg.vector_norm(left, dim=0).clamp_min(torch.finfo(left.dtype).tiny).sqrt()
    root = math.sqrt(abs(factor))
    return math.copysign(root, factor) * left / size, root * size[:, None] * right


def _stored(name: str, module: LoraModule, B: Tensor, A: Tensor) -> LoraModule:
    """The module with these factors in the types of its own."""
    types = module.B.dtype, module.A.dtype
    if torch.float16 in types:
        B, A = balance(B, A)
    return replace(module, B=_finite(name, B.to(types[0])), A=_finite(name, A.to(types[1])))


def _finite(name: str, X: Tensor) -> Tensor:
    if not bool(torch.isfinite(X).all()):
        dtype = str(X.dtype).removeprefix("torch.")
        raise CsuloraError(f"{name}: the result does not fit {dtype}")
    return X
