"""Files and folders that appear whole or not at all, and names that stay inside their folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from csulora.errors import CsuloraError, DiskFullError, ExistsError, UsageError, WriteError
from csulora.files.locks import hold, open_locked, release
from csulora.files.plain import mode_of

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk says
# What is in the temporary folder of an output: its lock, the output to be, the one that it replaces.
_LOCK, _NEW, _OLD = "lock", "new", "old"
# Folders in which a run is at work: they are not made anew, and nothing below them is written to links.
_WORKED_IN: list[Path] = []
# What a killed run leaves beside a folder: its temporary folder, its lock.
_LEFT_BEHIND = re.compile(r"\.(.+)\.csulora-([a-z0-9_]{8}|lock)", re.DOTALL)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed onto it on success and removed on failure.

    The file has the permission bits of the one that it replaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    mode = mode_of(path)
    try:  # from here on, as a signal may come between any two steps
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(temporary, flags, 0o666 if mode is None else 0o600))
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool, durable: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed onto it on success and removed on failure.

    With `overwrite` an existing folder is replaced, otherwise it is an error; a file or a link is never
    replaced. What a killed run left behind is for `recover_folders`. durable: without it no folder is
    fsynced. Raises ExistsError, and CsuloraError where the folder that it stands in has been replaced
    meanwhile, say by a link.
    """
    make_folders(path.parent)
    parent = os.stat(path.parent)
    with _temporary(path) as temporary:
        inner = temporary / _NEW
        inner.mkdir()
        yield inner
        for folder, _, _ in os.walk(inner) if durable else ():
            _sync_folder(folder)
        check_folder(path)
        if path.exists() and not overwrite:
            raise ExistsError(f"{path}: already exists")
        for root in tuple(_WORKED_IN):  # a link may have come before the parent was looked at
            if path.is_relative_to(root):
                check_no_links(root, path.parent)
        if not os.path.samestat(parent, os.stat(path.parent)):
            raise CsuloraError(f"{path.parent}: became another folder while this wrote to it")
        _put_in_place(temporary, path)
        if durable:
            _sync_folder(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    """The new folder where the old one was; on any failure, Ctrl-C too, the old one is put back."""
    old, new = temporary / _OLD, temporary / _NEW
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException as error:
        if not _keeps_old(temporary):
            raise
        try:
            os.rename(old, path)
        except OSError:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CsuloraError(
                f"{path}: cannot be replaced ({reason}); what it held is now {old} and comes back with "
                "the next run for it"
            ) from None
        raise


def _keeps_old(temporary: Path) -> bool:
    """Whether an output was set aside there and nothing has taken its place: maybe its only copy."""
    return os.path.lexists(temporary / _OLD) and os.path.lexists(temporary / _NEW)


def check_no_links(root: Path, folder: Path) -> None:
    """Raise CsuloraError if a link stands where a folder below `root` should be, down to `folder`.

    root is not looked at: it is where the caller said that outputs go.
    """
    for place in (folder, *folder.parents):
        if place == root:
            return
        if place.is_symlink():
            raise CsuloraError(
                f"{place}: is a link; outputs are not written through links, remove it"
            )


def check_folder(path: Path) -> None:
    """Raise ExistsError for what is there and no folder: no output replaces it."""
    if path.is_symlink():
        raise ExistsError(f"{path}: is a link; outputs replace no links, remove it")
    if path.exists() and not path.is_dir():
        raise ExistsError(f"{path}: exists and is not a folder")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A folder beside `path` with a lock in it, which tells a live one from what a kill left behind."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.csulora-", dir=path.parent))
        try:
            file = open_locked(temporary / _LOCK)
            break
        except FileNotFoundError:
            continue  # somebody took it for a leftover in the moment before it was locked
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    try:
        yield temporary
    finally:
        if not _keeps_old(temporary):
            _remove(temporary)
        release(file)


