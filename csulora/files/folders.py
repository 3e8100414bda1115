"""Files and folders that appear whole or not at all, and names that stay inside their folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from csulora.errors import CsuloraError, DiskFullError, ExistsError
from csulora.files.locks import locked

# What a killed run leaves beside a folder: its temporary folder, its lock.
_LEFT_BEHIND = re.compile(r"\.(.+)\.(?:tmp-[a-z0-9_]{8}|lock)", re.DOTALL)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed onto it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed onto it on success and removed on failure.

    With `overwrite` an existing folder is replaced, otherwise it is an error. What a killed run left
    behind is for `recover_folders`.
    """
    make_folders(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        inner = temporary / "new"
        inner.mkdir()
        yield inner
        for folder in [inner, *(p for p in inner.rglob("*") if p.is_dir())]:
            _sync_folder(folder)
        if path.exists():
            if not overwrite:
                raise ExistsError(f"{path}: already exists")
            os.rename(path, temporary / "old")
        try:
            os.rename(inner, path)
        except OSError:
            if (temporary / "old").exists():
                os.rename(temporary / "old", path)
            raise
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the file system says while `target` is being written into one CsuloraError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFullError if full else CsuloraError)(
            f"{target}: cannot be written ({error.filename or target}: {error.strerror or error})"
        ) from None


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, each of them durable."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def recover_folders(parent: Path, names: Collection[str]) -> None:
    """Undo what killed runs left beside the folders `names` of `parent`; live ones are waited for.

    One pass over `parent`, so call it once for many names.
    """
    if not parent.is_dir():
        return
    left = (_LEFT_BEHIND.fullmatch(entry.name) for entry in list(os.scandir(parent)))
    for name in dict.fromkeys(match[1] for match in left if match is not None):
        if name in names:
            with locked(parent / name):
                recover_folder(parent / name)


def recover_folder(path: Path) -> None:
    """`recover_folders` for one folder whose lock is held.

    Half-written folders are removed; a folder that was set aside to be replaced comes back.
    """
    for entry in list(os.scandir(path.parent)):
        found = _LEFT_BEHIND.fullmatch(entry.name)
        if found is None or found[1] != path.name or not entry.is_dir(follow_symlinks=False):
            continue
        old = Path(entry.path) / "old"
        if old.exists() and not path.exists():
            os.rename(old, path)  # killed between the two renames of whole_folder
        shutil.rmtree(entry.path, ignore_errors=True)


def check_apart(target: Path, source: Path) -> None:
    """Raise CsuloraError where one of two folders lies inside the other."""
    new, origin = target.resolve(), source.resolve()
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
    target, root = path.resolve(), folder.resolve()
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots"]
    allowed = [root, *(cache / "blobs" for cache in caches)]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CsuloraError(f"{source}: entry {name!r} links outside its folder; refused")
    return path


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
