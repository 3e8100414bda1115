"""Other closed forms, on trial: none is in the product.

All replace on D's input directions a share of the update by D's own answer, as realignment does; they
differ in the share. Dense and in float64, since these models are small.

    ratio    f_i = lambda t_i / (||dW v_i||^2 + lambda t_i): where the adapter does much more than
             alignment did, as a skill does, it is left alone
    global   f_i = lambda t_i / (t_max + lambda t_i), t_max the largest of all modules, so that a module
             which alignment hardly moved is hardly changed
    weighted f_i = lambda t_i / (t_1 w_i + lambda t_i), w_i = ||dW v_i||^2 over what is typical of the
             module: ratio without a scale. max, mean: of the directions above the noise edge;
             aligned: their mean, weighted by t; energy: ||dW||^2
    shield   a change costs more on inputs that the adapter reads strongly: min_X 1/2 ||X - dW||^2
             + mu/(2 ||dW||_2^2) ||(X - dW) dW^T||^2 + lambda/(2 s_1^2) ||(X - gamma D) D^T||^2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import csulora
from bench.safety.model import MLP, TARGETS
from bench.safety.problem import Problem, update
from csulora import LoraAdapter, Realignment, baselines
from csulora.adapter import LoraModule

Change = Callable[
    [float, str, LoraModule], tuple[Tensor, Tensor]
]  # strength, name, module -> B', A'


class Known(NamedTuple):
    """What a share of one module may follow from."""

    t: Tensor  # (k,) squared singular values of D above the noise edge
    own: Tensor  # (k,) ||dW v_i||^2
    energy: Tensor  # ||dW||^2
    largest: float  # t of all modules


Share = Callable[[float, Known], Tensor]  # strength -> f (k,)
LARGE = 1e12  # stands for an infinite strength
NOT_Q_K = tuple(kind for kind in TARGETS if kind not in ("q_proj", "k_proj"))


def builders(problem: Problem) -> dict[str, Callable[[float], LoraAdapter]]:
    """By name, each trial's adapter by strength."""
    found = {}
    for name, share in (("ratio", _ratio), ("global", _global)):
        for form in ("same", "exact"):
            found[f"{name} {form}"] = _shared(problem, share, form, TARGETS)
        found[f"{name} same, q, k left alone"] = _shared(problem, share, "same", NOT_Q_K)
        found[f"{name} exact, q, k left alone"] = _shared(problem, share, "exact", NOT_Q_K)
    for mu in (3.0, 30.0):
        found[f"shield {mu:g}"] = _shielded(problem, mu, TARGETS)
    found["shield 10, q, k left alone"] = _shielded(problem, 10.0, NOT_Q_K)
    found["mlp dropped, realign exact v and o"] = _mlp_dropped(problem)
    return found


def weighted(problem: Problem) -> dict[str, Callable[[float], LoraAdapter]]:
    """By name, ratio and its forms without a scale, each form same."""
    shares = {"ratio": _ratio} | {name: _weighted(typical) for name, typical in TYPICAL.items()}
    return {name: _shared(problem, share, "same", TARGETS) for name, share in shares.items()}


def _mlp_dropped(problem: Problem) -> Callable[[float], LoraAdapter]:
    """No update of MLPs at all, and realignment of what attention writes."""
    names = [name for name in problem.adapter.modules if name.rpartition(".")[2] in MLP]
    start = Realignment(form="exact")

    def build(strength: float) -> LoraAdapter:
        chosen = start.with_strength(strength)
        corrected, _ = csulora.correct(problem.adapter, problem.subspace, chosen, device="cpu")
        return baselines.pruned(problem.only(corrected, ("v_proj", "o_proj")), names)

    return build


def _ratio(strength: float, known: Known) -> Tensor:
    return strength * known.t / (known.own + strength * known.t).clamp_min(1e-300)


def _global(strength: float, known: Known) -> Tensor:
    return strength * known.t / (known.largest + strength * known.t)


