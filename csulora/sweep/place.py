"""The folder of a sweep: what may be written over, the evaluations kept, the variants in work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError, ExistsError, UsageError
from csulora.files.folders import check_apart, make_folders, whole_file, writing
from csulora.files.json import json_bytes, load_json, read_json
from csulora.files.locks import open_locked, release
from csulora.files.plain import write_bytes

RESULT, EVALUATIONS = "sweep.json", "evaluations.jsonl"
RESULT_FORMAT, EVALUATIONS_FORMAT = "csulora_sweep/1", "csulora_evaluations/1"
VARIANT = ".variant-"  # how the folders of adapters in work begin
LIMIT = 1 << 28  # bytes of kept evaluations


class Place:
    """An output folder that is locked for one sweep. `close` gives it up.

    fresh: forget the evaluations that are kept there.

    Raises ExistsError for a folder that holds anything but a sweep, UsageError where another sweep is
    at work in it, CsuloraError where it lies within the adapter's folder or cannot be written.
    """

    def __init__(self, out_dir: Path, source: Path | None, *, fresh: bool = False) -> None:
        if source is not None:
            check_apart(out_dir, source)
        self.path = out_dir
        self._lock = threading.Lock()
        _check_ours(out_dir)
        self._new = not out_dir.exists()
        with writing(out_dir):
            make_folders(out_dir)
            try:
                self._file = open_locked(out_dir / EVALUATIONS)
            except BlockingIOError:
                raise UsageError(f"{out_dir}: another sweep is at work there") from None
        try:
            with writing(out_dir):
                self._kept, self._end = self._read()
                if fresh:
                    os.ftruncate(self._file, 0)
                    self._kept, self._end = {}, 0
                self._clear()
        except BaseException:
            release(self._file)
            raise

    def find(self, key: str) -> dict[str, float] | None:
        """The metrics that are kept under a key."""
        return self._kept.get(key)

    def keep(self, key: str, metrics: Mapping[str, float], **about: Any) -> None:
        """Add an evaluation and make it durable; `about` is for whoever reads the file."""
        line = {"key": key, **about, "metrics": dict(metrics)}
        with self._lock, writing(self.path / EVALUATIONS):
            if not self._end:
                self._write({"format": EVALUATIONS_FORMAT})
            self._write(line)
            os.fsync(self._file)
            self._kept[key] = dict(metrics)

    @contextlib.contextmanager
    def variant(self) -> Iterator[Path]:
        """A folder for one adapter and the output of its command, which goes with it."""
        with writing(self.path):
            folder = Path(tempfile.mkdtemp(prefix=VARIANT, dir=self.path)).absolute()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, result: Mapping[str, Any]) -> None:
        """The result of the sweep, whole or not at all."""
        target = self.path / RESULT
        with writing(target), whole_file(target) as temporary:
            write_bytes(temporary, json_bytes(result))

    def close(self) -> None:
        """Give up the lock; a file without evaluations goes with it, and a folder made in vain."""
        if not self._end:
            with contextlib.suppress(OSError):
                # Somebody may have taken it away meanwhile, and another sweep begun there.
                if os.path.samestat(os.fstat(self._file), os.lstat(self.path / EVALUATIONS)):
                    (self.path / EVALUATIONS).unlink()
                    if self._new:
                        self.path.rmdir()
        release(self._file)

    def _write(self, entry: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(entry, allow_nan=False).encode() + b"\n")
        while data:
            count = os.pwrite(self._file, data, self._end)
            self._end, data = self._end + count, data[count:]

    def _clear(self) -> None:
        """Remove what a killed sweep left; nobody is at work in it, as the lock is ours."""
        with os.scandir(self.path) as entries:
            left = [e.path for e in entries if e.name.startswith(VARIANT)]
        for path in left:
            if not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)

    def _read(self) -> tuple[dict[str, dict[str, float]], int]:
        """What is kept, and where it ends: a last line that is not whole is cut off."""
        size = os.fstat(self._file).st_size
        if size > LIMIT:
            raise CsuloraError(
                f"{self.path / EVALUATIONS}: has {size} bytes; at most {LIMIT} are read"
            )
        data = os.pread(self._file, size, 0)
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if lines and _parse(lines[0]).get("format") != EVALUATIONS_FORMAT:
            raise CsuloraError(
                f"{self.path / EVALUATIONS}: not kept by this version of csulora (expected "
                f"{EVALUATIONS_FORMAT}); remove it"
            )
        os.ftruncate(self._file, end)
        kept = {}
        for entry in map(_parse, lines[1:]):
            key, metrics = entry.get("key"), entry.get("metrics")
            if isinstance(key, str) and isinstance(metrics, dict) and _are_numbers(metrics):
                kept[key] = {name: float(value) for name, value in metrics.items()}
        return kept, end


def _check_ours(out_dir: Path) -> None:
    """Raise ExistsError unless a sweep may be written there. A link to a folder is one."""
    if not out_dir.exists():
        if os.path.lexists(out_dir):
            raise ExistsError(f"{out_dir}: is a link that leads nowhere")
        return
    if not out_dir.is_dir():
        raise ExistsError(f"{out_dir}: exists and is not a folder")
    with writing(out_dir):
        names = set(os.listdir(out_dir))
    if RESULT in names and _format(out_dir / RESULT) != RESULT_FORMAT:
        raise ExistsError(f"{out_dir / RESULT}: was not written by a sweep; remove it yourself")
    if names and not {RESULT, EVALUATIONS} & names:
        raise ExistsError(f"{out_dir}: a folder that holds no sweep; choose another, or remove it")


def _format(path: Path) -> object:
    try:
        return read_json(path).get("format")
    except CsuloraError:
        return None


def _parse(line: bytes) -> dict[str, Any]:
    """A line that cannot be read counts for nothing: what it told is evaluated again."""
    try:
        entry = load_json(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _are_numbers(metrics: dict[str, Any]) -> bool:
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in metrics.values())
