"""The cache of corrected adapters: one folder an entry by its key, and a record of each beside it.

CACHE/<key>/ holds the weights, the configuration and the report of a corrected adapter and nothing else,
CACHE/<key>.json what it was made of and the digests of what was written. The record comes last and goes
first: a folder without one is what a kill left, and counts for nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csulora.adapter import OWN, Source
from csulora.errors import CsuloraError
from csulora.files.folders import make_folders, recover_folders
from csulora.files.json import json_bytes, read_json
from csulora.files.locks import locked, open_locked
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import sha256_file, write_bytes
from csulora.output import WEIGHTS
from csulora.serving import counters
from csulora.serving.identity import Identity, is_settled, of_folder
from csulora.serving.leases import Leases, shared_lock

FORMAT = "csulora_cache/1"
OWN_FOLDERS = ("leases", "counters")
_KEY = re.compile(r"[0-9a-f]{64}")
_LEFT = re.compile(r"\.([0-9a-f]{64})(\.json)?\.(csulora-|tmp-).*")
_TOUCH = 60.0  # seconds between two notes of an entry's use
_LOCK = "lock"


@dataclass(frozen=True)
class Record:
    """What the cache knows of an entry.

    policy: digest of the settings that it was made with, or of the key that signed it.
    source: the folder that it was made of, as it was then, with the digests of its two files.
    sha256, config_sha256: of the entry's own two files.
    how: "corrected", "signed" or "recomputed".
    """

    policy: str
    source: str
    source_sha256: str
    source_config_sha256: str
    sha256: str
    config_sha256: str
    rank: int
    form: str
    how: str

    @property
    def source_digests(self) -> tuple[str, str]:
        """Of the weights and the configuration that it was made of."""
        return self.source_sha256, self.source_config_sha256

    @property
    def output_digests(self) -> tuple[str, str]:
        """Of its own weights and configuration."""
        return self.sha256, self.config_sha256

    @classmethod
    def of(cls, source: Source, output: dict[str, str], **rest: Any) -> Record:
        return cls(
            source=str(source.folder),
            source_sha256=source.sha256,
            source_config_sha256=source.config_sha256,
            sha256=output["sha256"],
            config_sha256=output["config_sha256"],
            **rest,
        )


class Cache:
    """The cache in one process. Safe for any number of threads; other processes may share the folder."""

    def __init__(self, root: Path, limit: int | None) -> None:
        self.root, self._limit = root, limit
        self._leases = Leases(root / "leases")
        self._known: dict[str, Record] = {}  # every entry that this process has seen sound
        self._sound: dict[str, Identity] = {}  # files whose digests are verified
        self._touched: dict[str, float] = {}

    def open(self) -> None:
        """Make or check the folder, remove what killed processes left in it, and count in it from now on.

        Raises CsuloraError.
        """
        try:
            make_folders(self.root.parent)
            self._check_root()
            for name in OWN_FOLDERS:
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
            # Servers start many processes at once.
            with shared_lock(self.root / _LOCK, alone=True):
                counters.share(self.root / "counters")
                self._sweep()
            self.evict()
        except OSError as error:
            raise CsuloraError(
                f"cache: {self.root}: cannot be used ({error.strerror or error})"
            ) from None

    def key_at(self, path: str | os.PathLike[str]) -> str | None:
        """The key of the entry whose folder a path is by its name, None for all others."""
        place = Path(os.path.abspath(path))
        return place.name if place.parent == self.root and _KEY.fullmatch(place.name) else None

    def folder(self, key: str) -> Path:
        return self.root / key

    def remembered(self, key: str) -> Record | None:
        """The record of an entry that this process has seen sound, or else that which is there, whatever
        has become of the entry."""
        return self._known.get(key) or self._read_record(key)

    def unchanged(self, key: str) -> bool:
        """Whether an entry that was verified has the same files: three stats."""
        found = self._sound.get(key)
        if found is None or of_folder(self.folder(key)) != found:
            return False
        self._touch(key)
        return True

    def find(self, key: str) -> Record | None:
        """The record of a sound entry, held from now on as long as this process lives, None without one.

        Its digests are computed once a process, and again where its files are others.
        """
        if self.unchanged(key):
            return self._known[key]
        self.hold(key)
        record = self._read_record(key)
        if record is None or not self._verify(key, record):
            return None
        self._known[key] = record
        self._touch(key)
        return record

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """While an entry is looked for once more, and made: one at a time over all processes."""
        self.hold(key)
        with locked(self._record(key)):
            yield

    def put(self, key: str, make: Callable[[Path], Record]) -> Record:
        """The entry that `make` writes into the folder it is given; to be called within `making`.

        Whatever was there is removed before. Nothing stays where `make` raises.
        """
        self._discard(key)
        try:
            record = make(self.folder(key))
            _backdate(self.folder(key))
            data = json_bytes({"format": FORMAT, "key": key, **asdict(record)})
            temporary = self.root / f".{key}.json.tmp-{os.getpid()}"
            write_bytes(temporary, data, durable=False)
            os.replace(temporary, self._record(key))
        except BaseException:
            with contextlib.suppress(OSError):
                self._discard(key)
            raise
        self._known[key] = record
        found = of_folder(self.folder(key))
        if found is not None:
            self._sound[key] = found
        self.evict()
        return record

    def hold(self, key: str) -> None:
        """Keep an entry from being removed as long as this process lives; it need not be there yet."""
        self._check_root()
        with shared_lock(self.root / _LOCK, alone=False):
            self._leases.take(key)

    def release(self, key: str) -> None:
        """Let it be removed, from this process's side."""
        with shared_lock(self.root / _LOCK, alone=False):
            self._leases.give(key)

    def drop(self, key: str) -> None:
        """Remove an entry that is not to be used, and forget what it was made of."""
        with self.making(key):
            self._discard(key)
            self._known.pop(key, None)

    def evict(self) -> None:
        """Remove the least recently used entries that nobody holds until the rest is within the limit."""
        if self._limit is None:
            return
        with shared_lock(self.root / _LOCK, alone=True):
            entries = sorted(self._entries())
            total = sum(size for _, size, _ in entries)
            if total <= self._limit:
                return
            held = self._leases.held()
            for _, size, key in entries:
                if total <= self._limit:
                    return
                if key not in held:
                    with contextlib.suppress(
                        OSError
                    ):  # no reason to refuse an adapter that is there
                        self._discard(key)
                        total -= size

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """When it was last used, bytes and key of each entry."""
        with os.scandir(self.root) as found:
            names = [entry.name for entry in found if entry.name.endswith(".json")]
        for name in names:
            key = name.removesuffix(".json")
            with contextlib.suppress(OSError):
                used = os.lstat(self._record(key))
                sizes = [
                    e.stat(follow_symlinks=False).st_size for e in os.scandir(self.folder(key))
                ]
                yield used.st_mtime_ns, used.st_size + sum(sizes), key

    def _check_root(self) -> None:
        """Raise CsuloraError unless the folder is one of this user, which nobody else may enter."""
        try:
            found = os.lstat(self.root)
        except FileNotFoundError:  # at the start, or taken away since
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root, 0o700)
                self.root.chmod(0o700)
            found = os.lstat(self.root)
        if not stat.S_ISDIR(found.st_mode):
            raise CsuloraError(f"cache: {self.root}: is a link or no folder")
        if found.st_uid != os.geteuid():
            raise CsuloraError(
                f"cache: {self.root}: belongs to user {found.st_uid}, this is user {os.geteuid()}"
            )
        if found.st_mode & 0o777 != 0o700:
            raise CsuloraError(
                f"cache: {self.root}: others may enter it, its mode is "
                f"{stat.S_IMODE(found.st_mode):04o}; 0700 is needed"
            )

    def _read_record(self, key: str) -> Record | None:
        try:
            found = read_json(self._record(key))
            if (found.pop("format"), found.pop("key")) != (FORMAT, key):
                return None
            return Record(**found)
        except (CsuloraError, KeyError, TypeError):
            return None

    def _verify(self, key: str, record: Record) -> bool:
        """Whether the folder holds what was written and nothing else."""
        folder = self.folder(key)
        before = of_folder(folder)
        try:
            if before is None or not {*os.listdir(folder)} <= OWN:
                return False
            found = sha256_file(folder / CONFIG, CONFIG_LIMIT), sha256_file(folder / WEIGHTS)
        except (CsuloraError, OSError):
            return False
        if found != (record.config_sha256, record.sha256) or of_folder(folder) != before:
            return False
        if before is not None and is_settled(before):
            self._sound[key] = before
        return True

    def _touch(self, key: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH) >= _TOUCH:
            self._touched[key] = now
            with contextlib.suppress(OSError):
                os.utime(self._record(key))

    def _record(self, key: str) -> Path:
        return self.root / f"{key}.json"

    def _discard(self, key: str) -> None:
        self._sound.pop(key, None)
        self._record(key).unlink(missing_ok=True)
        _remove(self.folder(key))

    def _sweep(self) -> None:
        """Undo what killed processes left, but for keys at which somebody is at work."""
        names = os.listdir(self.root)
        there = {name for name in names if _KEY.fullmatch(name)}
        records = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        recorded = {key for key in records if _KEY.fullmatch(key)}
        left = {found[1] for name in names if (found := _LEFT.fullmatch(name))}
        for key in (there ^ recorded) | left:
            lock = self.root / f".{key}.json.csulora-lock"
            with contextlib.suppress(BlockingIOError):
                file = open_locked(lock)
                try:
                    recover_folders(self.root, {key})
                    for name in names:
                        if name.startswith(f".{key}.json.tmp-"):
                            (self.root / name).unlink(missing_ok=True)
                    if not (self._record(key).exists() and self.folder(key).exists()):
                        self._discard(key)
                finally:
                    lock.unlink(missing_ok=True)
                    os.close(file)


def _backdate(folder: Path) -> None:
    """Set the times of what was just written a second back, so that the next change of it shows.

    Two changes within a tick of the kernel's clock have the same time.
    """
    for path in (folder / WEIGHTS, folder / CONFIG, folder):
        found = os.stat(path)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - 10**9))


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif os.path.lexists(folder):
        shutil.rmtree(folder)
