"""Locks between threads and processes: an empty file beside an output, locked while it is worked on."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output, a hidden file beside it; waits for whoever holds it.

    The file is gone afterwards; after a kill it is left behind, where it locks nothing. Raises OSError
    where it cannot be made.
    """
    lock = path.parent / f".{path.name}.csulora-lock"
    file = open_locked(lock, wait=True)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        release(file)


def open_locked(path: Path, *, wait: bool = False) -> int:
    """A file, made if it is missing, open and locked.

    Raises BlockingIOError if it is held, and OSError for a link, a pipe or a device.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    while True:
        file = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            hold(file, wait=wait)
            # Whoever held it may have removed the file meanwhile, and others may have made a new one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
                    return file
        except BaseException:
            os.close(file)
            raise
        release(file)


def hold(file: int, *, wait: bool = True) -> None:
    """Lock an open file until it is given to `release`."""
    import fcntl  # not everywhere; imported only when something is written

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def release(file: int) -> None:
    """Unlock and close a file.

    Closing alone would leave it locked for as long as a process lives that was forked meanwhile.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)
