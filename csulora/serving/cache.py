"""The cache of corrected adapters: one folder an entry by its key, and a record of each beside it.

CACHE/<key>/ holds the weights, the configuration and the report of a corrected adapter and nothing else,
CACHE/<key>.json what it was made of and the digests of what was written. The record comes last and goes
first: a folder without one is what a kill left, and counts for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from csulora.adapter import OWN
from csulora.errors import CsuloraError, DiskFullError, WriteError
from csulora.files.folders import FULL, check_writable, make_folders, recover_folders, writing
from csulora.files.locks import locked, open_locked, release
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import sha256_file, write_bytes
from csulora.output import WEIGHTS
from csulora.serving import counters
from csulora.serving.identity import Identity, is_settled, of_folder
from csulora.serving.leases import Leases, shared_lock
from csulora.serving.recent import Recent
from csulora.serving.record import FILE_MODE, FOLDER_MODE, Record, read_record
from csulora.serving.refused import CacheError

_KEY = re.compile(r"[0-9a-f]{64}")
_LEFT = re.compile(r"\.([0-9a-f]{64})(\.json)?\.(csulora-|tmp-).*")
_TOUCH = 60.0  # seconds between two notes of an entry's use
_LOCK = "lock"
_LOG = logging.getLogger("csulora.serving")


class Cache:
    """The cache in one process. Safe for any number of threads; other processes may share the folder."""

    def __init__(self, root: Path, limit: int | None) -> None:
        self.root, self._limit = root, limit
        self._leases = Leases(root / "leases")
        self._known: Recent[str, Record] = Recent()  # of entries that this process has seen sound
        self._sound: Recent[str, Identity] = Recent()  # files whose digests are verified
        self._touched: Recent[str, float] = Recent()
        self._sizes: dict[str, int] = {}  # of all entries, at the last look

    def open(self) -> None:
        """Make or check the folder, remove what killed processes left in it, and count in it from now on.

        A full disk is no reason not to start: what is there can be served. Raises CacheError.
        """
        try:
            make_folders(self.root.parent)
            self._check_root()
            # Servers start many processes at once.
            with self._alone():
                self._sweep()
            self.evict()  # before anything is written
            with self._alone():
                counters.share(self.root / "counters")
        except OSError as error:
            if error.errno not in FULL:
                raise self._unusable(error) from None
            _LOG.warning("csulora: %s", self._unusable(error))

    def check(self) -> None:
        """What `open` checks of the folder; nothing is made or changed. Raises CacheError."""
        with self._usable():
            there = _nearest(self.root)
            if there == self.root:
                self._check_private(os.lstat(there))
            check_writable(there)

    def key_at(self, path: str | os.PathLike[str]) -> str | None:
        """The key of the entry whose folder a path is by its name, None for all others."""
        place = Path(os.path.abspath(path))
        return place.name if place.parent == self.root and _KEY.fullmatch(place.name) else None

    def folder(self, key: str) -> Path:
        return self.root / key

    def remembered(self, key: str) -> Record | None:
        """The record of an entry that this process has seen sound, or else that which is there, whatever
        has become of the entry."""
        return self._known.get(key) or read_record(self._record(key), key)

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
        record = self._known.get(key) if self.unchanged(key) else None
        if record is not None:
            return record
        if not os.path.lexists(self._record(key)):
            return None  # and nothing to hold
        self.hold(key)
        record = read_record(self._record(key), key)
        if record is None or not self._verify(key, record):
            return None
        self._known.set(key, record)
        self._touch(key)
        return record

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """While an entry is looked for once more, and made: one at a time over all processes.

        It is held from now on, unless it is not there in the end. Raises CacheError, also in place of
        what the file system says meanwhile.
        """
        with self._usable():
            self._check_root()
            with locked(self._record(key)):
                self.hold(key)
                try:
                    yield
                finally:
                    if not os.path.lexists(self._record(key)):
                        self.release(key)

    def put(self, key: str, make: Callable[[Path], Record]) -> Record:
        """The entry that `make` writes into the folder it is given; to be called within `making`.

        Whatever was there is removed before. Nothing stays where `make` raises. Raises CacheError where
        the cache cannot take it.
        """
        with self._usable():
            try:
                record = self._made(key, make)
            except DiskFullError:
                if not self.evict():
                    raise
                record = self._made(key, make)
        self._known.set(key, record)
        found = of_folder(self.folder(key))
        if found is not None:
            self._sound.set(key, found)
        self.evict()
        return record

    def hold(self, key: str) -> None:
        """Keep an entry from being removed as long as this process lives; it need not be there yet.

        Where that cannot be noted, the entry may go and have to be made again. Raises CacheError for a
        folder that is not to be used.
        """
        with self._usable():
            self._check_root()
        try:
            with shared_lock(self.root / _LOCK, alone=False):
                self._leases.take(key)
        except OSError as error:
            _LOG.warning("csulora: %s", self._unusable(error))

    def release(self, key: str) -> None:
        """Let it be removed, from this process's side."""
        try:
            with shared_lock(self.root / _LOCK, alone=False):
                self._leases.give(key)
        except OSError as error:
            _LOG.warning("csulora: %s", self._unusable(error))

    def drop(self, key: str) -> None:
        """Remove an entry that is not to be used, and forget what it was made of. Raises CacheError."""
        with self.making(key):
            self._discard(key)
            self._known.forget(key)

    def evict(self) -> bool:
        """Remove the least recently used entries that nobody holds until the rest is within the limit.

        Whether any went; what cannot be removed stays, and is no reason to refuse what is there.
        """
        if self._limit is None:
            return False
        try:
            with self._alone():
                return self._evict(self._limit)
        except OSError as error:
            _LOG.warning("csulora: %s", self._unusable(error))
            return False

    def _evict(self, limit: int) -> bool:
        with os.scandir(self.root) as found:
            keys = [e.name.removesuffix(".json") for e in found if e.name.endswith(".json")]
        # Entries do not change: each is looked at once, however many come after it.
        known, self._sizes = self._sizes, {}
        for key in keys:
            with contextlib.suppress(OSError):
                self._sizes[key] = known.get(key) or self._size(key)
        total = before = sum(self._sizes.values())
        if total <= limit:
            return False
        held = self._leases.held()
        for key in sorted(self._sizes.keys() - held, key=self._used):
            if total <= limit:
                break
            with contextlib.suppress(OSError):
                self._discard(key)
                total -= self._sizes.pop(key)
        return total < before

    def _size(self, key: str) -> int:
        """Bytes of an entry with its record. Raises OSError where there is none."""
        with os.scandir(self.folder(key)) as found:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in found]
        return sum(sizes) + os.lstat(self._record(key)).st_size

    def _used(self, key: str) -> int:
        """When an entry was last used, which its record tells."""
        try:
            return os.lstat(self._record(key)).st_mtime_ns
        except OSError:
            return 0

    def _made(self, key: str, make: Callable[[Path], Record]) -> Record:
        self._discard(key)
        folder, temporary = self.folder(key), self.root / f".{key}.json.tmp-{os.getpid()}"
        try:
            with writing(folder):
                record = make(folder)
                _settle(folder)
                write_bytes(temporary, record.written(key), mode=FILE_MODE, durable=False)
                os.replace(temporary, self._record(key))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
                self._discard(key)
            raise
        return record

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return shared_lock(self.root / _LOCK, alone=True)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Turn what the file system says of the cache into one CacheError."""
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from None
        except WriteError as error:
            raise CacheError(f"cache: {error}") from None

    def _unusable(self, error: OSError) -> CacheError:
        return CacheError(f"cache: {self.root}: cannot be used ({error.strerror or error})")

    def _check_root(self) -> None:
        """Raise CacheError unless the folder is one of this user, which nobody else may enter."""
        try:
            found = os.lstat(self.root)
        except FileNotFoundError:  # at the start, or taken away since
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root, 0o700)
                self.root.chmod(0o700)
            found = os.lstat(self.root)
        self._check_private(found)

    def _check_private(self, found: os.stat_result) -> None:
        if not stat.S_ISDIR(found.st_mode):
            raise CacheError(f"cache: {self.root}: is a link or no folder")
        if found.st_uid != os.geteuid():
            raise CacheError(
                f"cache: {self.root}: belongs to user {found.st_uid}, this is user {os.geteuid()}"
            )
        if found.st_mode & 0o777 != 0o700:
            raise CacheError(
                f"cache: {self.root}: others may enter it, its mode is "
                f"{stat.S_IMODE(found.st_mode):04o}; 0700 is needed. Or name a folder in it that is not "
                "there yet: it is made private"
            )

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
            self._sound.set(key, before)
        return True

    def _touch(self, key: str) -> None:
        now = time.monotonic()
        before = self._touched.get(key)
        if before is None or now - before >= _TOUCH:
            self._touched.set(key, now)
            with contextlib.suppress(OSError):
                os.utime(self._record(key))

    def _record(self, key: str) -> Path:
        return self.root / f"{key}.json"

    def _discard(self, key: str) -> None:
        self._sound.forget(key)
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
            with contextlib.suppress(
                OSError
            ):  # held, or it cannot be healed and counts for nothing
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
                    release(file)


def _settle(folder: Path) -> None:
    """Keep a new entry to its user, and set its times a second back, so that the next change shows.

    Two changes within a tick of the kernel's clock have the same time.
    """
    folder.chmod(FOLDER_MODE)
    for path in (folder / WEIGHTS, folder / CONFIG, folder):
        found = os.stat(path)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - 10**9))


def _nearest(path: Path) -> Path:
    """The first that is there, of a path and those above it. Raises OSError for what cannot be."""
    while True:
        try:
            os.lstat(path)
            return path
        except FileNotFoundError:
            path = path.parent


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif os.path.lexists(folder):
        shutil.rmtree(folder)
