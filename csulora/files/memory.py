"""Memory for what a file says that it holds: had at once, or refused in one line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from csulora.errors import CsuloraError

# Below this it is not worth asking; the system tells in a fraction of a millisecond.
SMALL = 64 << 20  # bytes
_SYSTEM = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def room(path: Path, size: int, *, pin_memory: bool = False) -> Tensor:
    """Uninitialised bytes for the content of the file `path`; CsuloraError if they cannot be had.

    The system promises more than it has and ends the process that takes it, so it is asked first.
    """
    free = _free() if size > SMALL else None
    if free is None or size <= free:
        with contextlib.suppress(RuntimeError, MemoryError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    raise CsuloraError(f"{path}: {size} bytes to read, and not as much memory is free")


def _free() -> int | None:
    """Bytes of memory that can be taken; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = _SYSTEM.read_text()
        found.append(1024 * int(text.partition("MemAvailable:")[2].split()[0]))
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max", or none
            found.append(int(limit.read_text()))
    return min(found, default=None)
