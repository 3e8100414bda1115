"""What became of one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from csulora.report import Report, Totals

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


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    status: "corrected", "skipped" (its output was there and up to date) or "failed" (`error` says why,
        `kind` the kind of failure).
    report: the content of the written report. In a batch without its part per module, so that one of any
        size fits in memory, and None unless corrected.
    totals: the energies of the whole adapter; None if it failed.
    seconds: spent on reading, correcting and writing it, waiting left out.
    steps: the same for "read", "correct" and "write" apart, where one folder was made on its own.
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
    steps: Mapping[str, float] = field(default_factory=dict)
