"""Locks between threads and processes: an empty file beside an output, locked while it is worked on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of an output, a hidden file beside it; waits for whoever holds it.

    Yields whether it had to wait. The file is gone afterwards; after a kill it is left behind, where it
    locks nothing. Raises OSError where it cannot be made.
    """
    lock = path.parent / f".{path.name}.lock"
    waited = False
    try:
        file = open_locked(lock)
    except BlockingIOError:
        file, waited = open_locked(lock, wait=True), True
    try:
        yield waited
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def open_locked(path: Path, *, wait: bool = False) -> int:
    """A file, made if it is missing, open and locked. Raises BlockingIOError if it is held."""
    import fcntl  # not everywhere; imported only when something is written

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)
