"""What all adapters of one run have in common, and what comes back of each."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from csulora.batch.journal import FILE as JOURNAL
from csulora.errors import UsageError
from csulora.folder import Existing, Recipe, check_existing
from csulora.outcome import Outcome
from csulora.subspace import SafetySubspace

BATCH_BYTES = 1 << 30
PLACES = ("output folder", "journal in")
Place = tuple[int, int] | None  # device and inode, None where nothing is


@dataclass(frozen=True)
class Call:
    """What is the same for every adapter of a run. Options as in `csulora.correct_many`.

    Raises UsageError for options that cannot be met.
    """

    out_dir: Path
    recipe: Recipe = field(default_factory=Recipe)
    existing: Existing = "refuse"
    jobs: int = 1
    batch_bytes: int = BATCH_BYTES

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {self.jobs}")
        if self.batch_bytes < 1:
            raise UsageError(f"batch bytes must be at least 1, not {self.batch_bytes}")
        check_existing(self.existing)


class Run(NamedTuple):
    """A call together with what, besides the source, determines each result."""

    call: Call
    made: dict[str, Any]  # version, settings and subspace, as in a report
    digest: str  # of it
    places: tuple[Place, Place] | None = None  # of output folder and journal, once they are there

    @classmethod
    def of(cls, call: Call, subspace: SafetySubspace) -> Run:
        made = call.recipe.provenance(subspace)
        text = json.dumps(made)  # keys as they come: the order of patterns counts
        return cls(call, made, hashlib.sha256(text.encode()).hexdigest())

    def begun(self) -> Run:
        """The same, bound to the output folder and the journal that are there now."""
        return self._replace(places=self._places())

    def lost(self) -> str | None:
        """What to say if the output folder, or the journal in it, was taken away since the run began."""
        if self.places is None:
            return None
        for place, before, now in zip(PLACES, self.places, self._places(), strict=True):
            if now != before:
                return f"the {place} {self.call.out_dir} was removed or renamed"
        return None

    def _places(self) -> tuple[Place, Place]:
        return _place(self.call.out_dir), _place(self.call.out_dir / JOURNAL)


def _place(path: Path) -> Place:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Done(NamedTuple):
    """An outcome on its way back: which item of the run it is of, and its journal line, if any."""

    number: int
    outcome: Outcome
    line: dict[str, Any] | None = None
