"""Files of a process in a shared folder, locked as long as it lives.

The kernel drops a lock with the process that holds it, also after kill -9. So a file whose lock can be
had is that of a dead process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from csulora.errors import CsuloraError
from csulora.files.locks import open_locked
from csulora.files.plain import open_regular

_NEW = ".new"  # of a file until it is whole


class OwnFile:
    """A file `<pid>-<random><suffix>` of this process in `folder`, made anew where it was taken away.

    What is written by `write` others see whole or not at all.
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
        if self.overwrite(content, size):
            return True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, size)
        return False

    def overwrite(self, content: bytes, offset: int) -> bool:
        """Put content into it, of which others may see a part; False where that cannot be.

        It costs a tenth of `write`, for which the kernel allocates the new file on the disk at once.
        """
        if not self.is_there():
            return False
        try:
            _put(self._file, content, offset)
        except OSError:
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
