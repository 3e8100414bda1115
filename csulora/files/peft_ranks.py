"""The rank and alpha that PEFT gives each module, and the configuration that gives it new ones."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.names import ends_with
from csulora.files.patterns import Pattern, ends

# Names that transformers changes on loading since multimodal models were nested anew; PEFT matches
# patterns with the new ones, and servers of another age with the old.
_MOVED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
)
_MOST_RATIOS = 8  # that are tried; adapters are made with one or two


class Rules:
    """A configuration's ranks and alphas by module name, its patterns compiled once.

    Raises CsuloraError, naming `where`, for patterns that are not taken.
    """

    def __init__(self, where: str | Path, config: Mapping[str, Any]) -> None:
        self.rank = Pattern(where, "rank_pattern", config.get("rank_pattern") or {}, config["r"])
        alphas = config.get("alpha_pattern") or {}
        self.alpha = Pattern(where, "alpha_pattern", alphas, config["lora_alpha"])
        self.rslora = bool(config.get("use_rslora"))
        self._parameters = [str(name) for name in config.get("target_parameters") or ()]

    def parameters(self, module: str) -> list[str]:
        """Names by which PEFT knows a pair of this module, where it belongs to `target_parameters`."""
        while module.endswith(
            ".base_layer"
        ):  # several parameters of one module are wrapped in turn
            module = module.removesuffix(".base_layer")
        found = []
        for name in self._parameters:
            parent, _, leaf = name.rpartition(".")
            if not parent or ends_with(module, parent):
                found.append(f"{module}.{leaf}")
        return found

    def names(self, module: str) -> list[str]:
        """What PEFT may call a module when it looks it up: first its name in the file."""
        return list(dict.fromkeys([*_moved(module), *self.parameters(module)]))

    def alphas(self, module: str, rank: int) -> list[float]:
        """The different alphas under the names that have this rank; none where the rank is wrong."""
        names = [name for name in self.names(module) if self.rank(name) == rank]
        return list(dict.fromkeys(self.alpha(name) for name in names))


def _moved(name: str) -> list[str]:
    """A name and the one that transformers may make of it."""
    new = [new + name.removeprefix(old) for old, new in _MOVED if name.startswith(old)]
    return [name, *new[:1]]


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """s in dW = s B A, by PEFT's rule: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_for_rank(alpha: float, old_rank: int, new_rank: int, rslora: bool) -> float:
    """The lora_alpha that keeps s when the rank changes; stays an integer where it can."""
    if new_rank == old_rank:
        return alpha
    if rslora:
        return alpha * math.sqrt(new_rank / old_rank)
    exact = alpha * new_rank / old_rank
    return int(exact) if float(exact).is_integer() else exact


def rescaled(
    where: str,
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    kept: Iterable[str],
) -> dict[str, Any]:
    """The fields of a configuration that change so that PEFT gives modules these ranks and alphas.

    The user's keys stay, as PEFT may match them with other names than the file's, and all values are
    scaled alike; keys for modules that this does not suit come first. `kept`: names as PEFT knows them
    of what else is in the file, which keeps the rank and alpha that it has.

    Raises CsuloraError where no configuration can say so.
    """
    rules = Rules(where, config)
    names = {module: rules.names(module) for module in ranks}
    others = [name for known in kept for name in _moved(known)]
    new: dict[str, Any] = {}
    for pattern, wanted in ((rules.rank, ranks), (rules.alpha, alphas)):
        if not all(_fits(pattern, names[module], value) for module, value in wanted.items()):
            scaled = _best(pattern, wanted, names)
            special = _special(pattern, scaled, wanted, names, others)
            usual = {
                *others,
                *(name for module in wanted for name in names[module]),
            } - special.keys()
            final = _with_keys(where, scaled, special, usual)
            default = "r" if pattern is rules.rank else "lora_alpha"
            new |= {default: final.default, pattern.field: dict(final.values)}
    return new


