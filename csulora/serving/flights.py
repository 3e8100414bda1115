"""One thread at a time for each thing, and a few for all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator


class Flights:
    """A lock for each of any number of things, kept only while somebody has or wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def of(self, thing: Hashable) -> Iterator[bool]:
        """Hold the lock of a thing; yields whether somebody else had or wanted it before."""
        with self._lock:
            lock, users = self._flights.get(thing, (threading.Lock(), 0))
            self._flights[thing] = lock, users + 1
        try:
            with lock:
                yield users > 0
        finally:
            with self._lock:
                lock, users = self._flights.pop(thing)
                if users > 1:
                    self._flights[thing] = lock, users - 1
