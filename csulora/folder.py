"""One adapter folder to one folder: made, made anew, or recognised as up to date."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from csulora.adapter import HUB_PATTERNS, LoraAdapter, Source, folder_name, identify, write_folder
from csulora.correction import check_dtype, correct_batch
from csulora.errors import ChangedError, CsuloraError, ExistsError, UsageError
from csulora.files.folders import check_apart, make_folders, recover_folders, writing
from csulora.files.hub import resolve_source
from csulora.files.json import read_json
from csulora.files.locks import locked
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.peft_config import FILE as CONFIG
from csulora.outcome import Outcome
from csulora.output import (
    REPORT,
    WEIGHTS,
    check_replaceable,
    contradictions,
    differences,
    otherwise,
    unlike,
    written_report,
)
from csulora.pipeline.backend import check_backend, pick_device
from csulora.pipeline.finish import provenance
from csulora.pipeline.plan import other_model
from csulora.report import Report
from csulora.settings import Correction, Method
from csulora.subspace import SafetySubspace
from csulora.text import listed

Existing = Literal["refuse", "overwrite", "resume", "refresh"]
EXISTING: tuple[str, ...] = get_args(Existing)


@dataclass(frozen=True)
class Recipe:
    """How an output is made of its source; options as in `csulora.correct` and `LoraAdapter.load`.

    Raises UsageError for options that cannot be met.
    """

    correction: Method = field(default_factory=Correction)
    dtype: torch.dtype | None = None
    portable: bool = False
    pass_through: bool = False
    again: bool = False
    strict_base: bool = False
    backend: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.correction, Method):
            raise UsageError(
                f"correction must be a Correction or a Realignment, not {self.correction!r}"
            )
        check_dtype(self.dtype)
        check_backend(self.backend, self.device)

    def provenance(self, subspace: SafetySubspace) -> dict[str, Any]:
        """What, besides the source, determines a result, as its report states it."""
        return provenance(subspace, self.correction, self.dtype, self.portable)

    def load(self, source: str | os.PathLike[str], *, name: str | None = None) -> LoraAdapter:
        """The adapter in memory, where the device can fetch it without waiting.

        What the portable form does about tensors that are no updates is up to the plan.
        """
        on_gpu = pick_device(self.device).type == "cuda"
        return LoraAdapter.load(
            source, pass_through=self.pass_through or self.portable, pin_memory=on_gpu, name=name
        )

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
            again=self.again,
            strict_base=self.strict_base,
            backend=self.backend,
            device=self.device,
        )


def correct_folder(
    source: str | os.PathLike[str] | LoraAdapter,
    subspace: SafetySubspace,
    target: str | os.PathLike[str],
    correction: Method | None = None,
    *,
    existing: Existing = "refresh",
    dtype: torch.dtype | None = None,
    portable: bool = False,
    pass_through: bool = False,
    again: bool = False,
    strict_base: bool = False,
    backend: str = "auto",
    device: str = "auto",
    durable: bool = True,
    companions: bool = True,
) -> Outcome:
    """Correct an adapter folder (or hub id) into the folder `target`, whole or not at all.

    Safe to call for one target from any number of threads and processes at once: one does the work, the
    others wait and get its result. Their lock is a hidden file beside `target`. A process that has
    corrected something has started PyTorch's threads, which no fork survives: start others by spawn
    or forkserver then. One that has only loaded a subspace can be forked.

    Args:
        source: or what `LoraAdapter.load` read from one, which is not read again.
        existing: what to do about a target that is there already. "refresh" recognises it as up to date
            if it was made of these very weights, configuration, subspace and settings, whatever has
            become of the source's other files, and makes it anew otherwise;
            "resume" raises ChangedError then; "overwrite" always makes it anew; "refuse" raises
            ExistsError.
        durable: fsync what is written. Without it a machine that stops may lose or spoil an output,
            for caches that check what they find.
        companions: copy the other files of the source, too.
        The rest as in `csulora.correct` and `LoraAdapter.load`.

    Returns an outcome with the whole report, of status "corrected" or, where the target was recognised,
    "skipped". Raises CsuloraError where the adapter cannot be corrected; ExistsError for a target that
    is a file, a link or a folder without an adapter and, except with "overwrite", for one that is no
    output of csulora; UsageError for an unknown option.
    """
    check_existing(existing)
    recipe = Recipe(
        correction or Correction(),
        dtype,
        portable,
        pass_through,
        again,
        strict_base,
        backend,
        device,
    )
    wish = _Wish.of(source, target, recipe, subspace, existing, durable, companions)
    found = wish.glance()
    if found is not None:
        return wish.recognised(found)
    before = identity(wish.target)
    with writing(wish.target):
        make_folders(wish.target.parent)
        with locked(wish.target):
            recover_folders(wish.target.parent, {wish.target.name})
            # An output that others made since this call began is the result of the same wish.
            joined = identity(wish.target) != before
            found = wish.standing(joined=joined)
            return wish.make(subspace) if found is None else wish.recognised(found)


def check_existing(existing: str) -> None:
    """Raise UsageError for an unknown choice."""
    if existing not in EXISTING:
        raise UsageError(f"existing must be one of {', '.join(EXISTING)}, not {existing!r}")


def identity(target: Path) -> tuple[int, ...] | None:
    """What changes whenever an output is made anew; None where nothing is there."""
    try:
        folder = os.lstat(target)
    except OSError:
        return None
    try:
        return folder.st_ino, os.lstat(target / REPORT).st_mtime_ns
    except OSError:
        return (folder.st_ino,)


def standing(
    target: Path,
    made: dict[str, Any],
    recipe: Recipe,
    existing: Existing,
    identify_source: Callable[[], Source],
    *,
    joined: bool = False,
) -> Report | None:
    """The report of an output that is there and need not be made; None if it is to be made.

    identify_source: tells the source's digests, which costs a reading of it. joined: somebody else made
    the output for the same wish, so it counts whatever `existing` says.

    Raises ExistsError or ChangedError where `existing` forbids to make it anew.
    """
    if not os.path.lexists(target):
        return None
    if existing == "refuse" and not joined:
        raise ExistsError(f"{target}: already exists")
    if existing != "overwrite" or joined:
        try:
            return recognise(target, made, recipe, identify_source)
        except ExistsError:
            if existing != "overwrite":
                raise
        except CsuloraError:
            if existing not in ("overwrite", "refresh"):
                raise
    check_replaceable(target)
    return None


def recognise(
    target: Path, made: dict[str, Any], recipe: Recipe, identify_source: Callable[[], Source]
) -> Report:
    """The report of an output that is up to date, and whose files are those that were written.

    Raises ExistsError for what is no output of csulora, ChangedError for one of another source,
    subspace, settings or version, or with files that are missing or others now.
    """
    report = written_report(target)
    wanted = {**made, "source": identify_source().to_dict()}
    parts = {key: getattr(report, key) for key in wanted}
    changed = [otherwise(key, parts[key], wanted[key]) for key in unlike(parts, wanted)]
    if changed:
        raise ChangedError(f"{target}: was made with other {' and '.join(changed)}")
    damaged = differences(target, report) or contradictions(target, report)
    if damaged:
        raise ChangedError(f"{target}: {damaged[0]}")
    if report.passed_through and not recipe.pass_through:
        raise ChangedError(f"{target}: holds tensors that were passed through uncorrected")
    other = (
        other_model(read_json(target / CONFIG, CONFIG_LIMIT), report.subspace)
        if recipe.strict_base
        else None
    )
    if other is not None:
        raise ChangedError(f"{target}: {other}")
    return report


@dataclass(frozen=True)
class _Wish:
    """One call of `correct_folder`, its paths resolved once: what they name may change meanwhile."""

    given: str  # the source as the caller calls it
    path: Path  # of the source
    name: str
    target: Path
    recipe: Recipe
    made: dict[str, Any]
    existing: Existing
    durable: bool
    companions: bool
    loaded: LoraAdapter | None  # the source, where it is in memory already

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str] | LoraAdapter,
        target: str | os.PathLike[str],
        recipe: Recipe,
        subspace: SafetySubspace,
        existing: Existing,
        durable: bool,
        companions: bool,
    ) -> _Wish:
        loaded = source if isinstance(source, LoraAdapter) else None
        given, output = os.fspath(_folder_of(source)), os.fspath(target)
        if "\0" in output or Path(output).name in ("", ".."):
            raise UsageError(f"{output!r}: cannot be the name of an output folder")
        absolute, path = Path(output).absolute(), resolve_source(given, HUB_PATTERNS).absolute()
        check_apart(absolute, path)
        made = recipe.provenance(subspace)
        name = folder_name(given) if loaded is None or loaded.source is None else loaded.source.name
        return cls(
            *(given, path, name, absolute, recipe, made, existing, durable, companions, loaded)
        )

    @cached_property
    def source(self) -> Source:
        """Read when it is first asked for, and once."""
        if self.loaded is not None and self.loaded.source is not None:
            return self.loaded.source
        return identify(self.path, name=self.name)

    def standing(self, *, joined: bool = False) -> Report | None:
        """`standing` of the target."""
        return standing(
            self.target, self.made, self.recipe, self.existing, lambda: self.source, joined=joined
        )

    def glance(self) -> Report | None:
        """`standing` without the lock, so that an output in use, or of a folder that cannot be written,
        is recognised as well; whoever replaces it this very moment may make it seem something else."""
        try:
            return self.standing()
        except ExistsError:
            if self.existing == "refuse":
                raise
        except (CsuloraError, OSError):
            pass
        return None

    def make(self, subspace: SafetySubspace) -> Outcome:
        times = [time.perf_counter()]
        # Only what was looked at may be replaced, not what appears in the meantime.
        replaces = self.existing == "overwrite" or os.path.lexists(self.target)
        adapter = self._adapter()
        times.append(time.perf_counter())
        (result,) = self.recipe.correct([adapter], subspace)
        if isinstance(result, CsuloraError):
            raise result
        corrected, report = result
        times.append(time.perf_counter())
        written = write_folder(
            corrected,
            self.target,
            overwrite=replaces,
            report=report.to_dict(),
            durable=self.durable,
            companions=self.companions,
        )
        times.append(time.perf_counter())
        steps = (end - begin for begin, end in pairwise(times))
        return Outcome(
            self.given,
            self.target,
            "corrected",
            report=replace(report, **written.in_report()),
            left_out=tuple(written.left_out),
            totals=report.totals,
            seconds=times[-1] - times[0],
            bytes_in=adapter.nbytes,
            bytes_out=os.path.getsize(self.target / WEIGHTS),
            steps=dict(zip(("read", "correct", "write"), steps, strict=True)),
        )

    def _adapter(self) -> LoraAdapter:
        if self.loaded is None:
            return self.recipe.load(self.path, name=self.name)
        # The portable form refuses them itself, but for copies of base weights, which it goes without.
        if self.loaded.passed_through and not (self.recipe.pass_through or self.recipe.portable):
            names = listed(self.loaded.passed_through)
            raise CsuloraError(f"{self.path}: not LoRA updates on linear weights: {names}")
        return self.loaded

    def recognised(self, report: Report) -> Outcome:
        return Outcome(
            self.given,
            self.target,
            "skipped",
            report=report,
            left_out=tuple(report.left_out),
            totals=report.totals,
        )


def _folder_of(source: str | os.PathLike[str] | LoraAdapter) -> str | os.PathLike[str]:
    """Where a source lies; raises UsageError for an adapter that was not read from a folder."""
    if not isinstance(source, LoraAdapter):
        return source
    if source.source is None:
        raise UsageError("an adapter from memory lies in no folder; use csulora.correct and save")
    return source.source.folder
