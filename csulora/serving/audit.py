"""The audit log: one JSON line a decision, and the same in the process's own log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.text import encodable, one_line

_LOG = logging.getLogger("csulora.serving")
_LEVELS = {"refused": logging.WARNING, "repaired": logging.WARNING, "zeroed": logging.ERROR}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing in the process's own log meanwhile, for commands, which say themselves what was decided."""
    before, _LOG.disabled = _LOG.disabled, True
    try:
        yield
    finally:
        _LOG.disabled = before


class Audit:
    """Lines for the end of one file, from any number of threads and processes. None: the log alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def check(self) -> None:
        """Raise CsuloraError where the file cannot be written."""
        if self._path is not None:
            try:
                os.close(self._open(self._path))
            except OSError as error:
                raise CsuloraError(
                    f"audit: {self._path}: cannot be written ({error.strerror})"
                ) from None

    def line(self, decision: str, name: str, **details: Any) -> None:
        """Log a decision. Never raises for the file: a full disk must not end a server."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "pid": os.getpid(),
            "decision": decision,
            "name": encodable(name),
            **{key: value for key, value in details.items() if value not in (None, "", {})},
        }
        text = json.dumps(entry, default=lambda value: encodable(str(value)))
        _LOG.log(_LEVELS.get(decision, logging.INFO), "csulora: %s", one_line(text))
        if self._path is None:
            return
        try:
            file = self._open(self._path)
            try:
                os.write(file, text.encode(errors="backslashreplace") + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            _LOG.error("csulora: audit: %s: cannot be written (%s)", self._path, error.strerror)

    @staticmethod
    def _open(path: Path) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600)
