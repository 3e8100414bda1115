"""Training stacks of models: AdamW with warm-up and cosine decay, the loss on answers alone.

Every member of a stack has its own data order, gradient norm and optimizer state, so that it is the same
model as if it were trained alone. Nothing waits for the device from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.safety.model import Lora, Weights, hidden

IGNORED = -100
WARM_UP, DECAY, CLIP = 30, 0.01, 1.0
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Stage:
    """Length and step size of one training stage; noise: added to every linear weight at each step."""

    steps: int
    learning_rate: float
    batch: int = 64
    noise: float = 0.0


@dataclass(frozen=True)
class Data:
    """Encoded examples, (N, T) each; targets are IGNORED outside the answers."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Data:
        return Data(self.tokens.to(device), self.targets.to(device))


def order(parts: list[tuple[float, range]], stage: Stage, seed: int) -> Tensor:
    """Indices (steps, batch) of examples: a part by its weight, then an example of it."""
    generator = torch.Generator().manual_seed(seed)
    size = (stage.steps, stage.batch)
    weights = torch.tensor([weight for weight, _ in parts])
    part = torch.multinomial(weights, math.prod(size), True, generator=generator).view(size)
    starts = torch.tensor([pool.start for _, pool in parts])[part]
    lengths = torch.tensor([len(pool) for _, pool in parts])[part]
    return starts + (torch.rand(size, generator=generator) * lengths).long()


def train(
    parameters: Weights,
    loss_of: Callable[[Tensor], Tensor],
    indices: list[Tensor],
    stage: Stage,
    noisy: frozenset[str] = frozenset(),
    seed: int = 0,
) -> Tensor:
    """Train `parameters` (E, ...) in place; loss_of takes indices (E, batch), gives losses (E,).

    indices: (steps, batch) of each member. Returns the losses of the last 20 steps on average, (E,).
    """
    device = next(iter(parameters.values())).device
    names, tensors = list(parameters), list(parameters.values())
    for X in tensors:
        X.requires_grad_(True)
    every = torch.stack(indices, dim=1).to(device)  # (steps, E, batch)
    first, second = ([torch.zeros_like(X) for X in tensors] for _ in range(2))
    noise = torch.Generator(device).manual_seed(seed)
    tail: list[Tensor] = []
    for step in range(stage.steps):
        losses = loss_of(every[step])
        gradients = list(torch.autograd.grad(losses.sum(), tensors))
        with torch.no_grad():
            _clip(gradients)
            _adamw(tensors, gradients, first, second, step, _rate(stage, step))
            if stage.noise:
                for name, X in zip(names, tensors, strict=True):
                    if name in noisy:
                        X += stage.noise * torch.randn(X.shape, generator=noise, device=device)
        tail = [*tail[-19:], losses.detach()]
    for X in tensors:
        X.requires_grad_(False)
    return torch.stack(tail).mean(0)


def answer_loss(
    data: Data, weights: Mapping[str, Tensor], indices: Tensor, lora: Lora | None = None
) -> Tensor:
    """Mean cross entropy of the answers' tokens, (E,) for indices (E, n)."""
    log_p, counted = _token_log_p(data, weights, indices, lora)
    return -log_p.sum((1, 2)) / counted.sum((1, 2))


def answer_log_p(data: Data, weights: Mapping[str, Tensor], indices: Tensor) -> Tensor:
    """Log probability of each whole answer, (E, n)."""
    return _token_log_p(data, weights, indices, None)[0].sum(-1)


def preference_loss(
    data: Data,
    weights: Mapping[str, Tensor],
    chosen: Tensor,
    rejected: Tensor,
    reference: Tensor,
    beta: float,
    likelihood: float,
) -> Tensor:
    """DPO (arXiv 2305.18290) with a term for the chosen answer (arXiv 2404.19733), (E,).

    -log sigmoid(beta (margin of the model - margin of the reference)) + likelihood * cross entropy.
    Without the term the margin of an answer that the reference never gives grows, and still it is not
    given.

    chosen, rejected: indices (E, n) of the same prompt with two answers; reference: its margin (E, n).
    """
    both = answer_log_p(data, weights, torch.cat([chosen, rejected], dim=1))
    preferred, other = both.chunk(2, dim=1)
    words = (data.targets[chosen] != IGNORED).sum((1, 2))
    preference = -functional.logsigmoid(beta * (preferred - other - reference)).mean(1)
    return preference - likelihood * preferred.sum(1) / words


def _token_log_p(
    data: Data, weights: Mapping[str, Tensor], indices: Tensor, lora: Lora | None
) -> tuple[Tensor, Tensor]:
    tokens, targets = data.tokens[indices], data.targets[indices][..., 1:]
    x = hidden(weights, tokens, lora)[:, :, :-1]
    scores = torch.matmul(x, weights["lm_head.weight"].mT[:, None])
    counted = targets != IGNORED
    loss = functional.cross_entropy(
        scores.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return -loss.view(targets.shape), counted


def _rate(stage: Stage, step: int) -> float:
    warm = min(WARM_UP, stage.steps // 2)
    if step < warm:
        return stage.learning_rate * step / warm
    done = (step - warm) / max(stage.steps - warm, 1)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _clip(gradients: list[Tensor]) -> None:
    """Scale each member's gradient to a norm of at most CLIP."""
    squares = sum(g.flatten(1).square().sum(1) for g in gradients)
    assert isinstance(squares, Tensor)
    factor = (CLIP / (squares.sqrt() + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


def _adamw(
    tensors: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    step: int,
    rate: float,
) -> None:
    torch._foreach_mul_(tensors, 1 - rate * DECAY)
    torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
    torch._foreach_mul_(second, BETAS[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
    size = torch._foreach_sqrt(second)
    torch._foreach_div_(size, math.sqrt(1 - BETAS[1] ** (step + 1)))
    torch._foreach_add_(size, EPS)
    torch._foreach_addcdiv_(tensors, first, size, -rate / (1 - BETAS[0] ** (step + 1)))
