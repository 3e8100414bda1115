"""The strength at which an adapter keeps to a budget, found from one pass over the factors.

Everything is float64, on the CPU, whatever the backend that applies the strength then, so that every
backend applies the same one. The figures of CSULoRA are those of `stages.solve_grams`, from the Gram
matrices of the parts themselves. The change of realignment is a sum over directions, see
`in_float64.replaced_energies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from csulora.method import in_float64
from csulora.method.precision import singular
from csulora.method.realign import Spectrum, replaced
from csulora.method.stages import OO, Grams, solve_grams

if TYPE_CHECKING:
    from csulora.settings import Correction, Method, Realignment
    from csulora_kernels import Form

# Strengths are sought among the powers of 2^(1/STEPS) between 2 to these octaves. One step changes no
# figure by more than 1e-7 of itself. Beyond the last octave float64 cannot tell the null space of a
# factor from the rest.
STEPS = 1 << 24
OCTAVES = (-64, 40)
# How often the interval is halved before it is divided in proportion.
HALVINGS = 6


class Update(NamedTuple):
    """One module's update and what is to become of it."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    U: Tensor  # (d_out, k)
    V: Tensor  # (d_in, k)
    spectrum: Spectrum
    settings: Method
    free: bool  # the strength that is found is for it; otherwise its settings are
    dropped: bool = False


class Found(NamedTuple):
    """reached: what the budget limits, at this strength; above the limit where none keeps to it."""

    strength: float
    reached: float


def strength_within(updates: Sequence[Update], kind: str, limit: float) -> Found:
    """The largest strength at which the relative change is at most `limit`, for "change"; for "off" the
    smallest at which the energy of the off block is at most `limit` of all energy before.

    Their limits, inf and 0, are found where these keep to the budget.
    """
    figure = _figure(updates, kind)
    direction = 1 if kind == "change" else -1

    def strength(step: int) -> float:
        return 2.0 ** (direction * step / STEPS)

    def excess(step: int) -> float:
        return figure(strength(step)) - limit

    near, far = (0.0, math.inf)[::direction]
    low, high = (direction * octave * STEPS for octave in OCTAVES[::direction])
    if (reached := figure(far)) <= limit:
        return Found(far, reached)
    if excess(low) > 0:
        return Found(near, figure(near))
    step = _last_within(excess, low, high) if excess(high) > 0 else high
    return Found(strength(step), figure(strength(step)))


def _last_within(excess: Callable[[int], float], low: int, high: int) -> int:
    """The last step that is not in excess, between one that is not and one that is.

    By halving, then by false position (Illinois); each third time by halving again, as a fitted form may
    jump.
    """
    under, over = excess(low), excess(high)
    turn, side = 0, 0
    while high - low > 1:
        turn += 1
        at = (low + high) // 2
        if turn > HALVINGS and turn % 3:
            at = low + round((high - low) * (under / (under - over)))
        at = min(max(at, low + 1), high - 1)
        found = excess(at)
        if found <= 0:
            low, under, over = at, found, over / 2 if side < 0 else over
        else:
            high, over, under = at, found, under / 2 if side > 0 else under
        side = -1 if found <= 0 else 1
    return low


def _figure(updates: Sequence[Update], kind: str) -> Callable[[float], float]:
    """What the budget limits, of the whole adapter, by the strength."""
    energies = [_energy(update) for update in updates]
    energy = math.fsum(energies)
    groups: dict[tuple[Method, bool, int], list[Update]] = {}
    fixed: list[float] = []
    for update, own in zip(updates, energies, strict=True):
        if update.dropped:
            fixed.append(own if kind == "change" else 0.0)
        else:
            key = update.settings, update.free, update.A.shape[0]
            groups.setdefault(key, []).append(update)
    free: list[tuple[Method, Callable[[Method], float]]] = []
    for (settings, is_free, _), group in groups.items():
        sums = _sums(group, settings, kind)
        if is_free:
            free.append((settings, sums))
        else:
            fixed.append(sums(settings))
    constant = math.fsum(fixed)

    def figure(strength: float) -> float:
        parts = [sums(settings.with_strength(strength)) for settings, sums in free]
        share = math.fsum((constant, *parts)) / energy if energy else 0.0
        return math.sqrt(share) if kind == "change" else share

    return figure


def _energy(update: Update) -> float:
    """||dW||^2."""
    energy = in_float64.energy_of(update.B.double(), update.A.double())
    return float(update.spectrum.scaling**2 * energy)


def _sums(group: list[Update], settings: Method, kind: str) -> Callable[[Any], float]:
    """Of updates of one rank and settings: their squared change, or their off energy, at any strength."""
    scales = torch.stack([update.spectrum.scaling**2 for update in group])
    if settings.method == "realign":
        return _realigned(group, cast("Realignment", settings), scales)
    own = [_grams_and_form(update) for update in group]
    stacks = []
    for form in sorted({form for _, form in own}):
        rows = [i for i, (_, its) in enumerate(own) if its == form]
        parts = zip(*(own[i][0] for i in rows), strict=True)
        stacks.append((form, scales[rows], Grams(*(torch.stack(X, dim=1) for X in parts))))

    def attenuated(correction: Correction) -> float:
        found = 0.0
        for form, scale, grams in stacks:
            _, figures = solve_grams(grams, replace(correction, form=form))
            share = figures.relative_change**2 if kind == "change" else figures.after[:, OO]
            found += float((scale * figures.energy * share).sum())
        return found

    return attenuated


def _grams_and_form(update: Update) -> tuple[Grams, Form]:
    """The Gram matrices of one update, and the form whose figures it has: as `in_float64.solve` has it,
    that of `exact` where the factors leave room for it in rank r."""
    parts = in_float64.split(update.B, update.A, update.U, update.V)
    grams, settings = in_float64.grams_of(parts), cast("Correction", update.settings)
    if settings.form == "same" and bool(singular(grams)):
        # Which strength does not count, as long as it neither keeps nor removes anything whole.
        some = settings.with_strength(1) if update.free else settings
        exact = replace(some, form="exact")
        if in_float64.fits_rank(parts, solve_grams(grams, exact)[0]):
            return grams, "exact"
    return grams, settings.form


def _realigned(
    group: list[Update], settings: Realignment, scales: Tensor
) -> Callable[[Realignment], float]:
    found = [in_float64.replaced_energies(u.B, u.A, u.U, u.V, u.spectrum, settings) for u in group]
    t = torch.cat([rates for rates, _ in found])
    change = torch.cat([scale * own for scale, (_, own) in zip(scales, found, strict=True)])
    return lambda realignment: float((replaced(t, realignment.strength) ** 2 * change).sum())
