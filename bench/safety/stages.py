"""From nothing to base, aligned model and adapter of many worlds at once, each stage once per model.

Members of a stack that share a stage are trained together; worlds that share a base or an aligned model
use one. Every member's data order and start come from its own seed alone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.safety.model import (
    Lora,
    Weights,
    initial,
    lora_start,
    module_names,
)
from bench.safety.train import Data, Stage, answer_log_p, answer_loss, order, preference_loss, train
from bench.safety.worlds import BETA, World, pools, vocabulary

log = logging.getLogger("safety")
SCALE = 2.0  # lora_alpha / r
_SEED_STEP = {"base": 0, "aligned": 1, "adapter": 2}


@dataclass(frozen=True)
class Trained:
    """One world's models on the CPU: weights (1, ...), and the factors of its adapter (1, r, d)."""

    base: Weights
    aligned: Weights
    lora: Lora
    seconds: dict[str, float]


class Trainer:
    """Trains what is missing, on one device; keeps base and aligned models for the next worlds."""

    def __init__(self, device: torch.device, shorten: Callable[[Stage], Stage] = lambda s: s) -> None:
        self.device = device
        self.shorten = shorten
        data, self.rows = pools()
        self.data: Data = data.to(device)
        self.base: dict[tuple, Weights] = {}
        self.aligned: dict[tuple, Weights] = {}
        self.seconds: dict[tuple, float] = {}

    def run(self, jobs: list[tuple[World, int]]) -> Iterator[tuple[tuple[World, int], Trained]]:
        """Each (world, seed) with its models, as soon as they are there."""
        for key, group in _grouped(jobs, lambda w, s: (w.base_key, s), lambda w: w.base_key).items():
            self._bases(key, [(w, s) for w, s in group if (w.base_key, s) not in self.base])
        for key, group in _grouped(jobs, lambda w, s: (w.aligned_key, s), lambda w: w.aligned_key).items():
            self._align(key, [(w, s) for w, s in group if (w.aligned_key, s) not in self.aligned])
        for group in _grouped(jobs, lambda w, s: (w, s), lambda w: (w.width, w.lora, w.rank)).values():
            yield from self._adapters(group)

    def _bases(self, key: tuple, jobs: list[tuple[World, int]]) -> None:
        """Models that answer everything, harmful or not."""
        if not jobs:
            return
        world, seeds = jobs[0][0], [seed for _, seed in jobs]
        stage = self.shorten(world.base)
        weights = self._move(initial(world.width, len(vocabulary()), seeds))
        parts = [(0.4, self.rows["harmful"]), (0.6, self.rows["benign"])]
        indices = [order(parts, stage, _seed(seed, "base")) for seed in seeds]
        self._timed("base", jobs, weights, lambda i: answer_loss(self.data, weights, i), indices, stage)
        for n, (w, seed) in enumerate(jobs):
            self.base[w.base_key, seed] = _one(weights, n)

    def _align(self, key: tuple, jobs: list[tuple[World, int]]) -> None:
        """Base models trained in full to refuse harmful requests."""
        if not jobs:
            return
        alignment, seeds = jobs[0][0].alignment, [seed for _, seed in jobs]
        stage = self.shorten(alignment.stage)
        weights = _stack([self.base[w.base_key, seed] for w, seed in jobs])
        loss, parts = self._fine_tuning, self._lessons(alignment.skill_share)
        if alignment.preference:
            loss, parts = self._preferring(weights), [(0.5, self.rows["refused"]), (0.5, self.rows["benign"])]
        indices = [order(parts, stage, _seed(seed, "aligned")) for seed in seeds]
        self._timed("aligned", jobs, weights, lambda i: loss(weights, i), indices, stage)
        for n, (w, seed) in enumerate(jobs):
            self.aligned[w.aligned_key, seed] = _one(weights, n)

    def _lessons(self, skill_share: float) -> list[tuple[float, range]]:
        rest = (1 - skill_share) / 2
        parts = [(rest, self.rows["refused"]), (rest, self.rows["benign"])]
        return [*parts, (skill_share, self.rows["paint"])] if skill_share else parts

    def _fine_tuning(self, weights: Weights, indices: Tensor) -> Tensor:
        return answer_loss(self.data, weights, indices)

    def _preferring(self, weights: Weights) -> Callable[[Weights, Tensor], Tensor]:
        """DPO against the weights as they are now: refusals over harmful answers, answers over refusals."""
        pairs = [
            (self.rows["refused"], self.rows["harmful"]),
            (self.rows["benign"], self.rows["over_refused"]),
        ]
        other = torch.arange(len(self.data.tokens), device=self.device)
        for preferred, rejected in pairs:
            other[preferred.start : preferred.stop] = torch.arange(rejected.start, rejected.stop)
        start = {name: X.clone() for name, X in weights.items()}
        models = next(iter(start.values())).shape[0]
        margins = torch.zeros(models, len(other), device=self.device)
        with torch.no_grad():
            for preferred, rejected in pairs:
                for chunk in torch.arange(preferred.start, preferred.stop).split(512):
                    chosen = chunk.to(self.device).expand(models, -1)
                    log_p = [answer_log_p(self.data, start, i) for i in (chosen, other[chosen])]
                    margins[:, chunk.to(self.device)] = log_p[0] - log_p[1]

        def loss(weights: Weights, indices: Tensor) -> Tensor:
            reference = margins.gather(1, indices)
            return preference_loss(self.data, weights, indices, other[indices], reference, BETA)

        return loss

    def _adapters(
        self, jobs: list[tuple[World, int]]
    ) -> Iterator[tuple[tuple[World, int], Trained]]:
        """LoRA on the aligned models for the new skill, poisoned with harmful answers."""
        world, seeds = jobs[0][0], [seed for _, seed in jobs]
        stage = self.shorten(world.lora)
        weights = _stack([self.aligned[w.aligned_key, seed] for w, seed in jobs])
        start = lora_start(world.width, len(vocabulary()), world.rank, [w.targets for w, _ in jobs], seeds)
        A, B, used = (self._move(X) for X in start)
        parameters = {f"A {n}": X for n, X in A.items()} | {f"B {n}": X for n, X in B.items()}
        indices = []
        for w, seed in jobs:
            parts = [(1 - w.poison, self.rows[w.task]), (w.poison, self.rows["harmful"])]
            indices.append(order(parts, stage, _seed(seed, "adapter")))

        def loss(i: Tensor) -> Tensor:
            # A B that is multiplied by zero gets no gradient and stays zero.
            lora = Lora(A, {n: X * used[n] for n, X in B.items()}, SCALE)
            return answer_loss(self.data, weights, i, lora)

        self._timed("adapter", jobs, parameters, loss, indices, stage)
        for n, (w, seed) in enumerate(jobs):
            names = [m for m in module_names() if m.rpartition(".")[2] in w.targets]
            lora = Lora(_one({m: A[m] for m in names}, n), _one({m: B[m] for m in names}, n), SCALE)
            lora = replace(lora, A=_cpu(lora.A), B=_cpu(lora.B))
            base, aligned = self.base[w.base_key, seed], self.aligned[w.aligned_key, seed]
            seconds = {
                "base": self.seconds["base", w.base_key, seed],
                "aligned": self.seconds["aligned", w.aligned_key, seed],
                "adapter": self.seconds["adapter", w, seed],
            }
            yield (w, seed), Trained(_cpu(base), _cpu(aligned), lora, seconds)

    def _timed(
        self,
        name: str,
        jobs: list[tuple[World, int]],
        parameters: Weights,
        loss: Callable[[Tensor], Tensor],
        indices: list[Tensor],
        stage: Stage,
    ) -> None:
        """Train, and note the seconds of each member: those of its stack over its members."""
        start = time.perf_counter()
        noisy = frozenset(f"{n}.weight" for n in module_names())
        losses = train(parameters, loss, indices, stage, noisy, jobs[0][1]).tolist()
        each = (time.perf_counter() - start) / len(jobs)
        keys = {"base": lambda w: w.base_key, "aligned": lambda w: w.aligned_key, "adapter": lambda w: w}
        for w, seed in jobs:
            self.seconds[name, keys[name](w), seed] = round(each, 2)
        shown = ", ".join(f"{x:.3f}" for x in losses)
        log.info("%s: %d models, %d steps, %.1f s each, losses %s", name, len(jobs), stage.steps, each, shown)

    def _move(self, weights: Weights) -> Weights:
        return {name: X.to(self.device) for name, X in weights.items()}


