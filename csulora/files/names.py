"""Module names: matching an adapter's to a checkpoint's, and their order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from csulora.errors import CsuloraError


def match_modules(wanted: Iterable[str], known: Collection[str], where: str) -> dict[str, str]:
    """Map each wanted module name to a known one: the same name, else a unique suffix.

    One name is a suffix of the other when it ends it at a dot, so `transformer.h.0.mlp.c_fc` of a
    model class matches `h.0.mlp.c_fc` of its checkpoint. `where` names the place of `known` in errors.

    Raises CsuloraError that lists every name without a match, with several, or sharing one.
    """
    by_leaf: dict[str, list[str]] = {}
    for name in known:
        by_leaf.setdefault(_leaf(name), []).append(name)
    matched: dict[str, str] = {}
    problems: list[str] = []
    for name in wanted:
        if name in known:
            matched[name] = name
            continue
        candidates = [k for k in by_leaf.get(_leaf(name), ()) if _suffixes(name, k)]
        if len(candidates) == 1:
            matched[name] = candidates[0]
        elif candidates:
            problems.append(f"{name} (fits {', '.join(sorted(candidates)[:3])})")
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


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _suffixes(a: str, b: str) -> bool:
    return ends_with(a, b) or ends_with(b, a)
