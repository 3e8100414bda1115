"""The audit log: one JSON line a decision, and the same in the process's own log."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.folders import check_writable
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
        self._half = False  # whether the last line was cut short

    def check(self, *, make: bool = True) -> None:
        """Raise CsuloraError where the file cannot be written, or is none.

        make: it where there is none; otherwise it is only asked whether that could be.
        """
        if self._path is not None:
            try:
                if make or os.path.lexists(self._path):
                    os.close(_open(self._path))
                else:
                    _check_absent(self._path)
            except (OSError, ValueError) as error:
                raise CsuloraError(f"audit: {self._path}: {_reason(error)}") from None

    def line(self, decision: str, name: str, **details: Any) -> None:
        """Log a decision. Never raises: it has been made, and no full disk must end a server."""
        try:
            entry = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "pid": os.getpid(),
                "decision": decision,
                "name": encodable(name),
                **{key: value for key, value in details.items() if value not in (None, "", {}, ())},
            }
            text = json.dumps(entry, default=lambda value: encodable(str(value)))
            with contextlib.suppress(Exception):  # of a handler that is not ours
                _LOG.log(_LEVELS.get(decision, logging.INFO), "csulora: %s", one_line(text))
            if self._path is not None:
                self._append(self._path, text.encode(errors="backslashreplace") + b"\n")
        except Exception as error:
            with contextlib.suppress(Exception):
                _LOG.error("csulora: audit: %s: %s", self._path, _reason(error))

    def _append(self, path: Path, data: bytes) -> None:
        file = _open(path)
        try:
            if self._half:
                data = b"\n" + data
            self._half = False
            self._half = os.write(file, data) < len(data)
            if self._half:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def _open(path: Path) -> int:
    """A regular file, to add to its end; made where there is none. What is none is not even opened."""
    with contextlib.suppress(FileNotFoundError):
        _check_regular(os.lstat(path))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    try:
        _check_regular(os.fstat(file))
    except OSError:
        os.close(file)
        raise
    return file


def _check_absent(path: Path) -> None:
    """Raise OSError where a file that is not there could not be made."""
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)  # of a name that no file can have
    check_writable(path.parent)


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _reason(error: Exception) -> str:
    return f"cannot be written ({getattr(error, 'strerror', None) or error})"
