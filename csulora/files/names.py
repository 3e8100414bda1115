"""Module names: matching an adapter's to a checkpoint's, and PEFT's rule for patterns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from csulora.errors import CsuloraError

MOST_REPEATS = 4  # of a pattern key; names of modules are short, and so are their patterns
SHOWN = 3  # of the names that fit one that should fit one alone


def match_modules(wanted: Iterable[str], known: Collection[str], where: str) -> dict[str, str]:
    """Map each wanted module name to a known one: the same name, else a unique suffix.

    One name is a suffix of the other when it ends it at a dot, so `transformer.h.0.mlp.c_fc` of a
    model class matches `h.0.mlp.c_fc` of its checkpoint. `where` names the place of `known` in errors.

    Raises CsuloraError that lists every name without a match, with several, or sharing one.
    """
    index: _Endings | None = None  # made only where a name is not the same
    matched: dict[str, str] = {}
    problems: list[str] = []
    for name in wanted:
        if name in known:
            matched[name] = name
            continue
        index = index or _Endings(known)
        candidates = index.candidates(name)
        if len(candidates) == 1:
            matched[name] = candidates[0]
        elif candidates:
            problems.append(f"{name} (fits {', '.join(sorted(candidates)[:SHOWN])})")
        else:
            problems.append(name)
    owners: dict[str, str] = {}
    for name, target in matched.items():
        if owners.setdefault(target, name) != name:
            problems.append(f"{name} and {owners[target]} (both fit {target})")
    if problems:
        shown = ", ".join(problems[:8]) + (f", and {len(problems) - 8} more" * (len(problems) > 8))
        raise CsuloraError(
            f"{where}: no unique match for {len(problems)} module(s): {shown}; these have to be among "
            "the modules of the subspace and of the checkpoints: see csulora estimate --like"
        )
    return matched


def ends_with(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or ends it at a dot, as in PEFT's `target_modules`."""
    return name == suffix or name.endswith("." + suffix)


def pattern_value(pattern: dict[str, float], name: str, default: float) -> float:
    """The entry of a PEFT `rank_pattern` or `alpha_pattern` for a module name.

    PEFT's rule: the first key that, as a regular expression, matches the whole name or what follows
    one of its dots.
    """
    for key, value in pattern.items():
        if re.match(pattern_regex(key), name):
            return value
    return default


def pattern_regex(key: str) -> str:
    """The regular expression that PEFT makes of a pattern key."""
    return rf"(.*\.)?({key})$"


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that counts: layer 2 before layer 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in name.split(".")
    ]


def is_tame(key: str) -> bool:
    """Whether matching a pattern key takes a time in proportion to a low power of a name's length.

    Backtracking explodes where what is repeated can itself match in several ways, so no repeated group
    may hold a repeat or a choice, and repeats may not be many.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", key)  # neither escapes nor sets repeat anything
    group = re.compile(r"\(([^()]*)\)([*+{?]?)")
    while found := group.search(plain):
        inner, repeat = found.groups()
        if repeat in ("*", "+", "{") and re.search(r"[*+{|?]", inner.removeprefix("?:")):
            return False
        # What is in a group stays a repeat or a choice of the group around it.
        flat = "".join(re.findall(r"[*+{|]", inner))
        plain = plain[: found.start()] + "x" + flat + repeat + plain[found.end() :]
    return len(re.findall(r"[*+{]", plain)) <= MOST_REPEATS


class _Endings:
    """Names by their parts from the last one on, so that one look-up costs the length of a name."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.below: dict[str, _Endings] = {}
        self.name: str | None = None  # the name that ends here
        self.first: list[str] = []  # of the names that pass or end here
        for name in sorted(names):
            node = self
            for part in reversed(name.split(".")):
                node = node.below.setdefault(part, _Endings())
                if len(node.first) < SHOWN:
                    node.first.append(name)
            node.name = name

    def candidates(self, name: str) -> list[str]:
        """The names that end `name` at a dot or that it ends; of the latter the first few."""
        found: list[str] = []
        node = self
        for part in reversed(name.split(".")):
            if part not in node.below:
                return found
            node = node.below[part]
            if node.name is not None:
                found.append(node.name)
        return found + [other for other in node.first if other != name]
