"""Counters of decisions, of this process and of all that share a cache.

Names: corrected, hits, waits, refused (by reason), repaired, zeroed, seconds_digest, seconds_read,
seconds_correct, seconds_write. Each process keeps its own in a file of the cache, so that one process can
show those of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from csulora.errors import CsuloraError
from csulora.files.plain import read_bytes, stamp, write_bytes
from csulora.serving.own_files import OwnFile, others_file, paths_in, remove_unfinished

_SUFFIX = ".counters"
_TOTAL = "ended.json"  # of processes that have ended
# Bytes of each half of a process's file. One is whole while the other is written.
_HALF = 4096
_LIMIT = 1 << 20  # bytes of that
_TRIES = 20  # of a sum, while others are added up
_LOG = logging.getLogger("csulora.serving")

Counts = Counter[tuple[str, str]]


class _Own:
    """What this process has counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counts = Counter()
        self.folder: Path | None = None
        self.file: OwnFile | None = None
        self.notes = 0  # of the counts in the file
        self.failed = False  # to keep the counts, the last time
        self.shown: Counts = Counter()  # by `collect`


class _Ended(NamedTuple):
    """What ended processes have counted, and whose files are in it, though they may be there still."""

    counts: Counts
    files: frozenset[str]


_own = _Own()


def _after_fork() -> None:
    """A forked process counts from nothing, in a file of its own."""
    global _own
    folder, _own = _own.folder, _Own()
    if folder is not None:
        _own.folder, _own.file = folder, OwnFile(folder, _SUFFIX)


os.register_at_fork(after_in_child=_after_fork)


def add(name: str, reason: str = "", seconds: Mapping[str, float] | None = None) -> None:
    """Count one decision, and to `seconds_<step>` what its steps took. Never raises for the file."""
    with _own.lock:
        _own.counts[name, reason] += 1
        for step, value in (seconds or {}).items():
            _own.counts[f"seconds_{step}", ""] += value  # type: ignore[assignment]
        if _own.file is None:
            return
        try:
            _note(_own, _own.file)
            _own.failed = False
        except OSError as error:  # no reason to serve nothing
            if not _own.failed:
                _LOG.warning("csulora: counters cannot be kept (%s)", error)
            _own.failed = True


def collect() -> dict[tuple[str, str], float]:
    """(name, reason) to value: the sum over all processes that ever shared the cache, this one alone
    before any cache is shared.

    Never raises for the files; a value is never less than at an earlier call.
    """
    with _own.lock:
        own, folder = Counter(_own.counts), _own.folder
        # This process's own file may be a failed write behind, so it is left out for what is in memory.
        path = None if _own.file is None else _own.file.path
    found = own
    if folder is not None:
        with contextlib.suppress(OSError):
            found = own + _of_others(folder, path)
    with _own.lock:
        _own.shown |= found  # each the larger of both
        return dict(_own.shown)


def share(folder: Path) -> None:
    """From now on keep the counters of this process in `folder`, and add up those of ended ones there.

    The lock of the cache has to be held alone. Where that cannot be, they are kept in memory, and those
    of ended ones stay in their files.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _add_up(folder)
    except OSError as error:  # no reason to serve nothing
        _LOG.warning("csulora: counters of ended processes cannot be added up (%s)", error)
    with _own.lock:
        if _own.folder != folder:
            _own.folder, _own.file = folder, OwnFile(folder, _SUFFIX)


def _of_others(folder: Path, own: Path | None) -> Counts:
    """The sum of what ended processes, and all but this one, have noted. Raises OSError."""
    for _ in range(_TRIES):
        version = _version(folder)
        before = _ended_so_far(folder)
        found = before.counts + sum(
            (
                counts
                for path, counts, _ in _noted(folder)
                if path != own and path.name not in before.files
            ),
            Counter(),
        )
        # What is added up this very moment may be missing.
        if _version(folder) == version:
            break
    return found


def _add_up(folder: Path) -> None:
    """Put what ended processes counted into the total, and remove their files when it stands there.

    The total names the files in it, so that a kill in between loses nothing and counts nothing twice.
    Raises OSError.
    """
    before = _ended_so_far(folder)
    ended = {path: counts for path, counts, alive in _noted(folder) if not alive}
    new = [counts for path, counts in ended.items() if path.name not in before.files]
    if new:
        content = {
            "counts": _nested(before.counts + sum(new, Counter())),
            "files": sorted(path.name for path in ended),
        }
        temporary = folder / f"{_TOTAL}.new"
        write_bytes(temporary, json.dumps(content).encode(), mode=0o600, durable=False)
        os.replace(temporary, folder / _TOTAL)
    for path in ended:
        path.unlink(missing_ok=True)
    remove_unfinished(folder, _SUFFIX)


def _note(own: _Own, file: OwnFile) -> None:
    """Write the counts into that half of the file which is not the newest. Raises OSError."""
    text = json.dumps([own.notes + 1, _nested(own.counts)]).encode()
    half = (b"%08x" % zlib.crc32(text) + text).ljust(_HALF)
    if len(half) > _HALF or not file.overwrite(half, _HALF * (own.notes % 2)):
        file.write(half + half)
    own.notes += 1


def _noted(folder: Path) -> Iterator[tuple[Path, Counts, bool]]:
    """What each process has noted, and whether it lives; what cannot be opened is left out."""
    for path in paths_in(folder, _SUFFIX):
        with contextlib.suppress(OSError, CsuloraError), others_file(path) as (file, alive):
            yield path, _parsed(file), alive


def _version(folder: Path) -> tuple[int, ...]:
    """Of the total: another one, whenever it was replaced."""
    with contextlib.suppress(OSError):
        return stamp(os.lstat(folder / _TOTAL))
    return ()


def _ended_so_far(folder: Path) -> _Ended:
    """Raises OSError for a total that is there and cannot be read now."""
    file = folder / _TOTAL
    if not os.path.lexists(file):
        return _Ended(Counter(), frozenset())
    try:
        data = read_bytes(file, _LIMIT)
    except CsuloraError as error:
        raise OSError(str(error)) from None
    try:
        found = json.loads(data)
        return _Ended(_counts(found["counts"]), frozenset(found["files"]))
    except (ValueError, TypeError, KeyError, AttributeError):  # a crash of the machine spoiled it
        return _Ended(Counter(), frozenset())


def _nested(counts: Counts) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for (name, reason), value in counts.items():
        nested.setdefault(name, {})[reason] = value
    return nested


def _parsed(file: FileIO) -> Counts:
    """What a file says, nothing where a crash of the machine has spoiled it."""
    for _ in range(_TRIES):
        file.seek(0)
        data = file.readall() or b""
        half = len(data) // 2
        found = [one for one in map(_half, (data[:half], data[half:])) if one is not None]
        if found:
            return max(found, key=lambda one: one[0])[1]
        if not data:
            break  # both may have been written to while they were read
    return Counter()


def _half(data: bytes) -> tuple[int, Counts] | None:
    """The number and the counts of a half, None if it is not whole."""
    text = data[8:].rstrip()
    try:
        if int(data[:8], 16) != zlib.crc32(text):
            return None
        number, nested = json.loads(text)
        return int(number), _counts(nested)
    except (ValueError, TypeError, AttributeError):
        return None


def _counts(nested: Any) -> Counts:
    return Counter({(name, r): value for name, by in nested.items() for r, value in by.items()})
