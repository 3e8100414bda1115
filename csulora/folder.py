"""One adapter folder to one folder: made, made anew, or recognised as up to date."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from csulora.adapter import DTYPES, HUB_PATTERNS, REPORT, WEIGHTS, LoraAdapter, identify
from csulora.correction import correct_batch
from csulora.errors import ChangedError, CsuloraError, ExistsError, UsageError
from csulora.files.folders import check_apart, make_folders, recover_folder, writing
from csulora.files.hub import resolve_source
from csulora.files.json import read_json
from csulora.files.locks import locked
from csulora.outcome import Outcome
from csulora.pipeline.backend import check_backend, pick_device
from csulora.pipeline.finish import provenance
from csulora.report import Report
from csulora.settings import Correction
from csulora.subspace import SafetySubspace

Existing = Literal["refuse", "overwrite", "resume", "refresh"]
EXISTING: tuple[str, ...] = get_args(Existing)


@dataclass(frozen=True)
class Recipe:
    """How an output is made of its source; options as in `csulora.correct` and `LoraAdapter.load`.

    Raises UsageError for options that cannot be met.
    """

    correction: Correction = field(default_factory=Correction)
    dtype: torch.dtype | None = None
    portable: bool = False
    pass_through: bool = False
    backend: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        check_backend(self.backend, self.device)

    def provenance(self, subspace: SafetySubspace) -> dict[str, Any]:
        """What, besides the source, determines a result, as its report states it."""
        return provenance(subspace, self.correction, self.dtype, self.portable)

    def load(self, source: str | os.PathLike[str]) -> LoraAdapter:
        """The adapter in memory, where the device can fetch it without waiting."""
        on_gpu = pick_device(self.device).type == "cuda"
        return LoraAdapter.load(source, pass_through=self.pass_through, pin_memory=on_gpu)

    def correct(
        self, adapters: Sequence[LoraAdapter], subspace: SafetySubspace
    ) -> list[tuple[LoraAdapter, Report] | CsuloraError]:
        """`csulora.correct_batch` with these options."""
        return correct_batch(
            adapters,
            subspace,
            self.correction,
            dtype=self.dtype,
            portable=self.portable,
            backend=self.backend,
            device=self.device,
        )


def correct_folder(
    source: str | os.PathLike[str],
    subspace: SafetySubspace,
    target: str | os.PathLike[str],
    correction: Correction | None = None,
    *,
    existing: Existing = "refresh",
    dtype: torch.dtype | None = None,
    portable: bool = False,
    pass_through: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> Outcome:
    """Correct an adapter folder (or hub id) into the folder `target`, whole or not at all.

    Safe to call for one target from any number of threads and processes at once: one does the work, the
    others wait and get its result. Their lock is a hidden file beside `target`.

    Args:
        existing: what to do about a target that is there already. "refresh" recognises it as up to date
            if it was made of this very source, subspace and settings, and makes it anew otherwise;
            "resume" raises ChangedError then; "overwrite" always makes it anew; "refuse" raises
            ExistsError.
        The rest as in `csulora.correct` and `LoraAdapter.load`.

    Returns an outcome with the whole report, of status "corrected" or, where the target was recognised,
    "skipped". Raises CsuloraError where the adapter cannot be corrected; ExistsError, except with
    "overwrite", for a target that is no output of csulora; UsageError for an unknown option.
    """
    check_existing(existing)
    recipe = Recipe(correction or Correction(), dtype, portable, pass_through, backend, device)
    name, output = os.fspath(source), Path(target)
    check_apart(output, resolve_source(source, HUB_PATTERNS))
    made = recipe.provenance(subspace)
    there = os.path.lexists(output)
    found = _glance(name, output, made, recipe, existing)
    if found is not None:
        return _recognised(name, output, found)
    with writing(output):
        make_folders(output.parent)
        with locked(output) as waited:
            recover_folder(output)
            # An output that came while this call was waiting is the result of the same wish.
            joined = waited or (not there and os.path.lexists(output))
            found = standing(name, output, made, recipe, existing, joined=joined)
            if found is not None:
                return _recognised(name, output, found)
            return _made(name, output, subspace, recipe, existing)


def check_existing(existing: str) -> None:
    """Raise UsageError for an unknown choice."""
    if existing not in EXISTING:
        raise UsageError(f"existing must be one of {', '.join(EXISTING)}, not {existing!r}")


def standing(
    source: str,
    target: Path,
    made: dict[str, Any],
    recipe: Recipe,
    existing: Existing,
    *,
    joined: bool = False,
) -> Report | None:
    """The report of an output that is there and need not be made; None if it is to be made.

    joined: somebody else made it for the same wish, so it counts whatever `existing` says.

    Raises ExistsError or ChangedError where `existing` forbids to make it anew.
    """
    if not os.path.lexists(target) or (existing == "overwrite" and not joined):
        return None
    if existing == "refuse" and not joined:
        raise ExistsError(f"{target}: already exists")
    try:
        return recognise(source, target, made, recipe)
    except ExistsError:
        if existing == "overwrite":
            return None
        raise
    except CsuloraError:
        if existing in ("overwrite", "refresh"):
            return None
        raise


def recognise(source: str, target: Path, made: dict[str, Any], recipe: Recipe) -> Report:
    """The report of an output that is up to date.

    Raises ExistsError for what is no output of csulora, ChangedError for one of another source,
    subspace or settings.
    """
    if not (target / WEIGHTS).exists() or not (target / REPORT).exists():
        raise ExistsError(f"{target}: not an output of csulora")
    content = read_json(target / REPORT)
    wanted = {**made, "source": identify(source).to_dict()}
    changed = [key for key in wanted if content.get(key) != wanted[key]]
    if changed:
        raise ChangedError(f"{target}: was made with other {' and '.join(changed)}")
    report = Report.from_dict(content)
    if report.passed_through and not recipe.pass_through:
        raise ChangedError(f"{target}: holds tensors that were passed through uncorrected")
    return report


def _glance(
    source: str, target: Path, made: dict[str, Any], recipe: Recipe, existing: Existing
) -> Report | None:
    """`standing` without the lock, so that an output in use, or of a folder that cannot be written, is
    recognised as well; whoever is replacing it this very moment may make it seem to be something else."""
    try:
        return standing(source, target, made, recipe, existing)
    except ExistsError:
        if existing == "refuse":
            raise
        return None
    except (CsuloraError, OSError):
        return None


def _made(
    source: str, target: Path, subspace: SafetySubspace, recipe: Recipe, existing: Existing
) -> Outcome:
    start = time.perf_counter()
    adapter = recipe.load(source)
    (result,) = recipe.correct([adapter], subspace)
    if isinstance(result, CsuloraError):
        raise result
    corrected, report = result
    left_out = corrected.save(target, overwrite=existing != "refuse", report=report)
    return Outcome(
        source,
        target,
        "corrected",
        report=replace(report, left_out=left_out),
        left_out=tuple(left_out),
        totals=report.totals,
        seconds=time.perf_counter() - start,
        bytes_in=adapter.nbytes,
        bytes_out=os.path.getsize(target / WEIGHTS),
    )


def _recognised(source: str, target: Path, report: Report) -> Outcome:
    return Outcome(
        source,
        target,
        "skipped",
        report=report,
        left_out=tuple(report.left_out),
        totals=report.totals,
    )