def _remove(temporary: Path) -> None:
    """The lock goes last: without it nobody would know the rest for a leftover."""
    with contextlib.suppress(RecursionError):
        for name in (_NEW, _OLD):
            shutil.rmtree(temporary / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        if os.listdir(temporary) == [_LOCK]:
            (temporary / _LOCK).unlink()
        temporary.rmdir()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the file system says while `target` is being written into one WriteError."""
    try:
        yield
    except OSError as error:
        raise (DiskFullError if error.errno in FULL else WriteError)(
            f"{target}: cannot be written ({error.filename or target}: {error.strerror or error})"
        ) from None


@contextlib.contextmanager
def not_made_anew(path: Path) -> Iterator[None]:
    """While a run works in a folder that is there: if it is taken away, it stays away."""
    _WORKED_IN.append(path)
    try:
        yield
    finally:
        _WORKED_IN.remove(path)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, each of them durable."""
    missing = []
    while not path.is_dir() and path != path.parent:
        if path in _WORKED_IN:
            raise FileNotFoundError(errno.ENOENT, "was removed or renamed", str(path))
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def check_writable(folder: Path) -> None:
    """Raise OSError unless something may be made in a folder."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def check_new_file(path: Path) -> None:
    """Raise UsageError now, not after hours of work, if a file could not be written there."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        check_writable(folder)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written, {folder}: {error.strerror}") from None


def recover_folders(parent: Path, names: Collection[str]) -> None:
    """Undo what killed runs left beside the folders `names` of `parent`; live ones are waited for.

    Half-written folders are removed; a folder that was set aside to be replaced comes back. One pass
    over `parent`, so call it once for many names. What cannot be undone stays, and fails its own folder.
    """
    entries = []
    with contextlib.suppress(OSError), os.scandir(parent) as found_there:
        entries = list(found_there)
    for entry in entries:
        found = _LEFT_BEHIND.fullmatch(entry.name)
        if found is None or found[1] not in names:
            continue
        with contextlib.suppress(OSError):
            if found[2] == _LOCK:
                _recover_lock(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                _recover_folder(Path(entry.path), parent / found[1])


def _recover_lock(lock: Path) -> None:
    if lock.is_file() and not lock.stat().st_size:
        file = open_locked(lock)  # BlockingIOError: in use
        lock.unlink(missing_ok=True)
        release(file)


def _recover_folder(temporary: Path, path: Path) -> None:
    """What `whole_folder` made for `path`, and nothing else that is named alike."""
    present = set(os.listdir(temporary))
    if not present:
        temporary.rmdir()
    if _LOCK not in present or not present <= {_LOCK, _NEW, _OLD}:
        return
    file = os.open(temporary / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        hold(file)
        if _keeps_old(temporary):
            # Between the two renames of whole_folder. Where something else has come meanwhile, this
            # fails, and what was set aside stays.
            os.rename(temporary / _OLD, path)
        _remove(temporary)
    finally:
        release(file)


def check_apart(target: Path, source: Path) -> None:
    """Raise CsuloraError where one of two folders lies inside the other."""
    # `Path.resolve` raises on links in a circle.
    new, origin = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if new.is_relative_to(origin) or origin.is_relative_to(new):
        raise CsuloraError(f"{target}: lies inside the adapter {source} or around it")


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of an entry `name` that `source` (an index, a listing) gives, refused outside `folder`.

    Links are followed only to places inside the folder or to the blob store of a hub cache, where
    every file of a snapshot is a link.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
        raise CsuloraError(f"{source}: entry {name!r} points outside its folder; refused")
    path = folder / name
    if len(parts) == 1 and not os.path.islink(path):
        return path  # lies in the folder, wherever that is
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots"]
    allowed = [root, *(cache / "blobs" for cache in caches)]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CsuloraError(f"{source}: entry {name!r} links outside its folder; refused")
    return path


def _sync_folder(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
