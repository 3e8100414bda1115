"""Correcting many adapters from folder to folder; one bad adapter never stops the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from csulora import correction as method
from csulora.adapter import REPORT, WEIGHTS, LoraAdapter
from csulora.backend import check_backend, pick_device
from csulora.errors import CsuloraError, UsageError
from csulora.files import read_json, recover_folders
from csulora.report import Report
from csulora.settings import Correction
from csulora.subspace import SafetySubspace

Existing = Literal["refuse", "overwrite", "resume"]


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    status: "corrected", "skipped" (resume found it finished) or "failed" (`error` says why).
    report: the content of the written report, but without its part per module, so that a batch of any
        size fits in memory; None unless corrected.
    """

    adapter: str
    output: Path
    status: Literal["corrected", "skipped", "failed"]
    error: str | None = None
    report: Report | None = None
    left_out: tuple[str, ...] = ()


def correct_many(
    adapters: Iterable[str | os.PathLike[str]],
    subspace: SafetySubspace,
    out_dir: str | os.PathLike[str],
    correction: Correction | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    pass_through: bool = False,
    backend: str = "auto",
    device: str = "auto",
    jobs: int = 1,
    existing: Existing = "refuse",
    on_done: Callable[[Outcome, int, int], None] | None = None,
) -> list[Outcome]:
    """Correct each adapter folder into `out_dir/<folder's name>/`, in the order given.

    Args:
        jobs: adapters in flight at once, one thread each.
        existing: what to do about an output folder that is there already: fail that adapter, replace
            it, or (resume) skip it if source, subspace and settings are the same and fail otherwise.
        on_done: called after each adapter, in order, with (outcome, number done, number in all).
        The rest as in `csulora.correct` and `LoraAdapter.load`.

    Raises UsageError before any work if the call itself is wrong: no adapters, two with one name.
    """
    sources = [os.fspath(adapter) for adapter in adapters]
    targets = _targets(sources, Path(out_dir))
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1, not {jobs}")
    check_backend(backend, device)
    pick_device(device)
    recover_folders(Path(out_dir), {target.name for target in targets})
    subspace.sha256  # noqa: B018  computed once here, not once in every thread
    options: dict[str, Any] = {
        "dtype": dtype,
        "portable": portable,
        "backend": backend,
        "device": device,
    }
    work = partial(
        _correct_one, subspace, correction or Correction(), pass_through, existing, options
    )
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for outcome in pool.map(work, sources, targets):
                outcomes.append(outcome)
                if on_done is not None:
                    on_done(outcome, len(outcomes), len(sources))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return outcomes


def _targets(sources: list[str], out_dir: Path) -> list[Path]:
    if not sources:
        raise UsageError("no adapters given")
    names = [Path(os.path.abspath(source)).name for source in sources]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"two adapters would be written to {out_dir / twice[0]}; rename one")
    place = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UsageError(f"{place}: exists and is not a folder")
    targets = [out_dir / name for name in names]
    _check_apart(sources, targets)
    return targets


def _check_apart(sources: list[str], targets: list[Path]) -> None:
    """Replacing an output must never replace, or write into, a folder that adapters come from."""
    origins = {Path(os.path.realpath(source)): source for source in sources}
    around = {parent: source for place, source in origins.items() for parent in place.parents}
    for target in targets:
        place = Path(os.path.realpath(target))
        for known, other in ((around, place), *((origins, p) for p in (place, *place.parents))):
            if other in known:
                raise UsageError(
                    f"{target}: the output folder is, holds or lies within the adapter {known[other]}; "
                    "choose another --out-dir"
                )


def _correct_one(
    subspace: SafetySubspace,
    correction: Correction,
    pass_through: bool,
    existing: Existing,
    options: dict[str, Any],
    source: str,
    target: Path,
) -> Outcome:
    try:
        if existing == "refuse" and target.exists():
            raise CsuloraError(f"{target}: already exists; pass --overwrite or --resume")
        adapter = LoraAdapter.load(source, pass_through=pass_through)
        if existing == "resume" and target.exists():
            _check_finished(target, adapter, subspace, correction, options)
            return Outcome(source, target, "skipped")
        corrected, report = method.correct(adapter, subspace, correction, **options)
        left_out = corrected.save(
            target, overwrite=existing == "overwrite", report=report.to_dict()
        )
    except UsageError:
        raise
    except CsuloraError as error:
        return Outcome(source, target, "failed", error=str(error))
    except Exception as error:
        # Unforeseen, but still this adapter's failure only: name the kind, keep to one line.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome(source, target, "failed", error=f"{source}: {reason}")
    brief = replace(report, modules={})
    return Outcome(source, target, "corrected", report=brief, left_out=tuple(left_out))


def _check_finished(
    target: Path,
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Correction,
    options: dict[str, Any],
) -> None:
    """Raise CsuloraError unless the output at `target` is what this call would write."""
    if not (target / WEIGHTS).exists() or not (target / REPORT).exists():
        raise CsuloraError(f"{target}: not an output of csulora; pass --overwrite to replace it")
    written = read_json(target / REPORT)
    wanted = method.origins(adapter, subspace, correction, options["dtype"], options["portable"])
    changed = [key for key in wanted if written.get(key) != wanted[key]]
    if changed:
        raise CsuloraError(
            f"{target}: was made with other {' and '.join(changed)}; pass --overwrite to replace it"
        )