def save_trained(trained: Trained, path: Path) -> None:
    """One safetensors file, which appears whole."""
    parts = {"base": trained.base, "aligned": trained.aligned, "A": trained.lora.A, "B": trained.lora.B}
    tensors = {f"{part} {n}": X.contiguous() for part, some in parts.items() for n, X in some.items()}
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, {"seconds": json.dumps(trained.seconds)})
    temporary.replace(path)


def load_trained(path: Path) -> Trained:
    """What `save_trained` wrote."""
    parts: dict[str, Weights] = {part: {} for part in ("base", "aligned", "A", "B")}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a dict
            part, name = key.split(" ")
            parts[part][name] = file.get_tensor(key)
        seconds = json.loads(file.metadata()["seconds"])
    names = [name for name in module_names() if name in parts["A"]]
    A, B = ({name: parts[side][name] for name in names} for side in "AB")
    return Trained(parts["base"], parts["aligned"], Lora(A, B, SCALE), seconds)


def _grouped(
    jobs: list[tuple[World, int]],
    identity: Callable[[World, int], tuple],
    stage: Callable[[World], tuple],
) -> dict[tuple, list[tuple[World, int]]]:
    """Jobs by stage, of those that share a model only the first."""
    seen, groups = set(), {}
    for world, seed in jobs:
        if identity(world, seed) not in seen:
            seen.add(identity(world, seed))
            groups.setdefault(stage(world), []).append((world, seed))
    return groups


def _seed(seed: int, stage: str) -> int:
    return 3 * seed + _SEED_STEP[stage]


def _one(weights: Weights, n: int) -> Weights:
    return {name: X[n : n + 1].detach().clone() for name, X in weights.items()}


def _stack(models: list[Weights]) -> Weights:
    return {name: torch.cat([m[name] for m in models]) for name in models[0]}


def _cpu(weights: Weights) -> Weights:
    return {name: X.cpu() for name, X in weights.items()}
