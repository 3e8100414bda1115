"""A sweep with an evaluation command: families searched side by side, controls, and what came of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from csulora.adapter import folder_name, write_folder
from csulora.baselines import equal_norm_factor
from csulora.errors import CsuloraError, DiskFullError
from csulora.report import Totals
from csulora.sweep.command import Command, EvaluationError, Runner
from csulora.sweep.controls import NONE, RAW, Material, Variant, beside, ends, measured, of_setting
from csulora.sweep.grid import Setting
from csulora.sweep.metrics import Goal, Metrics
from csulora.sweep.place import Place
from csulora.sweep.search import STEPS, Path, Requests, pick, search
from csulora.version import MADE_BY


@dataclass(frozen=True)
class Wish:
    """How settings are chosen, and reported.

    select: the command that chooses. report: the one whose figures are told; None: those that chose.
    """

    select: Command
    report: Command | None
    goal: Goal
    coarse: Sequence[float] | None = None
    steps: int = STEPS
    jobs: int = 1
    timeout: float | None = None
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """A variant and what is told of it; `metrics` and `error` are both None where it was not run."""

    variant: Variant
    relative_change: float
    norm_kept: float
    metrics: Metrics | None = None
    error: str | None = None
    within: bool | None = None  # the limit, by the prompts that chose; only of settings


@dataclass
class Found:
    """What a sweep came to."""

    rows: list[Row] = field(default_factory=list)
    tried: dict[str, dict[float, Metrics | None]] = field(default_factory=dict)  # by family
    changes: dict[str, dict[float, float]] = field(default_factory=dict)
    best: Variant | None = None
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Task:
    """A family while it is searched."""

    path: Path
    requests: Requests
    tried: dict[float, Metrics | None] = field(default_factory=dict)
    asked: dict[float, Metrics | None] = field(default_factory=dict)
    waiting: int = 0


class _Picked(NamedTuple):
    """The best of a family, by the prompts that choose."""

    variant: Variant
    setting: Setting
    totals: Totals
    within: bool
    worth: tuple[float, ...]


class Evaluation:
    """One sweep's evaluations: kept in `place`, shown by `report` (done, total, what) and `say`."""

    def __init__(
        self,
        material: Material,
        wish: Wish,
        place: Place,
        report: Callable[[int, int, str], object],
        say: Callable[[str], object],
    ) -> None:
        self._material, self._wish, self._place = material, wish, place
        self._report, self._say = report, say
        self._runner = Runner(wish.timeout)
        self._done = self._total = 0
        self._lock = threading.Lock()
        self._found = Found()
        self._failed: dict[str, str] = {}  # in this run; the next one tries again

    def run(self, paths: Sequence[Path]) -> Found:
        """Search every family, then tell of the best of each, and of the controls of each method's best.

        Raises CsuloraError where the sweep cannot go on: a full disk, a folder that is gone.
        """
        with ThreadPoolExecutor(self._wish.jobs) as self._pool:
            try:
                return self._run(paths)
            finally:
                self._runner.stop()
                self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, paths: Sequence[Path]) -> Found:
        wish, found = self._wish, self._found
        self._total = 2 + len(paths) * (len(wish.coarse or (1, 2, 3)) + wish.steps)
        first = ends(wish.without)
        select = self._all(first, wish.select, wish.goal.needed)
        raw = next((m for v, m in select if v.name == RAW), None)
        if raw is not None and wish.goal.within(raw):
            found.notes.append(f"the raw adapter is within {wish.goal.limit} as it is")
        moving = []
        for path in paths:
            if path.extreme:
                moving.append(path)
            else:
                found.notes.append(f"{path.family} changes nothing at any strength")
        picked = [one for one in map(self._pick, self._search(moving, raw)) if one is not None]
        within = [one for one in picked if one.within]
        if within:
            best = max(within, key=lambda one: one.worth)
            found.best = best.variant
            if raw is not None and wish.goal.rank(raw, 0.0) >= best.worth:
                found.notes.append("no setting does better than the raw adapter")
        self._tell(first, picked)
        found.failures.sort(key=lambda failure: tuple(failure.values()))
        return found

    def _pick(self, task: _Task) -> _Picked | None:
        """The best of a family that was searched; None where no evaluation of it succeeded."""
        path, goal, name = task.path, self._wish.goal, str(task.path.family)
        self._found.tried[name] = dict(sorted(task.tried.items()))
        self._found.changes[name] = {x: path.change(x) for x in sorted(task.tried)}
        chosen = pick(path, goal, task.tried)
        if chosen is None:
            return None
        strength, metrics = chosen
        totals = path.totals(strength)
        variant = of_setting(path.setting(strength), totals)
        worth = goal.rank(metrics, totals.relative_change)
        return _Picked(variant, path.setting(strength), totals, goal.within(metrics), worth)

    def _tell(self, first: list[Variant], picked: list[_Picked]) -> None:
        """The rows: ends, the best of each family, the controls of each method's best."""
        wish, found = self._wish, self._found
        command = wish.report or wish.select
        controls: list[Variant] = []
        for method in dict.fromkeys(one.setting.family.method for one in picked):
            own = (one for one in picked if one.setting.family.method == method)
            best = max(own, key=lambda one: one.worth)
            controls += beside(best.setting, best.totals, self._material, wish.without)
        within = {one.variant: one.within for one in picked}
        variants = [*first, *within, *controls]
        self._total = self._done + len(variants)
        for variant, told in self._all(variants, command, ()):
            change, kept = self._measured(variant)
            error = self._failed[self._key(variant, command)] if told is None else None
            found.rows.append(Row(variant, change, kept, told, error, within.get(variant)))
            if variant is found.best and told is not None and wish.report is not None:
                self._check_best(told)

    def _check_best(self, told: Metrics) -> None:
        """A search stops at the edge of the limit, so that other prompts may see it beyond."""
        limit = self._wish.goal.limit
        if limit.metric in told and limit.excess(told) > 0:
            self._found.notes.append(
                f"by the prompts that are reported the best is beyond {limit}: choose by a stricter limit"
            )

    def _measured(self, variant: Variant) -> tuple[float, float]:
        if variant.totals is not None:
            return shown(variant)
        if variant.name in (RAW, NONE):
            return (0.0, 1.0) if variant.name == RAW else (float(self._material.energy > 0), 0.0)
        return measured(self._material, variant)

    def _search(self, paths: Sequence[Path], raw: Metrics | None) -> list[_Task]:
        """Each family goes on as soon as its own evaluations are there."""
        wish = self._wish
        tasks = [
            _Task(p, search(p, wish.goal, raw, coarse=wish.coarse, steps=wish.steps)) for p in paths
        ]
        pending: dict[Future[Metrics | None], tuple[_Task, float]] = {}
        for task in tasks:
            pending |= self._ask(task, next(task.requests))
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                task, strength = pending.pop(future)
                task.asked[strength] = future.result()
                task.waiting -= 1
                if not task.waiting:
                    task.tried |= task.asked
                    try:
                        pending |= self._ask(task, task.requests.send(dict(task.asked)))
                    except StopIteration:
                        most = len(wish.coarse or (1, 2, 3)) + wish.steps
                        self._total -= most - len(task.tried)
        return tasks

    def _ask(
        self, task: _Task, strengths: list[float]
    ) -> dict[Future[Metrics | None], tuple[_Task, float]]:
        task.asked, task.waiting = {}, len(strengths)
        asked = {}
        for strength in strengths:
            variant = of_setting(task.path.setting(strength), task.path.totals(strength))
            asked[self._start(variant, self._wish.select, self._wish.goal.needed)] = task, strength
        return asked

    def _all(
        self, variants: Iterable[Variant], command: Command, needed: tuple[str, ...]
    ) -> list[tuple[Variant, Metrics | None]]:
        futures = [(v, self._start(v, command, needed)) for v in variants]
        return [(variant, future.result()) for variant, future in futures]

    def _start(
        self, variant: Variant, command: Command, needed: tuple[str, ...]
    ) -> Future[Metrics | None]:
        return self._pool.submit(self._evaluate, variant, command, needed)

    def _evaluate(
        self, variant: Variant, command: Command, needed: tuple[str, ...]
    ) -> Metrics | None:
        """The metrics of a variant, None where its evaluation failed. In a thread of the pool."""
        key = self._key(variant, command)
        metrics: Metrics | None = self._place.find(key)
        if metrics is not None and not all(name in metrics for name in needed):
            metrics = None  # kept when another goal needed less
        if metrics is None and key not in self._failed:
            metrics = self._attempt(key, variant, command, needed)
        with self._lock:
            self._done += 1
            self._report(self._done, max(self._total, self._done), variant.title)
        return metrics

    def _attempt(
        self, key: str, variant: Variant, command: Command, needed: tuple[str, ...]
    ) -> Metrics | None:
        try:
            metrics = self._new(variant, command, needed)
        except DiskFullError:
            raise
        except (EvaluationError, CsuloraError) as error:
            self._fail(key, variant, command, str(error))
            return None
        self._place.keep(key, metrics, command=command.line, variant=variant.values)
        return metrics

    def _fail(self, key: str, variant: Variant, command: Command, error: str) -> None:
        """Tell of it once, and go on."""
        which = "eval" if self._wish.report is None else "select"
        if command is self._wish.report:
            which = "report"
        self._failed[key] = error
        self._found.failures.append({"variant": variant.title, "command": which, "error": error})
        self._say(f"csulora: failed: {variant.title}: {error}")

    def _new(self, variant: Variant, command: Command, needed: tuple[str, ...]) -> Metrics:
        made, report = variant.make(self._material)
        source = self._material.adapter.source
        name = "adapter" if source is None else source.name
        with self._place.variant() as scratch:
            folder = scratch / (folder_name(name) or "adapter")
            write_folder(
                made, folder, overwrite=False, report=None if report is None else report.to_dict()
            )
            return self._runner.metrics(command, folder, scratch, needed)

    def _key(self, variant: Variant, command: Command) -> str:
        """What one evaluation is known by: all that its result depends on, as far as csulora can tell."""
        source = self._material.adapter.source
        what = {
            "command": command.line,
            "variant": variant.values,
            "source": None if source is None else source.to_dict(),
            "subspace": self._material.subspace.sha256,
            "made_by": MADE_BY,
        }
        text = json.dumps(what, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def shown(variant: Variant) -> tuple[float, float]:
    """Relative change, and norm over the raw adapter's, of a setting."""
    totals = variant.totals
    assert totals is not None
    return totals.relative_change, equal_norm_factor(totals)
