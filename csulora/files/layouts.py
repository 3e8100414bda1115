"""Module names in the layouts of transformers, which nests a model one way in memory and another on disk.

PEFT names modules as they lie in memory, a checkpoint keeps the names it was first published with, and
adapters of older releases follow those: `model.language_model.layers` and `language_model.model.layers`
are one. For most model types, what transformers renames on loading (its `conversion_mapping`) is wrappers
around the parts of a model; those are understood here. Everything else has to be named alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from csulora.errors import CsuloraError
from csulora.files.names import match_modules
from csulora.text import listed

# Gemma 3, LLaVA, Mistral 3, Mllama, ...: language_model.model. on disk, model.language_model. in memory.
# Qwen2-VL: model. on disk. Gemma 3n and Qwen 3.5 with text alone: model.language_model. on disk.
_WRAPPERS = frozenset({"model", "language_model"})
# Only as the first part: the thinker of Qwen2.5-Omni, which is loaded alone; Nemotron-H.
_ROOTS = {"thinker": "model", "backbone": "model"}
# CLIP and SigLIP towers: vision_tower.vision_model. on disk, vision_tower. in memory.
_VISION = frozenset({"vision_tower", "vision_model"})
_TOWERS_OF_ITS_KIND = ("image_tower", "video_tower")  # Video-LLaVA has one of each
# Other parts of a model that lie inside `model.` in memory and beside it on disk.
_BESIDE_MODEL = frozenset({"lm_head", "multi_modal_projector"})
# Whatever a part of a name says of these belongs to another tower than the language model.
_SENSES = ("vision", "visual", "image", "video", "audio", "speech")
# Parts of CLIP's and SigLIP's vision model, which transformers also loads alone, without its wrapper.
_OF_VISION_MODEL = frozenset({"encoder", "embeddings", "head"})


def match_layouts(
    wanted: Iterable[str], known: Collection[str], where: str, remedy: str
) -> dict[str, str]:
    """Map each wanted module name to a known one: the same, else the only one that fits.

    A name fits another that is the same module in another layout, and by suffix as in `match_modules`;
    but no name fits one of another tower, whose weights may well have the same shape. Errors begin with
    `where`, the place of `known`, and end with `remedy`.

    Raises CsuloraError that lists every name without a match, with several, or sharing one.
    """
    wanted = list(wanted)
    counterparts = _counterparts(wanted, known)
    problems = [
        f"{name} (fits {', '.join(fitting[:3])})"
        for name, fitting in counterparts.items()
        if len(fitting) > 1
    ]
    rest = [name for name in wanted if name not in counterparts]
    matched = match_modules(rest, known, where, remedy)
    problems += [
        f"{name} (fits only {target}, of another tower)"
        for name, target in matched.items()
        if _crosses(name, target)
    ]
    matched |= {name: fitting[0] for name, fitting in counterparts.items()}
    shared = Counter(matched.values())
    problems += [
        f"{name} (not alone in fitting {target})"
        for name, target in matched.items()
        if shared[target] > 1
    ]
    if problems:
        raise CsuloraError(f"{where}: no unique match for {listed(problems)}; {remedy}")
    return {name: matched[name] for name in wanted}


def in_other_layouts(wanted: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The wanted names that are not known, but as one module in another layout, and fit no other."""
    found = _counterparts(wanted, known)
    return {name: fitting[0] for name, fitting in found.items() if len(fitting) == 1}


def _counterparts(wanted: Iterable[str], known: Collection[str]) -> dict[str, list[str]]:
    """All that fits a wanted name which is not known, but is in another layout."""
    missing = [name for name in wanted if name not in known]
    if not missing:
        return {}
    by_common: dict[str, list[str]] = {}
    by_ending: dict[str, list[str]] = {name: [] for name in missing}
    lengths = {len(name) for name in missing}
    for name in known:
        by_common.setdefault(common_name(name), []).append(name)
        for ending in _endings(name, lengths):
            if ending in by_ending:
                by_ending[ending].append(name)
    lengths = {len(name) for name in known}
    found: dict[str, list[str]] = {}
    for name in missing:
        if same := by_common.get(common_name(name)):
            shorter = [ending for ending in _endings(name, lengths) if ending in known]
            found[name] = sorted({*same, *by_ending[name], *shorter})
    return found


def common_name(name: str) -> str:
    """One name for a module in every layout: each run of wrappers is one, and none before a tower."""
    first, dot, rest = name.partition(".")
    parts: list[str] = []
    for part in (_ROOTS.get(first, first) + dot + rest).split("."):
        part = "model" if part in _WRAPPERS else "vision_tower" if part in _VISION else part
        last = parts[-1] if parts else None
        if part == last or (part == "vision_tower" and last in _TOWERS_OF_ITS_KIND):
            continue
        if last == "model" and (of_a_sense(part) or part in _BESIDE_MODEL):
            parts.pop()
        parts.append(part)
    return "lm_head" if parts == ["embed_out"] else ".".join(parts)  # GPT-NeoX


def of_a_sense(name: str) -> bool:
    """Whether a name, or a part of one, belongs to a vision or audio tower."""
    return any(sense in name for sense in _SENSES)


def _endings(name: str, lengths: Collection[int]) -> Iterator[str]:
    """Every proper ending of a name at a dot that has one of the lengths; others are not even cut out."""
    dot = name.find(".")
    while dot >= 0:
        if len(name) - dot - 1 in lengths:
            yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def _crosses(name: str, target: str) -> bool:
    """Whether one of the names ends the other, and what stands before it leads to another tower."""
    short, long = sorted((name, target), key=len)
    before = long.removesuffix(short).removesuffix(".")
    if not long.endswith(short) or not of_a_sense(before) or of_a_sense(short):
        return False
    return before != "vision_model" or short.partition(".")[0] not in _OF_VISION_MODEL
