"""Prefixes that are computed while zeros stand in for an adapter: no later request goes on from them.

vLLM keeps the keys and values of prompts by tokens, name and path of the adapter, and salt. None of these
changes with the zeros, and the processes that take requests know nothing of them: so a file in the cache
tells when zeros stood last. A request for an adapter has a salt of its own for a while after that, and
later one that none had before.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from pathlib import Path

_LOG = logging.getLogger("csulora.integrations.vllm")
_WHILE = 60.0  # seconds, in which zeros may stand that were not tried again


class Prefixes:
    """What all processes of a server know of zeros."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / "zeros"

    def spoil(self) -> None:
        """Note that zeros stand from now on. Never raises: it is called within a step."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(self._file, flags, 0o600)
            try:
                os.utime(file)
            finally:
                os.close(file)
        except OSError as error:
            _LOG.error("csulora: vLLM may go on from prefixes that zeros computed (%s)", error)

    def salt(self, given: str | None) -> str | None:
        """The salt of a request for an adapter: as given, as long as no zeros have stood anywhere."""
        try:
            last = os.lstat(self._file).st_mtime_ns
        except OSError:
            return given
        recent = time.time() - last / 1e9 < _WHILE
        return f"csulora {secrets.token_hex(16) if recent else last} {given or ''}"
