"""Counters of decisions, of this process and of all that share a cache.

Names: corrected, hits, waits, refused (by reason), repaired, zeroed, seconds_digest, seconds_read,
seconds_correct, seconds_write.
"""

from __future__ import annotations


def add(name: str, reason: str = "") -> None:
    """Count one decision."""
    raise NotImplementedError


def seconds(name: str, value: float) -> None:
    """Add to `seconds_<name>`."""
    raise NotImplementedError


def collect() -> dict[tuple[str, str], float]:
    """(name, reason) to value, the sum over all processes that ever shared the cache."""
    raise NotImplementedError
