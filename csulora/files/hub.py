"""Local folders and hub ids."""

from __future__ import annotations

import os
import re
from pathlib import Path

from csulora.errors import CsuloraError


def resolve_source(name: str | os.PathLike[str], patterns: list[str]) -> Path:
    """A local folder as it is, or the local snapshot of a hub id, downloaded if need be."""
    path = Path(name)
    if path.exists():
        return path
    if path.is_symlink():
        raise CsuloraError(f"{name}: a link that leads nowhere")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise CsuloraError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each is one line for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CsuloraError(
            f"{name}: no such folder, and not to be had from the hub ({reason})"
        ) from None
