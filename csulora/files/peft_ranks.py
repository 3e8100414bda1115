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
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


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
        self._names: dict[str, list[str]] = {}  # what `names` found

    def parameters(self, module: str) -> list[str]:
        """Names by which PEFT knows a pair of this module, where it belongs to `target_parameters`."""
        # Several parameters of one module are wrapped in turn.
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        found = []
        for name in self._parameters:
            parent, _, leaf = name.rpartition(".")
            if not parent or ends_with(module, parent):
                found.append(f"{module}.{leaf}")
        return found

    def names(self, module: str) -> list[str]:
        """What PEFT may call a linear layer when it looks it up: first its name in the file."""
        found = self._names.get(module)
        if found is None:
            weights = [name for name in self.parameters(module) if name.endswith(".weight")]
            found = self._names[module] = [*_moved(module), *dict.fromkeys(weights)]
        return found

    def alphas(self, module: str, rank: int) -> list[float]:
        """The different alphas under the names that have this rank; none where the rank is wrong."""
        names = [name for name in self.names(module) if self.rank(name) == rank]
        return list(dict.fromkeys(self.alpha(name) for name in names))


def _moved(name: str) -> list[str]:
    """A name and those that transformers may make of it."""
    return [name, *(new + name.removeprefix(old) for old, new in _MOVED if name.startswith(old))]


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
    before: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The fields of a configuration that change so that PEFT gives modules these ranks and alphas.

    The user's keys stay, as PEFT may match them with other names than the file's, and all values are
    scaled alike; keys for modules that this does not suit come first.

    kept: names as PEFT knows them of what else is in the file, which keeps the rank and alpha it has.
    before: the ranks that modules had under this configuration, where that is known.

    Raises CsuloraError where no configuration can say so.
    """
    rules = Rules(where, config)
    if not (rules.rank.values or rules.alpha.values) and all(
        ranks[m] == rules.rank.default and _same(alphas[m], rules.alpha.default) for m in ranks
    ):
        return {}  # one rank and alpha for all, and what they have
    old = {m: _rank_before(rules, m, (before or ranks)[m]) for m in ranks}
    names = {m: [name for name in rules.names(m) if rules.rank(name) == old[m]] for m in ranks}
    special = {name: (rules.rank(name), rules.alpha(name)) for n in kept for name in _moved(n)}
    rank, alpha = _scaled(rules, Counter((ranks[m], old[m]) for m in ranks))
    usual = set()
    for m in ranks:
        if _gives(rank, alpha, names[m], ranks[m], alphas[m]):
            usual |= set(names[m])
        elif _gives(rules.rank, rules.alpha, names[m], ranks[m], alphas[m]):
            special |= {name: (rules.rank(name), rules.alpha(name)) for name in names[m]}
        else:
            special |= dict.fromkeys(names[m], (ranks[m], alphas[m]))
    rank = _with_keys(where, rank, {name: value for name, (value, _) in special.items()}, usual)
    alpha = _with_keys(where, alpha, {name: value for name, (_, value) in special.items()}, usual)
    new = {"r": rank.default, "rank_pattern": dict(rank.values)}
    new |= {"lora_alpha": alpha.default, "alpha_pattern": dict(alpha.values)}
    same = all(value == (config.get(field) or type(value)()) for field, value in new.items())
    return {} if same else new


def check_alphas(where: str, config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Raise CsuloraError where a module of this rank may get one alpha or another.

    CSULoRA's own correction of a module does not depend on it, and alphas are scaled alike; realignment,
    a budget, which weighs modules, and a form without patterns have to know.
    """
    rules = Rules(where, config)
    for module, rank in ranks.items():
        if len(alphas := rules.alphas(module, rank)) > 1:
            raise CsuloraError(
                f"{where}: alpha_pattern gives {module} the alpha {alphas[0]}, and {alphas[1]} under "
                "another name by which PEFT may know it, so its scaling is not known, on which "
                "realignment, budgets and the portable form depend; shorten the key to an end of the name"
            )


def _rank_before(rules: Rules, module: str, rank: int) -> int:
    """This rank, where the configuration gives it to the module under any name, else the one it gives."""
    return rank if rules.alphas(module, rank) else int(rules.rank(module))


def _scaled(rules: Rules, changes: Mapping[tuple[int, int], int]) -> tuple[Pattern, Pattern]:
    """Ranks and alphas of all names times the factor that suits most modules, scalings as they were.

    changes: how many modules have which rank now and which before.
    """
    counts: Counter[Fraction] = Counter()
    for (now, before), count in changes.items():
        counts[Fraction(now, before)] += count
    for factor in sorted(counts, key=lambda factor: (-counts[factor], -factor)):
        rank = _times(rules.rank, factor)
        alpha = _times(rules.alpha, math.sqrt(factor) if rules.rslora else factor)
        if (
            rank
            and alpha
            and all(isinstance(r, int) for r in (rank.default, *rank.values.values()))
        ):
            return rank, alpha
    return rules.rank, rules.alpha


def _gives(
    rank: Pattern, alpha: Pattern, names: Iterable[str], wanted_rank: int, wanted_alpha: float
) -> bool:
    return any(rank(n) == wanted_rank and _same(alpha(n), wanted_alpha) for n in names)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _times(pattern: Pattern, ratio: Fraction | float) -> Pattern | None:
    """The pattern with its values scaled, None where one is out of range."""
    try:
        values = {key: _product(value, ratio) for key, value in pattern.values.items()}
        return pattern.replaced(values, _product(pattern.default, ratio))
    except OverflowError:
        return None


def _product(value: float, ratio: Fraction | float) -> float:
    product = value * ratio
    if product == int(product):
        return int(product)
    return float(product)


def _with_keys(
    where: str, scaled: Pattern, values: Mapping[str, float], usual: Collection[str]
) -> Pattern:
    """The scaled pattern with keys for names that are to have other values before the others.

    PEFT takes the first key that matches, and sorts them whenever it saves an adapter. Where that would
    change a value each name that any key matches gets a key of its own, in place of the user's.
    """
    special = {name: value for name, value in values.items() if not _same(scaled(name), value)}
    others = {*usual, *values} - special.keys()
    wanted = {name: scaled(name) for name in others} | special
    final = scaled
    if special:
        keys = _keys(special, others)
        rest = {key: value for key, value in scaled.values.items() if key not in keys}
        final = Pattern(where, scaled.field, keys | rest, scaled.default)
    resorted = dict(sorted(final.values.items()))
    if [*resorted] != [*final.values] and _differing(
        Pattern(where, scaled.field, resorted, scaled.default), wanted
    ):
        matched = {name: wanted[name] for name in others if scaled.key(name) is not None}
        keys = _keys(special | matched, others - matched.keys())
        final = Pattern(where, scaled.field, keys, scaled.default)
    if name := _differing(final, wanted):
        raise CsuloraError(
            f"{where}: no key of {scaled.field} tells {name} from all other modules, so its "
            "scaling cannot be kept"
        )
    return final


def _differing(pattern: Pattern, wanted: Mapping[str, float]) -> str | None:
    """A name to which a pattern gives another value than this."""
    return next((name for name in wanted if not _same(pattern(name), wanted[name])), None)


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
