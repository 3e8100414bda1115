"""Single files: opened, read, hashed, written and made durable; malformed ones are one CsuloraError each.

Whatever comes from outside is opened here. The open never waits, as it would for a named pipe, and what
was opened is looked at, not what its name stood for a moment before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError

PIECE = 1 << 20  # bytes read, hashed or copied at a time


def open_regular(path: str | os.PathLike[str], *, limit: int | None = None) -> FileIO:
    """A file from outside, open for reading and without a buffer.

    Raises CsuloraError for what is no regular file or has more than `limit` bytes, OSError for what
    cannot be opened (see `reading`).
    """
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    except ValueError:  # no name that the system knows
        raise CsuloraError(f"{path!r}: cannot be the name of a file") from None
    size = os.fstat(file.fileno()).st_size
    if limit is not None and size > limit:
        file.close()
        raise CsuloraError(f"{path}: has {size} bytes; at most {limit} are read")
    return file


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the file system says while `path` is being read into one CsuloraError."""
    try:
        yield
    except FileNotFoundError:
        raise CsuloraError(f"{path}: no such file") from None
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """A small file whole, of at most `limit` bytes."""
    with reading(path), open_regular(path, limit=limit) as file:
        before = os.fstat(file.fileno())
        data = bytearray()
        while len(data) <= before.st_size and (piece := file.read(PIECE)):
            data += piece
        if len(data) != before.st_size or stamp(os.fstat(file.fileno())) != stamp(before):
            raise changed(path)
    return bytes(data)


def read_start(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file of any size."""
    with reading(path), open_regular(path) as file:
        return file.read(size) or b""


def sha256_file(path: Path, limit: int | None = None) -> str:
    """Hex sha256 of a file's bytes."""
    with reading(path), open_regular(path, limit=limit) as file:
        return hash_rest(path, file, hashlib.sha256())


def hash_rest(path: Path, file: FileIO, digest: Any) -> str:
    """Hex digest after what is left of an open file was added."""
    before = os.fstat(file.fileno())
    left = before.st_size - file.tell()
    piece = memoryview(bytearray(PIECE))
    while left > 0 and (count := file.readinto(piece[:left])):
        digest.update(piece[:count])
        left -= count
    if stamp(os.fstat(file.fileno())) != stamp(before):
        raise changed(path)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes, *, mode: int | None = None, durable: bool = True) -> None:
    """Write and fsync a small file; `mode` are its permission bits, if not those of any new file.

    durable: without it there is no fsync, for what is checked before it is used.
    """
    with open(path, "wb", buffering=0) as file:
        write_all(file, data)
        sync(file, mode, durable=durable)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write to a file without a buffer, which may take a part at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def joined(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes, small chunks joined: whatever hashes or writes a piece lets other threads run."""
    small: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        if size + len(chunk) > PIECE:
            yield b"".join(small)
            small, size = [], 0
        if len(chunk) > PIECE:
            yield chunk
            continue
        small.append(chunk)
        size += len(chunk)
    yield b"".join(small)


def copy_file(
    source: Path, destination: Path, *, mode: int | None = None, durable: bool = True
) -> None:
    """Copy a file's contents and permission bits (not its links or owner) and fsync the copy.

    Holes are left out, so that a copy takes no more of the disk than its source. mode: permission bits in
    place of the source's. durable: as in `write_bytes`.
    """
    with reading(source):
        reader = open_regular(source)
    with reader, open(destination, "wb", buffering=0) as writer:
        found = os.fstat(reader.fileno())
        for begin, end in _filled(source, reader, found.st_size):
            _copy_span(source, reader, writer, begin, end)
        if stamp(os.fstat(reader.fileno())) != stamp(found):
            raise changed(source)
        writer.truncate(found.st_size)
        sync(writer, permissions(found) if mode is None else mode, durable=durable)


def permissions(found: os.stat_result) -> int:
    """Who may read, write and execute it."""
    return stat.S_IMODE(found.st_mode) & 0o777


def mode_of(path: Path) -> int | None:
    """The permission bits of what is there, None where nothing is."""
    try:
        return permissions(os.stat(path))
    except OSError:
        return None


def sync(file: Any, mode: int | None = None, *, durable: bool = True) -> None:
    """Make what was written to an open file durable, and before that its permission bits, if given."""
    file.flush()
    if mode is not None:
        os.fchmod(file.fileno(), mode)
    if durable:
        os.fsync(file.fileno())


def stamp(found: os.stat_result) -> tuple[int, ...]:
    """What is another number once a file was replaced or its content changed."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: str | os.PathLike[str]) -> CsuloraError:
    """The error about a file that is not what it was when it was opened."""
    return CsuloraError(f"{path}: changed while it was being read")


def _without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CsuloraError(f"{path}: not a regular file; refused")
    return descriptor


def _filled(path: Path, file: FileIO, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what lies between the holes of a file."""
    end = 0
    while end < size:
        with reading(path):
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = min(os.lseek(file.fileno(), begin, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to its end
                    return
                if error.errno != errno.EINVAL:
                    raise
                begin, end = end, size  # a file system that does not tell
        yield begin, end


def _copy_span(path: Path, reader: FileIO, writer: FileIO, begin: int, end: int) -> None:
    reader.seek(begin)
    writer.seek(begin)
    while begin < end:
        with reading(path):
            piece = memoryview(reader.read(min(PIECE, end - begin)) or b"")
        if not piece:
            raise changed(path)
        begin += len(piece)
        write_all(writer, piece)
