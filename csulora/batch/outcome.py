"""What became of each adapter, and what all adapters of one run have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from csulora.adapter import LoraAdapter
from csulora.backend import check_backend
from csulora.correction import origins
from csulora.errors import UsageError
from csulora.report import Report, Totals
from csulora.settings import Correction
from csulora.subspace import SafetySubspace

Existing = Literal["refuse", "overwrite", "resume"]
Status = Literal["corrected", "skipped", "failed"]
# Why an adapter failed: its output is there already; resume found other settings or another source;
# its files; the correction itself; writing, a full disk apart; what nobody foresaw; the worker that had
# it died; the run ended before its turn.
Kind = Literal[
    "exists",
    "changed",
    "source",
    "correction",
    "writing",
    "disk full",
    "unforeseen",
    "lost worker",
    "not started",
]
BATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    status: "corrected", "skipped" (resume found it finished) or "failed" (`error` says why, `kind`
        the kind of failure).
    report: the content of the written report, but without its part per module, so that a batch of any
        size fits in memory; None unless corrected.
    totals: the energies of the whole adapter; None if it failed.
    seconds: spent on reading, correcting and writing it, waiting left out.
    bytes_in, bytes_out: sizes of its weights before and after, 0 where nothing was read or written.
    """

    adapter: str
    output: Path
    status: Status
    error: str | None = None
    report: Report | None = None
    left_out: tuple[str, ...] = ()
    kind: Kind | None = None
    totals: Totals | None = None
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


class Done(NamedTuple):
    """An outcome on its way back: which item of the run it is of, and its journal line, if any."""

    number: int
    outcome: Outcome
    line: dict[str, Any] | None = None


@dataclass(frozen=True)
class Call:
    """What is the same for every adapter of a run. Options as in `csulora.batch.correct_many`.

    Raises UsageError for options that cannot be met.
    """

    out_dir: Path
    correction: Correction = field(default_factory=Correction)
    dtype: torch.dtype | None = None
    portable: bool = False
    pass_through: bool = False
    backend: str = "auto"
    device: str = "auto"
    existing: Existing = "refuse"
    jobs: int = 1
    batch_bytes: int = BATCH_BYTES

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {self.jobs}")
        if self.batch_bytes < 1:
            raise UsageError(f"batch bytes must be at least 1, not {self.batch_bytes}")
        if self.existing not in ("refuse", "overwrite", "resume"):
            raise UsageError(f"existing must be refuse, overwrite or resume, not {self.existing!r}")
        check_backend(self.backend, self.device)


class Run(NamedTuple):
    """A call together with what, besides the source, determines each result."""

    call: Call
    settings: dict[str, Any]  # as in a report
    subspace: dict[str, Any]
    digest: str  # of both


def make_run(call: Call, subspace: SafetySubspace) -> Run:
    nothing = LoraAdapter({}, {})
    origin = origins(nothing, subspace, call.correction, call.dtype, call.portable)
    text = json.dumps([origin["settings"], origin["subspace"]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Run(call, origin["settings"], origin["subspace"], digest)
