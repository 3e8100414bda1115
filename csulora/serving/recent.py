"""What a process remembers of the folders and entries that it was asked for last.

Anybody may ask for any number of them. Whatever is forgotten has to be looked at again: nothing is
trusted for not being known.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

from csulora.serving.refused import RefusedError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SIZE = 1 << 14  # things of a kind: more than a server has adapters, some ten megabytes
# Seconds for which what was refused is not looked at again. It may have been refused for what passes by
# itself: no memory, no free descriptor, a file system that was away.
MOMENT = 10.0


class Recent(Generic[K, V]):
    """The values of the `SIZE` things that were set or asked for last. Safe for any number of threads."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, thing: K) -> V | None:
        """Its value, None where there is none any more."""
        with self._lock:
            if thing not in self._values:
                return None
            self._values.move_to_end(thing)
            return self._values[thing]

    def set(self, thing: K, value: V) -> None:
        """Remember a value, in place of that which was least recently used."""
        with self._lock:
            self._values[thing] = value
            self._values.move_to_end(thing)
            while len(self._values) > SIZE:
                self._values.popitem(last=False)

    def forget(self, thing: K) -> None:
        """As if it had never been set."""
        with self._lock:
            self._values.pop(thing, None)


class Refusals(Generic[K, V]):
    """Why things were refused, for a moment and as long as they are the same."""

    def __init__(self) -> None:
        self._found: Recent[K, tuple[V, RefusedError, float]] = Recent()

    def check(self, thing: K, state: V) -> None:
        """Raise the refusal of a thing that has just been refused in this state."""
        before = self._found.get(thing)
        if before is None or before[0] != state or time.monotonic() - before[2] > MOMENT:
            return
        raise before[1].plain()

    @contextlib.contextmanager
    def remembering(self, thing: K, state: V, reasons: Collection[str]) -> Iterator[None]:
        """Around what may refuse a thing: `check` before, and `keep` of what is refused for `reasons`."""
        self.check(thing, state)
        try:
            yield
        except RefusedError as error:
            if error.reason in reasons:
                self.keep(thing, state, error)
            raise

    def keep(self, thing: K, state: V, error: RefusedError) -> None:
        """Remember a refusal; without its traceback, which may hold an adapter."""
        self._found.set(thing, (state, error.plain(), time.monotonic()))
