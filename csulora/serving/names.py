"""Names of requests, and the adapter folders that they may stand for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from csulora.batch.sources import subfolders
from csulora.files.peft_config import FILE as CONFIG
from csulora.serving.refused import RefusedError


def find_adapter(folders: Sequence[Path], name: str) -> Path | None:
    """The adapter folder of that name in the first of these folders that holds one, links resolved.

    None where none does. Raises RefusedError for a name that is no relative path downwards, and for a
    link that leads out of the folders.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or os.path.isabs(name) or {"", ".", ".."} & {*parts}:
        raise _outside()
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a pair of surrogates names no file
        raise _outside() from None
    roots = [os.path.realpath(folder) for folder in folders]
    for root in roots:
        if os.path.lexists(os.path.join(root, name, CONFIG)):
            found = os.path.realpath(os.path.join(root, name))
            if not _is_inside(found, roots):
                raise _outside()
            return Path(found)
    return None


def adapters_in(folders: Sequence[Path]) -> list[str]:
    """The adapters that names stand for, each source once: by its own path, or else by a link.

    Links count where they stay within the folders. Hidden folders are not entered, and an adapter inside
    another one is not an adapter of its own. Raises UsageError for a folder that cannot be listed.
    """
    roots = [os.path.realpath(folder) for folder in folders]
    found: list[str] = []
    seen: set[str] = set()
    left = deque(map(os.fspath, folders))
    while left:
        folder = left.popleft()
        real = os.path.realpath(folder)
        inside = _is_inside(real, roots)
        if real in seen or not (inside or real in roots):
            continue
        seen.add(real)
        if inside and os.path.lexists(os.path.join(folder, CONFIG)):
            found.append(folder)
            continue
        below, links = subfolders(folder)
        left.extendleft(reversed(below))
        left.extend(links)
    return found


def _is_inside(real: str, roots: Sequence[str]) -> bool:
    return any(Path(real).is_relative_to(one) and real != one for one in roots)


def _outside() -> RefusedError:
    return RefusedError("outside", "the name leaves the folders of adapters")