def _weighted(typical: Callable[[Known], Tensor]) -> Share:
    """Multiplied out, so that no weight is divided by: a module that does nothing is left alone."""

    def share(strength: float, known: Known) -> Tensor:
        pull = strength * known.t * typical(known)
        return pull / (known.t.max() * known.own + pull).clamp_min(1e-300)

    return share


TYPICAL: dict[str, Callable[[Known], Tensor]] = {
    "weighted max": lambda known: (known.own * (known.t > 0)).max(),
    "weighted mean": lambda known: (
        (known.own * (known.t > 0)).sum() / (known.t > 0).sum().clamp_min(1)
    ),
    "weighted aligned": lambda known: known.own @ known.t / known.t.sum().clamp_min(1e-300),
    "weighted energy": lambda known: known.energy,
}


def _above_edge(problem: Problem, name: str) -> Tensor:
    found = problem.subspace.modules[name]
    return (found.S.double().square() - found.noise_edge**2).clamp_min(0)


def _built(
    problem: Problem, kinds: Collection[str], most: float, change: Change
) -> Callable[[float], LoraAdapter]:
    """The adapter by strength, up to `most`: modules of these kinds changed, the others left alone."""

    def build(strength: float) -> LoraAdapter:
        modules = {}
        for name, m in problem.adapter.modules.items():
            chosen = name.rpartition(".")[2] in kinds
            modules[name] = _module(m, *change(min(strength, most), name, m)) if chosen else m
        return replace(problem.adapter, modules=modules)

    return build


def _shared(
    problem: Problem, share: Share, form: str, kinds: Collection[str]
) -> Callable[[float], LoraAdapter]:
    gamma = 1.0 if form == "same" else 0.5
    above = {name: _above_edge(problem, name) for name in problem.adapter.modules}
    largest = max(float(t.max()) for t in above.values()) or 1.0

    def change(strength: float, name: str, m: LoraModule) -> tuple[Tensor, Tensor]:
        found = problem.subspace.modules[name]
        U, S, V = found.U.double(), found.S.double(), found.V.double()
        B, A = m.B.double(), m.A.double()
        Q = A @ V
        known = Known(
            above[name],
            (m.scaling * B @ Q).square().sum(0),
            (m.scaling * B @ A).square().sum(),
            largest,
        )
        f = share(strength, known)
        target = gamma / m.scaling * S * f
        if form == "same":
            return B, A + (torch.linalg.lstsq(B, U * target).solution - Q * f) @ V.mT
        return torch.cat([B, U * target], dim=1), torch.cat([A - Q * f @ V.mT, V.mT])

    return _built(problem, kinds, LARGE, change)


def _shielded(
    problem: Problem, mu: float, kinds: Collection[str]
) -> Callable[[float], LoraAdapter]:
    def change(strength: float, name: str, m: LoraModule) -> tuple[Tensor, Tensor]:
        found = problem.subspace.modules[name]
        t, V = _above_edge(problem, name), found.V.double()
        D = (found.U.double() * found.S.double()) @ V.mT
        dW = update(problem.adapter, name).double()
        pull = strength / max(float(t.max()), 1e-300) * (V * t) @ V.mT  # (d_in, d_in)
        own = dW.mT @ dW / max(float(torch.linalg.matrix_norm(dW, 2)) ** 2, 1e-300)
        eye = torch.eye(dW.shape[1], dtype=dW.dtype)
        # (X - dW) (I + mu H + L) = (gamma D - dW) L
        moved = torch.linalg.solve(eye + mu * own + pull, ((0.5 * D - dW) @ pull).mT).mT
        return torch.cat([m.B.double(), moved / m.scaling], dim=1), torch.cat([m.A.double(), eye])

    return _built(problem, kinds, 1e6, change)


def _module(m: LoraModule, B: Tensor, A: Tensor) -> LoraModule:
    """The factors with the scaling that they had: what is done with them is only merging."""
    assert math.isfinite(float(B.sum() + A.sum()))
    return replace(m, B=B.float(), A=A.float())
