"""The journal of an output folder: what is finished in it, and the lock that keeps a second run out.

One JSON object a line, appended and fsynced after the outputs it speaks of were renamed into place. So
a line never speaks of an output that is not there whole, and an output whose line was lost with the
machine is still known by its own report. The format is in docs/formats.md.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError, UsageError
from csulora.files.json import load_json
from csulora.files.locks import open_locked, release

FILE = "csulora_journal.jsonl"
FORMAT = "csulora_journal/1"
LIMIT = 1 << 30  # bytes; a million adapters
LONGEST_LINE = 1 << 20  # bytes


class Journal:
    """An open, locked journal. `Journal(out_dir)` opens it, `close` gives it up.

    Raises UsageError if another run holds the lock, CsuloraError if the folder cannot be written.
    """

    def __init__(self, out_dir: Path) -> None:
        self._out_dir = out_dir
        self._path = out_dir / FILE
        self._new_folder = not out_dir.exists()
        self._spans: dict[str, tuple[int, int]] = {}  # target: begin and length of its last line
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self._path)
        except BlockingIOError:
            raise UsageError(
                f"{out_dir}: another run is writing there; wait for its end or choose another output "
                "folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise CsuloraError(f"{self._path}: cannot be written ({reason})") from None
        try:
            self._end = self._read()
        except OSError as error:
            release(self._file)
            reason = error.strerror or error
            raise CsuloraError(f"{self._path}: cannot be read ({reason})") from None
        except BaseException:
            release(self._file)
            raise

    def entry(self, target: str) -> dict[str, Any] | None:
        """The last line about an output, None if there is none. Safe to call from any thread."""
        if target not in self._spans:
            return None
        begin, length = self._spans[target]
        try:
            return _parse(os.pread(self._file, length, begin))
        except OSError:
            return None  # as good as no line: the output is known by its report

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add lines and make them durable. Raises OSError; then none of them was added."""
        lines = [_line(entry) for entry in entries]
        if not lines:
            return
        if not self._end:
            lines.insert(0, _line({"format": FORMAT}))
        data = memoryview(b"".join(lines))
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)

    def close(self) -> None:
        """Give up the lock. A journal without lines disappears, and a folder made only for it."""
        if not self._end:
            with contextlib.suppress(OSError):
                # Somebody may have taken it away under the run, and another run begun there.
                if os.path.samestat(os.fstat(self._file), os.lstat(self._path)):
                    self._path.unlink()
                    if self._new_folder:
                        self._out_dir.rmdir()
        release(self._file)

    def _read(self) -> int:
        """Find the place of every line; cut off a last one that a killed run left torn."""
        position = end = 0
        size = os.fstat(self._file).st_size
        if size > LIMIT:
            raise CsuloraError(
                f"{self._path}: has {size} bytes, no journal has more than {LIMIT}; remove it to have "
                "outputs known by their reports"
            )
        with open(self._file, "rb", closefd=False) as lines:
            lines.seek(0)
            while line := lines.readline(LONGEST_LINE):
                begin, position = position, position + len(line)
                whole = line.endswith(b"\n")
                entry = _parse(line) if whole else None
                first = begin == 0 and (whole or len(line) == LONGEST_LINE)
                if first and (entry is None or entry.get("format") != FORMAT):
                    raise CsuloraError(
                        f"{self._path}: not a journal of this version of csulora "
                        f"(expected {FORMAT}); remove it to have outputs known by their reports"
                    )
                if not whole:
                    continue  # the last line, torn, or a piece of one that is none of ours
                end = position
                if entry is not None and isinstance(entry.get("output"), str):
                    self._spans[entry["output"]] = (begin, len(line))
        if position != end:
            os.ftruncate(self._file, end)
        return end


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line that cannot be read counts for nothing: the output is then known by its own report."""
    try:
        entry = load_json(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
