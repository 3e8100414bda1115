"""Single files: read, hashed, written and made durable; malformed ones are one CsuloraError each."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.folders import make_folders


def read_bytes(path: Path) -> bytes:
    """A small file whole."""
    check_regular(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CsuloraError(f"{path}: no such file") from None
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_regular(path: Path) -> None:
    """Refuse what is there but no file: opening a named pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise CsuloraError(f"{path}: not a regular file; refused")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CsuloraError(f"{path}: cannot be read ({error.strerror})") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a small file."""
    with open(path, "wb") as file:
        file.write(data)
        sync(file)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's contents (not its links or owner) and fsync the copy."""
    make_folders(destination.parent)
    try:
        reader = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise CsuloraError(f"{source}: cannot be read ({error.strerror or error})") from None
    with reader, open(destination, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        sync(writer)


def sync(file: Any) -> None:
    """Make what was written to an open file durable."""
    file.flush()
    os.fsync(file.fileno())
