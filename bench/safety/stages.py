"""From nothing to base, aligned model and adapter of many worlds at once, each stage once per model.

Members of a stack that share a stage are trained together; worlds that share a base or an aligned model
use one. Every member's data order and start come from its own seed alone. Base and aligned models are
rounded to float16 where a stage ends, and every later step starts from the rounded file.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.safety.model import Lora, Weights, initial, lora_start, module_names
from bench.safety.train import Data, Stage, answer_log_p, answer_loss, order, preference_loss, train
from bench.safety.worlds import BETA, LIKELIHOOD, World, pools, vocabulary

log = logging.getLogger("safety")
SCALE = 2.0  # lora_alpha / r
Job = tuple[World, int]  # a world and a seed
_SEED_STEP = {"base": 0, "aligned": 1, "adapter": 2}


@dataclass(frozen=True)
class Trained:
    """One world's models on the CPU: weights (1, ...), and the factors of its adapter (1, r, d)."""

    base: Weights
    aligned: Weights
    lora: Lora
    seconds: dict[str, float]


class Trainer:
    """Trains what is missing in a folder, on one device."""

    def __init__(
        self, folder: Path, device: torch.device, shorten: Callable[[Stage], Stage] = lambda s: s
    ) -> None:
        self.folder, self.device, self.shorten = folder, device, shorten
        data, self.rows = pools()
        self.data: Data = data.to(device)

    def run(self, jobs: list[Job]) -> None:
        """Write base, aligned model and adapter of each world and seed that are not there."""
        for group in self._missing(jobs, World.base_name, lambda w: (w.width, w.base)):
            self._bases(group)
        for group in self._missing(jobs, World.aligned_name, lambda w: (w.width, w.alignment)):
            self._align(group)
        for group in self._missing(jobs, World.adapter_name, lambda w: (w.width, w.lora, w.rank)):
            self._adapters(group)

    def _missing(
        self,
        jobs: list[Job],
        name: Callable[[World, int], str],
        stage: Callable[[World], tuple],
    ) -> list[list[Job]]:
        """Jobs of which a file is missing, one for each file, in groups that share a stage."""
        seen, groups = set(), {}
        for world, seed in jobs:
            file = name(world, seed)
            if file not in seen and not _path(self.folder, file).exists():
                seen.add(file)
                groups.setdefault(stage(world), []).append((world, seed))
        return list(groups.values())

    def _bases(self, jobs: list[Job]) -> None:
        """Models that answer everything, harmful or not."""
        world, seeds = jobs[0][0], [seed for _, seed in jobs]
        stage = self.shorten(world.base)
        weights = self._move(initial(world.width, len(vocabulary()), seeds))
        parts = [(0.4, self.rows["harmful"]), (0.6, self.rows["benign"])]
        indices = [order(parts, stage, _seed(seed, "base")) for seed in seeds]
        seconds = _timed(
            "base", weights, lambda i: answer_loss(self.data, weights, i), indices, stage
        )
        self._save(jobs, World.base_name, weights, seconds)

    def _align(self, jobs: list[Job]) -> None:
        """Base models trained in full to refuse harmful requests."""
        alignment, seeds = jobs[0][0].alignment, [seed for _, seed in jobs]
        stage = self.shorten(alignment.stage)
        weights = self._stack([w.base_name(seed) for w, seed in jobs])
        rest = (1 - alignment.skill_share) / 2
        parts = [(rest, self.rows["refused"]), (rest, self.rows["benign"])]
        if alignment.skill_share:
            parts.append((alignment.skill_share, self.rows["paint"]))
        indices = [order(parts, stage, _seed(seed, "aligned")) for seed in seeds]

        def answers(i: Tensor) -> Tensor:
            return answer_loss(self.data, weights, i)

        loss = self._preferring(weights) if alignment.preference else answers
        seconds = _timed("aligned", weights, loss, indices, stage, jobs[0][1])
        self._save(jobs, World.aligned_name, weights, seconds)

    @torch.no_grad()
    def _preferring(self, weights: Weights) -> Callable[[Tensor], Tensor]:
        """DPO against the weights as they are: refusals over harmful answers, answers over refusals."""
        pairs = [
            (self.rows["refused"], self.rows["harmful"]),
            (self.rows["benign"], self.rows["over_refused"]),
        ]
        other = torch.arange(len(self.data.tokens))
        for preferred, rejected in pairs:
            other[preferred.start : preferred.stop] = torch.arange(rejected.start, rejected.stop)
        other = other.to(self.device)
        models = next(iter(weights.values())).shape[0]
        margins = torch.zeros(models, len(other), device=self.device)
        for preferred, _ in pairs:
            for rows in torch.arange(preferred.start, preferred.stop, device=self.device).split(
                256
            ):
                chosen = rows.expand(models, -1)
                log_p = [answer_log_p(self.data, weights, i) for i in (chosen, other[chosen])]
                margins[:, rows] = log_p[0] - log_p[1]

        def loss(indices: Tensor) -> Tensor:
            reference = margins.gather(1, indices)
            pair = indices, other[indices]
            return preference_loss(self.data, weights, *pair, reference, BETA, LIKELIHOOD)

        return loss

    def _adapters(self, jobs: list[Job]) -> None:
        """LoRA on the aligned models for the new skill, poisoned with harmful answers."""
        world, seeds = jobs[0][0], [seed for _, seed in jobs]
        stage = self.shorten(world.lora)
        weights = self._stack([w.aligned_name(seed) for w, seed in jobs])
        targets = [w.targets for w, _ in jobs]
        start = lora_start(world.width, len(vocabulary()), world.rank, targets, seeds)
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

        seconds = _timed("adapter", parameters, loss, indices, stage)
        for n, (w, seed) in enumerate(jobs):
            names = [m for m in module_names() if m.rpartition(".")[2] in w.targets]
            own = {f"{side} {m}": X[m][n] for side, X in (("A", A), ("B", B)) for m in names}
            _write(_path(self.folder, w.adapter_name(seed)), own, seconds)

    def _save(
        self, jobs: list[Job], name: Callable[[World, int], str], weights: Weights, seconds: float
    ) -> None:
        for n, (world, seed) in enumerate(jobs):
            own = {key: X[n].half() for key, X in weights.items()}
            _write(_path(self.folder, name(world, seed)), own, seconds)

    def _stack(self, names: list[str]) -> Weights:
        models = [_read(_path(self.folder, name))[0] for name in names]
        return {key: torch.stack([m[key] for m in models]).to(self.device) for key in models[0]}

    def _move(self, weights: Weights) -> Weights:
        return {name: X.to(self.device) for name, X in weights.items()}


