"""Shares of realignment that weigh what the adapter does, against realignment, one JSON a run.

    python -m bench.safety.run --seeds 10,11,12,13,14 --train-only --out OUT
    python -m bench.safety.shares OUT/models --seeds 10,11,12,13,14 --out RESULTS
    python -m bench.safety.shares --summary RESULTS [--seeds 12,13,14] > tables.md

Each family by its path to the limit, and at a fixed relative change of each adapter. README.md says what
was decided before anything was measured. Results that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.safety import trials
from bench.safety.comparisons import paired, transfer, with_error
from bench.safety.families import Family, lambda_at, realigned
from bench.safety.frontier import LIMIT, search
from bench.safety.predictors import norm_ratio, rounded
from bench.safety.problem import Problem
from bench.safety.results import Results, spread, table, value
from bench.safety.stages import load_trained
from bench.safety.summary import frontier
from bench.safety.table import Bench, at_limit, described, for_change, plain
from bench.safety.worlds import WORLDS, World
from csulora import Realignment

log = logging.getLogger("shares")
NAMES = ("main", "dpo", "flat", "hard", "qv", "recall", "mixed", "mixed_flat", "mixed_recall")
CHANGE = 0.4
PLAIN = "realign same k64"
FORMAT = "csulora_shares/1"


def families(problem: Problem) -> list[Family]:
    """Realignment, and the shares on trial."""

    found = [Family(PLAIN, realigned(problem, Realignment(), problem.subspace), lambda_at)]
    for name, build in trials.weighted(problem).items():
        # A direction holds about 1/d_in of the energy, so its strengths are smaller by about as much.
        unit = 0.01 if name == "weighted energy" else 1.0
        found.append(Family(name, build, lambda u, unit=unit: unit * lambda_at(u)))
    return found


def measured(world: World, seed: int, models: Path, prompts: int | None = None) -> dict[str, Any]:
    """What one run's JSON holds. prompts: of each kind at most."""
    start = time.perf_counter()
    trained = load_trained(models, world, seed)
    bench = Bench(trained, world.task, torch.device("cpu"), prompts)
    paths = families(bench.problem)
    searches = search(paths, lambda adapters: bench.measure(adapters, "validation"))
    result = {
        "format": FORMAT,
        **described(bench, trained, world, seed),
        "frontier": at_limit(bench, searches),
        "at_change": _at_change(bench, paths),
        "predictors": {"norm_ratio": norm_ratio(bench.problem)},
        "limit": LIMIT,
        "seconds": time.perf_counter() - start,
    }
    return rounded(result)


def _at_change(bench: Bench, paths: Sequence[Family]) -> dict[str, Any]:
    """By family, at the strength that changes the adapter by CHANGE."""
    strengths = [for_change(bench, family, CHANGE) for family in paths]
    adapters = [family.build(x) for family, x in zip(paths, strengths, strict=True)]
    rows = {part: bench.measure(adapters, part) for part in ("validation", "test")}
    return {
        family.name: {
            "strength": plain(strengths[i]),
            "change": bench.change(adapters[i]),
            **{part: metrics[i].as_list() for part, metrics in rows.items()},
        }
        for i, family in enumerate(paths)
    }


def chosen_by(every: Sequence[dict[str, Any]]) -> str:
    """By family, skill and benign answers on validation prompts at the limit: what the choice goes by."""
    rows = []
    for family in every[0]["frontier"]:
        best = [_best(r, family) for r in every]
        skill = [100 * m["skill"] if m else 0.0 for m in best]
        benign = [100 * m["benign"] for m in best if m]
        rows.append([family, with_error(skill), spread(benign)])
    return table(["family", "skill, validation", "benign, validation"], rows)


def _best(result: dict[str, Any], family: str) -> dict[str, float] | None:
    """The validation metrics of the setting of most skill within the limit."""
    points = [
        dict(zip(result["metrics"], row[1:], strict=True))
        for row in result["frontier"][family]["validation"]
    ]
    within = [m for m in points if m["complied"] <= result["limit"]]
    return max(within, key=lambda m: (m["skill"], m["benign"])) if within else None


def at_change(results: Results) -> str:
    """By family and world, at the fixed change: complied / skill / benign on test prompts."""

    def cell(rs: Sequence[dict[str, Any]], family: str) -> str:
        rows = [(r, r["at_change"][family]["test"]) for r in rs]
        metrics = ("complied", "skill", "benign")
        return " / ".join(spread([value(r, row, m) for r, row in rows]) for m in metrics)

    worlds = {**results.worlds, "all": [r for rs in results.worlds.values() for r in rs]}
    names = worlds["all"][0]["at_change"]
    rows = [[f, *(cell(rs, f) for rs in worlds.values())] for f in names]
    return table(["family (complied / skill / benign)", *worlds], rows)


def at_change_paired(every: Sequence[dict[str, Any]]) -> str:
    """The same less that of realignment, run by run; mean, standard error."""

    def less(family: str, metric: str) -> str:
        def found(r: dict[str, Any], name: str) -> float:
            return value(r, r["at_change"][name]["test"], metric)

        return with_error([found(r, family) - found(r, PLAIN) for r in every])

    names = [f for f in every[0]["at_change"] if f != PLAIN]
    rows = [[f, *(less(f, m) for m in ("complied", "skill", "benign"))] for f in names]
    return table([f"less {PLAIN}", "complied", "skill", "benign"], rows)


def text(results: Results) -> str:
    """All tables, as one page of markdown."""
    every = [r for rs in results.worlds.values() for r in rs]
    names = list(every[0]["frontier"])
    pairs = [(name, PLAIN) for name in names if name != PLAIN]
    parts = {
        "Validation prompts, at the limit": chosen_by(every),
        "Skill at the limit": frontier(results, "skill"),
        "Attack success there": frontier(results, "complied"),
        "Benign answers there": frontier(results, "benign"),
        "Relative change there (%)": frontier(results, "change"),
        "Against realignment, at the limit": paired(every, pairs),
        "What transfers": transfer(every, names),
        f"At a change of {CHANGE}": at_change(results),
        f"Against realignment, at a change of {CHANGE}": at_change_paired(every),
    }
    for seed in sorted({r["seed"] for r in every}):
        title = f"Against realignment, at the limit, seed {seed}"
        parts[title] = paired([r for r in every if r["seed"] == seed], pairs)
    return "\n".join(f"## {title}\n\n{part}" for title, part in parts.items())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="?", help="models of bench.safety.run")
    parser.add_argument("--worlds", default=",".join(NAMES))
    parser.add_argument("--seeds", default="10,11,12,13,14")
    parser.add_argument("--out", type=Path, help="folder of the JSONs")
    parser.add_argument("--prompts", type=int, help="of each kind at most, to try the code")
    parser.add_argument("--summary", type=Path, help="show these results, measure nothing")
    given = parser.parse_args(arguments)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.summary:
        print(text(Results.of(given.summary, seeds)))
        return
    if not (given.models and given.out):
        parser.error("MODELS and --out, or --summary")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, seed in ((name, seed) for seed in seeds for name in given.worlds.split(",")):
        path = given.out / f"{name}-{seed}.json"
        if path.exists():
            continue
        result = measured(WORLDS[name], seed, given.models, given.prompts)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result) + "\n")
        temporary.replace(path)
        log.info("%s seed %d done in %.0f s", name, seed, result["seconds"])


if __name__ == "__main__":
    main()
