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
from collections import Counter
from pathlib import Path

from csulora.errors import CsuloraError
from csulora.files.json import read_json
from csulora.files.plain import write_bytes
from csulora.serving.leases import OwnFile, contents

_SUFFIX = ".counters"
_TOTAL = "ended.json"  # of processes that have ended
_LOG = logging.getLogger("csulora.serving")

Counts = Counter[tuple[str, str]]


class _Own:
    """What this process has counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counts = Counter()
        self.folder: Path | None = None
        self.file: OwnFile | None = None


_own = _Own()


def _after_fork() -> None:
    """A forked process counts from nothing, in a file of its own."""
    global _own
    folder, _own = _own.folder, _Own()
    if folder is not None:
        _own.folder, _own.file = folder, OwnFile(folder, _SUFFIX)


os.register_at_fork(after_in_child=_after_fork)


def add(name: str, reason: str = "") -> None:
    """Count one decision."""
    _add(name, reason, 1)


def seconds(name: str, value: float) -> None:
    """Add to `seconds_<name>`."""
    _add(f"seconds_{name}", "", value)


def collect() -> dict[tuple[str, str], float]:
    """(name, reason) to value: the sum over all processes that ever shared the cache, this one alone
    before any cache is shared."""
    with _own.lock:
        if _own.folder is None:
            return dict(_own.counts)
        # This process's own file may be a failed write behind, so it is left out for what is in memory.
        found = _read_total(_own.folder) + _own.counts
        others = [
            content
            for path, content, _ in contents(_own.folder, _SUFFIX)
            if _own.file is None or path != _own.file.path
        ]
    return dict(sum(map(_parsed, others), found))


def share(folder: Path) -> None:
    """From now on keep the counters of this process in `folder`, and add up those of ended ones there.

    The lock of the cache has to be held alone. Raises OSError.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    ended: Counts = Counter()
    for path, content, alive in contents(folder, _SUFFIX):
        if not alive:
            ended += _parsed(content)
            path.unlink()
    if ended:
        temporary = folder / f"{_TOTAL}.new"
        write_bytes(temporary, _text(_read_total(folder) + ended), durable=False)
        os.replace(temporary, folder / _TOTAL)
    with _own.lock:
        if _own.folder != folder:
            _own.folder, _own.file = folder, OwnFile(folder, _SUFFIX)


def _add(name: str, reason: str, value: float) -> None:
    with _own.lock:
        _own.counts[name, reason] += value  # type: ignore[assignment]
        if _own.file is None:
            return
        try:
            _own.file.write(_text(_own.counts))
        except OSError as error:  # no reason to serve nothing
            _LOG.warning("csulora: counters cannot be kept (%s)", error)


def _read_total(folder: Path) -> Counts:
    with contextlib.suppress(CsuloraError):
        return _counts(read_json(folder / _TOTAL))
    return Counter()


def _text(counts: Counts) -> bytes:
    nested: dict[str, dict[str, float]] = {}
    for (name, reason), value in counts.items():
        nested.setdefault(name, {})[reason] = value
    return json.dumps(nested).encode()


def _parsed(content: bytes) -> Counts:
    try:
        return _counts(json.loads(content))
    except ValueError:  # a process is writing it, or has just made it
        return Counter()


def _counts(nested: dict[str, dict[str, float]]) -> Counts:
    return Counter({(name, r): value for name, by in nested.items() for r, value in by.items()})