def check_alphas(where: str, config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Raise CsuloraError where a module of this rank may get one alpha or another.

    As long as alphas are scaled alike it does not matter which; a form without patterns has to know.
    """
    rules = Rules(where, config)
    for module, rank in ranks.items():
        if len(alphas := rules.alphas(module, rank)) > 1:
            raise CsuloraError(
                f"{where}: alpha_pattern gives {module} the alpha {alphas[0]}, and {alphas[1]} under the "
                "name that newer versions of transformers give it, so the portable form cannot hold its "
                "scaling; shorten the key to what both names end with"
            )


def _fits(pattern: Pattern, names: Iterable[str], value: float) -> bool:
    return any(_same(pattern(name), value) for name in names)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _best(pattern: Pattern, wanted: Mapping[str, float], names: Mapping[str, list[str]]) -> Pattern:
    """The pattern with all values times the ratio that suits most modules."""
    pairs = Counter((v, pattern(name)) for m, v in wanted.items() for name in names[m])
    ratios: dict[float, Fraction | float] = {}
    for (value, old), _ in pairs.most_common():
        if old:
            whole = isinstance(value, int) and isinstance(old, int)
            ratio = Fraction(int(value), int(old)) if whole else value / old
            ratios.setdefault(round(float(ratio), 12), ratio)
    candidates = [pattern]
    for ratio in list(ratios.values())[:_MOST_RATIOS]:
        if (scaled := _times(pattern, ratio)) is not None:
            candidates.append(scaled)
    return max(
        candidates,
        key=lambda it: (sum(_fits(it, names[m], value) for m, value in wanted.items()), it.default),
    )


def _times(pattern: Pattern, ratio: Fraction | float) -> Pattern | None:
    """The pattern with its values scaled, None where one is out of range or a rank no whole number."""
    try:
        values = {key: _product(value, ratio) for key, value in pattern.values.items()}
        default = _product(pattern.default, ratio)
    except OverflowError:
        return None
    whole = all(isinstance(value, int) for value in (default, *values.values()))
    return pattern.replaced(values, default) if whole or pattern.field != "rank_pattern" else None


def _product(value: float, ratio: Fraction | float) -> float:
    product = value * ratio
    if product == int(product):
        return int(product)
    return float(product)


def _special(
    pattern: Pattern,
    scaled: Pattern,
    wanted: Mapping[str, float],
    names: Mapping[str, list[str]],
    others: Iterable[str],
) -> dict[str, float]:
    """Values by name for what the scaled pattern gives another value than it is to have."""
    special = {name: pattern(name) for name in others if not _same(scaled(name), pattern(name))}
    for module, value in wanted.items():
        if _fits(scaled, names[module], value):
            continue
        unchanged = _fits(pattern, names[module], value)
        special |= {name: pattern(name) if unchanged else value for name in names[module]}
    return special


def _with_keys(
    where: str, scaled: Pattern, special: Mapping[str, float], usual: Collection[str]
) -> Pattern:
    """The scaled pattern with keys for the special names before the others."""
    if not special:
        return scaled
    keys = _keys(special, usual)
    values = keys | {key: value for key, value in scaled.values.items() if key not in keys}
    final = Pattern(where, scaled.field, values, scaled.default)
    for name in (*special, *usual):
        if not _same(final(name), special[name] if name in special else scaled(name)):
            raise CsuloraError(
                f"{where}: no key of {scaled.field} tells {name} from all other modules, so its "
                "scaling cannot be kept"
            )
    return final


def _keys(values: Mapping[str, float], others: Iterable[str]) -> dict[str, float]:
    """A key for each name: the shortest end that it shares only with names of the same value.

    Short, as transformers changes the beginnings of names.
    """
    suiting: dict[str, float | None] = {end: None for name in others for end in ends(name)}
    for name, value in values.items():
        for end in ends(name):
            if suiting.setdefault(end, value) != value:
                suiting[end] = None
    found = {}
    for name, value in values.items():
        own = [_escaped(end) for end in ends(name) if suiting[end] is not None]
        found[own[0] if own else "^" + _escaped(name)] = value
    return {key: found[key] for key in sorted(found, key=lambda key: (-len(key), key))}


def _escaped(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name, re.ASCII) else re.escape(name)
