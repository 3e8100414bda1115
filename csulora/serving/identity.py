"""What tells, for a few stats, that files are still those that were read."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from csulora.files.peft_config import FILE as CONFIG
from csulora.output import REPORT, SIGNATURE, WEIGHTS

Identity = tuple[int, ...]

# A file that changes twice within a tick of the kernel's clock may keep its times.
_TICK_NS = 50_000_000
_NOTHING = (0, 0, 0, 0, 0)  # numbers of a file that is not there


def of_adapter(folder: Path) -> Identity | None:
    """Of weights and configuration, through links; None where one is missing."""
    try:
        return _numbers(os.stat(folder / WEIGHTS)) + _numbers(os.stat(folder / CONFIG))
    except OSError:
        return None


def of_signed(folder: Path) -> Identity | None:
    """`of_adapter` with the signature, None where there is none."""
    found, signature = of_adapter(folder), _of_file(folder / SIGNATURE)
    return found + signature if found is not None and signature else None


def of_proof(folder: Path) -> Identity | None:
    """`of_adapter` with what may prove it: report and signature, if they are there."""
    found = of_adapter(folder)
    if found is None:
        return None
    report, signature = _of_file(folder / REPORT), _of_file(folder / SIGNATURE)
    return found + (report or _NOTHING) + (signature or _NOTHING)


def of_folder(folder: Path) -> Identity | None:
    """Of a folder and of its two files, None if one is missing or a link.

    The times of a folder change with the names in it.
    """
    try:
        found = [os.lstat(path) for path in (folder, folder / WEIGHTS, folder / CONFIG)]
    except OSError:
        return None
    kinds = [stat.S_IFMT(one.st_mode) for one in found]
    if kinds != [stat.S_IFDIR, stat.S_IFREG, stat.S_IFREG]:
        return None
    return tuple(number for one in found for number in _numbers(one))


def is_settled(found: Identity) -> bool:
    """Whether another change would show: the last one is not of this very moment."""
    now = time.time_ns()
    return all(abs(now - modified) > _TICK_NS for modified in found[3::5])


def _of_file(path: Path) -> Identity:
    """Of one file, empty where there is none."""
    try:
        return _numbers(os.stat(path))
    except OSError:
        return ()


def _numbers(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
