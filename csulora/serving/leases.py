"""Leases: what processes hold of a cache, as long as they live."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from csulora.errors import CsuloraError
from csulora.files.locks import release
from csulora.serving.own_files import OwnFile, others_file, paths_in, remove_unfinished

_LOG = logging.getLogger("csulora.serving")


@contextlib.contextmanager
def shared_lock(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock that many hold at once, or one `alone`; its file stays."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        release(file)


class Leases:
    """Keys that processes hold: what `held` names is not to be removed.

    All methods need the lock of the cache, `held` alone, the others shared.
    """

    _SUFFIX = ".leases"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = OwnFile(folder, self._SUFFIX)
        self._keys: set[str] = set()
        self._noted = False  # whether the file names all of them
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """Hold a key until this process ends, or gives it.

        Where it cannot be noted others may remove the entry: the next call tries again, and an entry is
        checked before it is used.
        """
        with self._lock:
            noted = self._noted and self._own.is_there()
            if key in self._keys and noted:
                return  # a key that is asked for again and again
            self._keys.add(key)
            if not (noted and self._own.append(f"\n{key}".encode())):
                self._write()

    def give(self, key: str) -> None:
        """Hold it no longer."""
        with self._lock:
            if key in self._keys:
                self._keys.discard(key)
                self._write()

    def held(self) -> set[str]:
        """What live processes hold. Files of dead ones are removed.

        Raises OSError where that of a live one cannot be read.
        """
        with self._lock:
            keys = set(self._keys)
        for path in paths_in(self._folder, self._SUFFIX):
            with (
                contextlib.suppress(FileNotFoundError, CsuloraError),
                others_file(path) as (file, alive),
            ):
                if alive:
                    keys.update((file.readall() or b"").decode(errors="replace").split())
                else:
                    path.unlink()
        remove_unfinished(self._folder, self._SUFFIX)
        return keys

    def _write(self) -> None:
        self._noted = False
        try:
            self._own.write("\n".join(sorted(self._keys)).encode())
            self._noted = True
        except OSError as error:
            _LOG.warning("csulora: leases cannot be kept (%s)", error)
