"""What a serving stack asks of every adapter: may it be served, and from which folder."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from csulora.adapter import LoraAdapter
from csulora.errors import CsuloraError
from csulora.serving import counters
from csulora.serving.audit import Audit
from csulora.serving.cache import Cache
from csulora.serving.config import ServingConfig, from_environment
from csulora.serving.entries import Entries, Entry
from csulora.serving.flights import Flights
from csulora.serving.names import find_adapter
from csulora.serving.observer import Observer
from csulora.serving.recent import Recent
from csulora.serving.record import shortened
from csulora.serving.refused import RefusedError, told
from csulora.serving.sources import Facts
from csulora.subspace import SafetySubspace
from csulora.text import one_line

__all__ = ["Admitted", "Guard", "How", "RefusedError", "guard", "refusal_text"]

How = Literal["corrected", "hit", "waited", "signed", "recomputed", "repaired", "raw"]
AT_ONCE = 2  # adapters in memory at a time: each takes several times its bytes
_COUNTED = {"hit": "hits", "waited": "waits"}


def refusal_text(name: str, error: CsuloraError) -> str:
    """What a client is told, on one line."""
    return one_line(f"csulora refused {name}: {error}")


@dataclass(frozen=True)
class Admitted:
    """An adapter that may be served.

    path: the folder to serve it from. key: of the cache entry that this is, None for a raw folder.
    rank: the largest of its modules, 0 where it was not looked at. form: "exact" or "same", empty where
    it is not known.
    seconds: what "read" (with the source's digests), "digest" (of an entry that was there), "correct" and
    "write" took, where they were done.
    warnings: what the report of its correction warns of.
    """

    path: Path
    key: str | None
    rank: int
    form: str
    how: How
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Guard:
    """Decides for one process. All its methods may be called from any number of threads at once.

    at_once: how many adapters are read and corrected side by side. cache: in place of that of the
    configuration.
    """

    def __init__(
        self, config: ServingConfig, *, at_once: int = AT_ONCE, cache: Cache | None = None
    ) -> None:
        self.config = config
        self.cache = cache or Cache(config.cache, config.cache_bytes)
        self._audit = Audit(config.audit)
        self._flights = Flights()
        self._slots = threading.BoundedSemaphore(at_once)
        self._last: Recent[Path, str] = (
            Recent()
        )  # key of what was admitted last for each raw folder

    def open(self, subspace: SafetySubspace | None = None) -> None:
        """Load the subspace, check keys and the cache's folder, and heal what a kill left in that.

        subspace: that of the configuration, where it is in memory already.

        Raises CsuloraError; the stack must not start then.
        """
        if self.config.mode == "off":
            return
        self._audit.check()
        self._check_keys()
        self.cache.open()
        self.subspace = subspace or SafetySubspace.load(self.config.subspace)
        self._entries = Entries(self.config, self.subspace, self.cache)
        self._observer = Observer(
            self.config, self.subspace, self._entries.sources, self._audit, self._slots
        )

    def check_start(self) -> None:
        """What `open` checks of audit log, keys and the cache's folder; nothing is made or changed.

        Raises CsuloraError where `open` would.
        """
        self._audit.check(make=False)
        self._check_keys()
        self.cache.check()

    def _check_keys(self) -> None:
        if self.config.trusted_keys:
            # Needs a package of the extra "serve".
            from csulora.serving.signature import check_trusted

            check_trusted(self.config.trusted_keys)

    @property
    def protects(self) -> bool:
        """Whether nothing uncorrected is served."""
        return self.config.mode in ("correct", "require")

    def find(self, name: str) -> Path | None:
        """The adapter folder that a request's name stands for in the configured folders, None if unknown.

        Raises RefusedError for a name that leaves them.
        """
        with self._refusals(name, None):
            return find_adapter(self.config.folders, name)

    def admit(
        self, folder: str | os.PathLike[str], name: str, *, max_rank: int | None = None
    ) -> Admitted:
        """The folder to serve in place of a local adapter folder; it may take as long as a correction.

        name: what the adapter is called in logs. max_rank: the largest rank that the stack takes, if it
        tells; otherwise that of the configuration counts.

        In the modes "correct" and "require" the result is always an entry of the cache. Raises
        RefusedError, and nothing else, for an adapter that is not served.
        """
        given = Path(folder)
        if not self.protects:
            if self.config.mode == "observe":
                self._observer.look(given, name)
            return Admitted(given, None, 0, "", "raw")
        limit = self._limit(max_rank)
        with self._refusals(name, given):
            if self.cache.key_at(given) is not None:
                return self._own(given, name, limit)
            return self._admit(Path(os.path.realpath(given)), name, limit)

    def recall(
        self, folder: str | os.PathLike[str], name: str, *, max_rank: int | None = None
    ) -> Admitted | None:
        """What `admit` gives where folder and entry are known; None where it has to read or make one.

        None for an entry of the cache, too, and in the modes that serve raw adapters. Raises as `admit`.
        """
        if not self.protects or self.cache.key_at(folder) is not None:
            return None
        with self._refusals(name, Path(folder)):
            return self._recalled(Path(os.path.realpath(folder)), name, self._limit(max_rank))

    def admit_tensors(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        name: str,
        *,
        max_rank: int | None = None,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """What to serve in place of an adapter that came without a folder: tensors and configuration.

        tensors, values: as in `LoraAdapter.from_tensors`. name, max_rank: as in `admit`.

        Raises RefusedError, and nothing else, for an adapter that is not served; in mode "require" for
        every one, since nothing can be proven of it.
        """
        if not self.protects:
            if self.config.mode == "observe":
                self._observer.look_at_tensors(tensors, values, name)
            return tensors, values
        limit = self._limit(max_rank)
        with self._refusals(name, None):
            with self._slots:
                adapter = LoraAdapter.from_tensors(tensors, values, pass_through=True)
                found, report, method, rank = self._entries.in_memory(adapter, limit)
            counters.add("corrected")
            warnings = shortened(report.warnings)
            self._audit.line(
                "corrected", name, settings=method.to_dict(), rank=rank, warnings=warnings
            )
            return found.tensors(), found.written_config()

    def check(self, path: str | os.PathLike[str], name: str) -> None:
        """For every request: that a folder which `admit` gave is still what it was, for a few stats.

        A damaged entry is made anew from its source where that is still the same. Raises RefusedError,
        also for a folder that is no entry of the cache. In mode "observe" a raw folder whose files have
        changed is looked at again.
        """
        if not self.protects:
            if self.config.mode == "observe":
                self._observer.look_again(Path(path), name)
            return
        key = self.cache.key_at(path)
        if key is None or not self._entries.unchanged(key):
            with self._refusals(name, Path(path)):
                self._sound(key, name)

    def again(self, path: str | os.PathLike[str], name: str) -> Path:
        """Where the sound weights of an adapter lie that is read once more.

        A raw folder gives its corrected form, the last one known where it cannot be had anew. Raises
        RefusedError, and nothing else, where no sound weights can be had: a stack that must not raise
        then serves zeros, and says so by `zeroed`.
        """
        given = Path(path)
        if not self.protects:
            return given
        try:
            if self.cache.key_at(given) is None:
                return self.admit(given, name).path
            self.check(given, name)
            return given
        except RefusedError:
            with contextlib.suppress(
                RefusedError, ValueError
            ):  # a path with a NUL resolves to none
                last = self._last.get(Path(os.path.realpath(given)))
                if last is not None:
                    self.check(self.cache.folder(last), name)
                    return self.cache.folder(last)
            raise

    def zeroed(self, path: str | os.PathLike[str], name: str, error: Exception) -> None:
        """Count and log that zeros stand in for an adapter that could not be read again."""
        counters.add("zeroed")
        self._audit.line("zeroed", name, folder=path, **told(error))

    def restored(self, path: str | os.PathLike[str], name: str) -> None:
        """Log that such an adapter has been read after all."""
        self._audit.line("restored", name, folder=path)

    def _limit(self, max_rank: int | None) -> int | None:
        """The largest rank that counts: the stack's, or else that of the configuration."""
        return self.config.max_lora_rank if max_rank is None else max_rank

    def _admit(self, folder: Path, name: str, limit: int | None) -> Admitted:
        """`admit` of a folder that is none of the cache's, in the modes that protect."""
        known = self._recalled(folder, name, limit)
        if known is not None:
            return known
        with self._flights.of(folder) as waited, self._slots:
            return self._read(folder, name, limit, "waited" if waited else "hit")

    def _recalled(self, folder: Path, name: str, limit: int | None) -> Admitted | None:
        """`_admit` where nothing has to be read or made for it."""
        if folder.is_relative_to(os.path.realpath(self.cache.root)):
            raise RefusedError("outside", "lies in csulora's cache and is no entry of it")
        facts = self._entries.sources.known(folder)
        found = None if facts is None else self._entries.of(facts, limit)
        if facts is None or found is None:
            return None
        return self._decided(facts, found, "hit", name)

    def _read(self, folder: Path, name: str, limit: int | None, how: How) -> Admitted:
        """`_admit`, alone with the folder."""
        facts, adapter, seconds = self._entries.sources.known(folder), None, {}
        begin = time.perf_counter()
        if facts is None:
            facts, adapter = self._entries.sources.read(folder)
            seconds["read"] = time.perf_counter() - begin
        begin = time.perf_counter()
        found = self._entries.of(facts, limit)
        seconds["digest"] = time.perf_counter() - begin
        if found is None:
            found, how = self._entries.make(facts, adapter, limit), "waited"
        return self._decided(facts, found, how, name, seconds)

    def _decided(
        self,
        facts: Facts,
        found: Entry,
        how: How,
        name: str,
        seconds: dict[str, float] | None = None,
    ) -> Admitted:
        """The result, logged and counted."""
        seconds = {**(seconds or {}), **found.seconds}
        if found.made:
            how = found.made  # type: ignore[assignment]
        self._last.set(facts.source.folder, found.key)
        counters.add(_COUNTED.get(how, how), seconds=seconds)
        self._audit.line(
            how,
            name,
            folder=facts.source.folder,
            key=found.key,
            source=facts.source.sha256,
            settings=self.config.method.to_dict() | {"form": found.record.form},
            rank=found.record.rank,
            seconds={step: round(value, 6) for step, value in seconds.items()},
            warnings=found.record.warnings,
        )
        return self._of_entry(found, how, seconds)

    def _of_entry(self, found: Entry, how: How, seconds: dict[str, float]) -> Admitted:
        path, record = self.cache.folder(found.key), found.record
        return Admitted(path, found.key, record.rank, record.form, how, seconds, record.warnings)

    def _own(self, given: Path, name: str, limit: int | None) -> Admitted:
        """An entry of the cache that the stack names by its path."""
        found = self._sound(self.cache.key_at(given), name)
        record = found.record
        if limit is not None and record.rank > limit:
            raise RefusedError("rank", f"its rank is {record.rank}, and the server takes {limit}")
        counters.add("hits")
        details = {"rank": record.rank, "form": record.form, "warnings": record.warnings}
        self._audit.line("hit", name, key=found.key, **details)
        return self._of_entry(found, "hit", {})

    def _sound(self, key: str | None, name: str) -> Entry:
        if key is None:
            raise RefusedError("not corrected", "is served from no entry of csulora's cache")
        with self._flights.of(key), self._slots:
            found = self._entries.sound(key)
        if found.made:
            counters.add("repaired")
            self._audit.line("repaired", name, key=key, folder=found.record.source)
        return found

    @contextlib.contextmanager
    def _refusals(self, name: str, folder: Path | None) -> Iterator[None]:
        """Count and log a refusal, and make one of whatever else goes wrong."""
        try:
            try:
                yield
            except RefusedError:
                raise
            except CsuloraError as error:
                raise RefusedError("source", str(error)) from None
            except Exception as error:  # a server must not fall over what nobody foresaw
                text = f"{type(error).__name__}: {error}"
                raise RefusedError("unforeseen", text) from error
        except RefusedError as error:
            counters.add("refused", error.reason)
            self._audit.line("refused", name, folder=folder, reason=error.reason, text=str(error))
            raise


_guard: tuple[int, Guard | None] | None = None  # of the process with this id
_opening = threading.Lock()


def guard() -> Guard | None:
    """The guard of this process by the environment's configuration, opened; None where none is set.

    Raises CsuloraError for a configuration that is missing or wrong.
    """
    global _guard
    with _opening:
        if _guard is not None and _guard[0] == os.getpid():
            return _guard[1]
        config = from_environment()
        found = None if config is None else Guard(config)
        if found is not None:
            found.open(_inherited(found.config))
        _guard = os.getpid(), found
        return found


def _inherited(config: ServingConfig) -> SafetySubspace | None:
    """The subspace of the process that this one was forked from: one copy for all."""
    before = None if _guard is None else _guard[1]
    same = before is not None and before.config == config and config.mode != "off"
    return before.subspace if before is not None and same else None


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
