"""Module names: matching an adapter's to a checkpoint's, and their order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from csulora.errors import CsuloraError

SHOWN = 3  # of the names that fit one that should fit one alone
SEE_LIKE = (
    "these have to be among the modules of the subspace and of the checkpoints: "
    "see csulora estimate --like"
)


def match_modules(
    wanted: Iterable[str], known: Collection[str], where: str, remedy: str = SEE_LIKE
) -> dict[str, str]:
    """Map each wanted module name to a known one: the same name, else a unique suffix.

    One name is a suffix of the other when it ends it at a dot, so `transformer.h.0.mlp.c_fc` of a
    model class matches `h.0.mlp.c_fc` of its checkpoint. Errors begin with `where`, the place of `known`,
    and end with `remedy`.

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
            f"{where}: no unique match for {len(problems)} module(s): {shown}; {remedy}"
        )
    return matched


def ends_with(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or ends it at a dot, as in PEFT's `target_modules`."""
    return name == suffix or name.endswith("." + suffix)


def model_name(text: str) -> str:
    """What a model is called, of a hub id or a path: its last part, or the id in a hub cache's path.

    Organisations do not count: mirrors of a model have others.
    """
    parts = [part for part in re.split(r"[/\\]", text.strip()) if part not in ("", ".")]
    cached = [part for part in parts if part.startswith("models--")]
    if cached and "snapshots" in parts:
        parts = cached[-1].split("--")
    return parts[-1] if parts else ""


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that counts: layer 2 before layer 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in name.split(".")
    ]


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
