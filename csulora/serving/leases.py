"""Files of a process in a shared folder, locked as long as it lives, and the leases kept in one of them.

The kernel drops a lock with the process that holds it, also after kill -9. So a file whose lock can be
had is that of a dead process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from csulora.files.locks import open_locked
from csulora.files.plain import open_regular

_LIMIT = 64 << 20  # bytes of one file


class OwnFile:
    """A file `<pid>-<random><suffix>` of this process in `folder`, made anew where it was taken away."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        self._pid, self._file, self.path = 0, -1, folder

    def write(self, content: bytes) -> None:
        """Replace its content. Raises OSError."""
        if not self.is_there():
            self._make()
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def append(self, content: bytes) -> bool:
        """Add to its content; False where the file is not there, so that all has to be written."""
        if not self.is_there():
            return False
        os.pwrite(self._file, content, os.fstat(self._file).st_size)
        return True

    def is_there(self) -> bool:
        """Whether the file is this process's own, and still in its place."""
        if self._pid != os.getpid():  # a forked process has a file of its own
            return False
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        return False

    def _make(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        name = f"{os.getpid()}-{secrets.token_hex(4)}{self._suffix}"
        # An old one stays open: a forked process shares its lock with its parent.
        self.path = self._folder / name
        self._file = open_locked(self.path, wait=True)  # held a moment by whoever asks if it is
        self._pid = os.getpid()


def contents(folder: Path, suffix: str) -> Iterator[tuple[Path, bytes, bool]]:
    """Every such file with its content, and whether its process lives."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for path in sorted(Path(e.path) for e in entries if e.name.endswith(suffix)):
            with contextlib.suppress(FileNotFoundError), open_regular(path, limit=_LIMIT) as file:
                yield path, file.read() or b"", _is_locked(file.fileno())


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


@contextlib.contextmanager
def shared_lock(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock that many hold at once, or one `alone`; its file stays."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


class Leases:
    """Keys that processes hold: what `held` names is not to be removed.

    Both methods need the lock of the cache, `take` shared, `held` alone.
    """

    _SUFFIX = ".leases"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = OwnFile(folder, self._SUFFIX)
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """Hold a key until this process ends."""
        with self._lock:
            if key in self._keys and self._own.is_there():
                return  # refused requests take their key again and again
            self._keys.add(key)
            if not self._own.append(f"\n{key}".encode()):
                self._write()

    def give(self, key: str) -> None:
        """Hold it no longer."""
        with self._lock:
            self._keys.discard(key)
            self._write()

    def held(self) -> set[str]:
        """What live processes hold. Files of dead ones are removed."""
        keys: set[str] = set()
        for path, content, alive in contents(self._folder, self._SUFFIX):
            if alive:
                keys.update(content.decode(errors="replace").split())
            else:
                path.unlink(missing_ok=True)
        return keys

    def _write(self) -> None:
        self._own.write("\n".join(sorted(self._keys)).encode())