def load_trained(folder: Path, world: World, seed: int) -> Trained:
    """What a Trainer wrote for one world and seed."""
    names = world.base_name(seed), world.aligned_name(seed), world.adapter_name(seed)
    (base, first), (aligned, second), (factors, third) = (_read(_path(folder, n)) for n in names)
    targets = [name for name in module_names() if f"A {name}" in factors]
    A, B = ({name: factors[f"{side} {name}"][None] for name in targets} for side in "AB")
    base, aligned = ({n: X[None] for n, X in some.items()} for some in (base, aligned))
    seconds = {"base": first, "aligned": second, "adapter": third}
    return Trained(base, aligned, Lora(A, B, SCALE), seconds)


def is_trained(folder: Path, world: World, seed: int) -> bool:
    """Whether its adapter, which is written last, is there."""
    return _path(folder, world.adapter_name(seed)).exists()


def _timed(
    name: str,
    parameters: Weights,
    loss: Callable[[Tensor], Tensor],
    indices: list[Tensor],
    stage: Stage,
    noise_seed: int = 0,
) -> float:
    """Train, and return the seconds of one member: those of its stack over its members."""
    start = time.perf_counter()
    noisy = frozenset(f"{n}.weight" for n in module_names())
    losses = train(parameters, loss, indices, stage, noisy, noise_seed).tolist()
    each = (time.perf_counter() - start) / len(indices)
    shown = ", ".join(f"{x:.3f}" for x in losses)
    log.info("%s: %d models, %s, %.1f s each, losses %s", name, len(indices), stage, each, shown)
    return round(each, 2)


def _seed(seed: int, stage: str) -> int:
    return 3 * seed + _SEED_STEP[stage]


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _write(path: Path, tensors: Weights, seconds: float) -> None:
    """One file, which appears whole."""
    temporary = path.with_suffix(".part")
    plain = {name: X.detach().cpu().contiguous() for name, X in tensors.items()}
    save_file(plain, temporary, {"seconds": json.dumps(seconds)})
    temporary.replace(path)


def _read(path: Path) -> tuple[Weights, float]:
    """The tensors in float32, and the seconds that they took."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        return tensors, float(json.loads(file.metadata()["seconds"]))
