"""Files of a process in a shared folder, locked as long as it lives, and the leases kept in one of them.

The kernel drops a lock with the process that holds it, also after kill -9. So a file whose lock can be
had is that of a dead process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from csulora.errors import CsuloraError
from csulora.files.locks import open_locked
from csulora.files.plain import open_regular

_LOG = logging.getLogger("csulora.serving")
_NEW = ".new"  # of a file until it is whole


class OwnFile:
    """A file `<pid>-<random><suffix>` of this process in `folder`, made anew where it was taken away.

    Others see an old content or a new one, never a part of one.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        self._pid, self._file, self.path = 0, -1, folder

    def write(self, content: bytes) -> None:
        """Replace its content. Raises OSError; the content stays as it was then."""
        if self._pid != os.getpid():  # a forked process has a file of its own
            # The old one stays open: its lock is that of the parent, too.
            name = f"{os.getpid()}-{secrets.token_hex(4)}{self._suffix}"
            self.path, self._file, self._pid = self._folder / name, -1, os.getpid()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}{_NEW}")
        file = open_locked(new, wait=True)  # before it has its name, or it seems a dead one's
        try:
            os.fchmod(file, 0o600)
            _put(file, content, 0)
            os.replace(new, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            os.close(file)
            raise
        before, self._file = self._file, file
        if before >= 0:
            os.close(before)

    def append(self, content: bytes) -> bool:
        """Add to its content; False where that cannot be, and all has to be written."""
        if not self.is_there():
            return False
        size = os.fstat(self._file).st_size
        try:
            _put(self._file, content, size)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            return False
        return True

    def is_there(self) -> bool:
        """Whether the file is this process's own, and still in its place."""
        if self._pid != os.getpid() or self._file < 0:
            return False
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        return False


def _put(file: int, content: bytes, offset: int) -> None:
    """Write all of it, or raise OSError; a full disk may take a part."""
    left = memoryview(content)
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def paths_in(folder: Path, suffix: str) -> list[Path]:
    """Where the files of all processes lie, in order. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.name.endswith(suffix))
    return []


@contextlib.contextmanager
def others_file(path: Path) -> Iterator[tuple[FileIO, bool]]:
    """A file of some process, open, and whether that lives; it is not replaced while it is open if not.

    Raises OSError, and CsuloraError for what is no regular file.
    """
    with open_regular(path) as file:
        yield file, _is_alive(path, file.fileno())


def remove_unfinished(folder: Path, suffix: str) -> None:
    """Remove what processes left that were killed before a file had its name. Raises OSError."""
    for path in paths_in(folder, f"{suffix}{_NEW}"):
        with contextlib.suppress(FileNotFoundError, CsuloraError), others_file(path) as (_, alive):
            if not alive:
                path.unlink()


def _is_alive(path: Path, file: int) -> bool:
    """Whether the process lives whose file this is."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    # A file that its process has just replaced is not locked any more.
    with contextlib.suppress(FileNotFoundError):
        return not os.path.samestat(os.fstat(file), os.lstat(path))
    return True


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
