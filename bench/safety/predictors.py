"""What might tell beforehand whether realignment works: with prompts, and from weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import csulora
from bench.safety.evaluate import Evaluator
from bench.safety.model import hidden
from bench.safety.problem import Problem, update
from csulora.baselines import energy

KS = (2, 8, 16, 64)


def predictors(problem: Problem, evaluator: Evaluator) -> dict[str, Any]:
    """All of them; `data` needs prompts, the others do not."""
    return {
        "spectrum": _spectrum(problem),
        "geometry": _geometry(problem),
        "cosines": _cosines(problem),
        "norm_ratio": norm_ratio(problem),
        "data": activations(problem, evaluator),
    }


def _spectrum(problem: Problem) -> dict[str, dict[str, float]]:
    """D's singular values by kind of module, means over layers: the share of the first and first four,
    the participation ratio (sum s^2)^2 / sum s^4, the number above the noise edge, and ||D||."""
    rows: dict[str, list[list[float]]] = {}
    for name, D in problem.D.items():
        squares = torch.linalg.svdvals(D.double()).square()
        total = float(squares.sum())
        found = problem.subspace.modules[name]
        row = [
            float(squares[0]) / total,
            float(squares[:4].sum()) / total,
            total**2 / float(squares.square().sum()),
            float((found.noise_edge < found.S).sum()),
            math.sqrt(total),
        ]
        rows.setdefault(_kind(name), []).append(row)
    keys = ("top1", "top4", "participation", "above_edge", "norm")
    return {
        kind: dict(zip(keys, torch.tensor(values).mean(0).tolist(), strict=True))
        for kind, values in rows.items()
    }


def _geometry(problem: Problem) -> dict[str, dict[str, float]]:
    """Read gain and overlap with D over all modules, by k."""
    places = csulora.geometry.geometry(problem.adapter, problem.subspace, device="cpu").totals
    return {
        str(p.k): {"read_gain": p.read_gain, "overlap": p.overlap, **p.relative_energy}
        for p in places
        if p.k in KS
    }


def _cosines(problem: Problem) -> dict[str, float]:
    """cos(dW, D) by kind of module, all layers taken as one vector."""
    sums: dict[str, list[float]] = {}
    for name, D in problem.D.items():
        dW = update(problem.adapter, name).double()
        parts = (dW * D).sum(), dW.square().sum(), D.double().square().sum()
        row = sums.setdefault(_kind(name), [0.0, 0.0, 0.0])
        for i, part in enumerate(parts):
            row[i] += float(part)
    return {
        kind: inner / math.sqrt(a * b) if a * b else 0.0 for kind, (inner, a, b) in sums.items()
    }


def norm_ratio(problem: Problem) -> float:
    """||dW|| over ||D||, over all modules that the adapter has."""
    total = sum(float(D.double().square().sum()) for D in problem.D.values())
    return math.sqrt(energy(problem.adapter) / total)


@torch.no_grad()
def activations(problem: Problem, evaluator: Evaluator) -> dict[str, dict[str, dict[str, float]]]:
    """By k and kind of validation prompt: `input`, the share of the energy of what modules read that lies
    in V_k, and `response`, that of what the adapter answers, ||dW V V^T x||^2 over ||dW x||^2; means
    over modules. Of the aligned model, over the prompts' own tokens."""
    sums: dict[str, dict[str, dict[str, float]]] = {str(k): {} for k in KS}
    weights = {name: X.to(evaluator.device) for name, X in problem.aligned.items()}
    for kind, requests in evaluator.sets["validation"].items():
        inputs: dict[str, Tensor] = {}
        hidden(weights, requests.data.tokens[None], None, inputs)
        length = requests.data.tokens.shape[1]
        asked = torch.arange(length, device=evaluator.device) <= requests.starts[:, None] - 1
        rows: dict[int, list[tuple[float, float]]] = {k: [] for k in KS}
        for name in problem.D:
            x = inputs[name][0][asked.flatten()].double().cpu()  # (tokens, d_in)
            dW = update(problem.adapter, name).double()
            V = problem.subspace.modules[name].V.double()
            all_in, all_out = float(x.square().sum()), float((x @ dW.mT).square().sum())
            for k in KS:
                inside = x @ V[:, :k]
                out = inside @ (dW @ V[:, :k]).mT
                share = float(out.square().sum()) / all_out if all_out else 0.0
                rows[k].append((float(inside.square().sum()) / all_in, share))
        for k, values in rows.items():
            mean = torch.tensor(values).mean(0).tolist()
            sums[str(k)][kind] = {"input": mean[0], "response": mean[1]}
    return sums


def rounded(value: Any, digits: int = 4) -> Any:
    """The same with every float rounded, for a small file."""
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: rounded(x, digits) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(x, digits) for x in value]
    return value


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
