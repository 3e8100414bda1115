"""The adapters that `csulora prewarm` and `csulora serve-check` are about."""

from __future__ import annotations

import os

from csulora.adapter import PICKLE
from csulora.batch import find
from csulora.batch.sources import holds
from csulora.errors import UsageError
from csulora.files.peft_config import FILE as CONFIG
from csulora.output import WEIGHTS
from csulora.serving.config import ServingConfig
from csulora.serving.names import adapters_in


def served_adapters(given: list[str], config: ServingConfig) -> list[str]:
    """The folders of adapters that are named, or those that requests can name. Raises UsageError."""
    if not given:
        found = adapters_in(config.folders)
        if not found:
            raise UsageError(
                "no adapters: none are named, and the configuration's folders hold none"
            )
        return found
    sources = [item.source for item in find(given)]
    for source in sources:
        if os.path.isdir(source) and not holds(source, (CONFIG, WEIGHTS, PICKLE)):
            raise UsageError(f"{source}: there are no adapters in it; links are not followed")
    return sources
