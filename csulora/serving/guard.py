"""What a serving stack asks of every adapter: may it be served, and from which folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from csulora.errors import CsuloraError
from csulora.serving.config import ServingConfig

How = Literal["corrected", "hit", "waited", "signed", "recomputed", "raw"]


class RefusedError(CsuloraError):
    """An adapter that is not served. Its text says why, without the adapter's name.

    reason: a short code, for counters.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def refusal_text(name: str, error: CsuloraError) -> str:
    """What a client is told, on one line."""
    raise NotImplementedError


@dataclass(frozen=True)
class Admitted:
    """An adapter that may be served.

    path: the folder to serve it from. key: of the cache entry that this is, None for a raw folder.
    rank: the largest of its modules, 0 where it was not looked at. form: "exact" or "same", empty where
    csulora did not choose it.
    seconds: what digest, read, correct and write took, where they were done.
    """

    path: Path
    key: str | None
    rank: int
    form: str
    how: How
    seconds: dict[str, float] = field(default_factory=dict)


class Guard:
    """Decides for one process. All its methods may be called from any number of threads at once."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config

    def open(self) -> None:
        """Load the subspace, check the cache's folder and heal what a kill left in it.

        Raises CsuloraError; the stack must not start then.
        """
        raise NotImplementedError

    def find(self, name: str) -> Path | None:
        """The adapter folder that a request's name stands for in the configured folders, None if unknown.

        Raises RefusedError for a name that leaves them.
        """
        raise NotImplementedError

    def admit(
        self, folder: str | os.PathLike[str], name: str, *, max_rank: int | None = None
    ) -> Admitted:
        """The folder to serve in place of a local adapter folder; it may take as long as a correction.

        name: what the adapter is called in logs. max_rank: the largest rank that the stack takes, if it
        tells; otherwise that of the configuration counts.

        In the modes "correct" and "require" the result is always an entry of the cache. Raises
        RefusedError, and nothing else, for an adapter that is not served.
        """
        raise NotImplementedError

    def check(self, path: str | os.PathLike[str], name: str) -> None:
        """For every request: that a folder which `admit` gave is still what it was, for a few stats.

        A damaged entry is made anew from its source where that is still the same. Raises RefusedError,
        also for a folder that is no entry of the cache.
        """
        raise NotImplementedError

    def again(self, path: str | os.PathLike[str], name: str) -> Path | None:
        """For reading an adapter once more, where an exception would end the server: never raises.

        None where no sound weights can be had: the stack has to serve a zero adapter, which is logged and
        counted here.
        """
        raise NotImplementedError


def guard() -> Guard | None:
    """The guard of this process by the environment's configuration, opened; None where none is set.

    Raises CsuloraError for a configuration that is missing or wrong.
    """
    raise NotImplementedError
