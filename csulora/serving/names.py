"""Names of requests, and the adapter folders that they may stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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
            found = Path(os.path.realpath(os.path.join(root, name)))
            if not any(found.is_relative_to(one) and str(found) != one for one in roots):
                raise _outside()
            return found
    return None


def _outside() -> RefusedError:
    return RefusedError("outside", "the name leaves the folders of adapters")
