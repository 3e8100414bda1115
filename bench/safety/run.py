"""Train worlds from scratch and measure every method in each: one JSON a world and seed.

    python -m bench.safety.run --worlds main,mixed --seeds 0,1,2 --out results [--processes 2]
    python -m bench.safety.run --seeds 0,1,2,3,4 --device cuda --processes 14 --seconds 280 --out results

Results that are there are not made again. A world that fails leaves `WORLD-SEED.error.txt`, and the
others go on. Trained models lie in OUT/models, so that a stopped run goes on from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.safety.stages import Trainer, is_trained, load_trained
from bench.safety.table import Size, world_table
from bench.safety.train import Stage
from bench.safety.worlds import WORLDS

log = logging.getLogger("safety")
QUICK_STEPS, QUICK_PROMPTS = 4, 6
LEFT_OUT = ("huge",)  # only where it is named: too much for a CPU


@dataclass(frozen=True)
class Call:
    """What is to be run, and where."""

    jobs: tuple[tuple[str, int], ...]  # (world, seed) in the order of importance
    out: Path
    device: str
    deadline: float  # of time.time(): nothing is begun after it
    quick: bool
    train_only: bool = False
    rules_only: bool = False

    def result(self, job: tuple[str, int]) -> Path:
        return self.out / f"{job[0]}-{job[1]}.json"

    @property
    def models(self) -> Path:
        return self.out / "models"

    def is_trained(self, job: tuple[str, int]) -> bool:
        return is_trained(self.models, WORLDS[job[0]], job[1])

    def failed(self, job: tuple[str, int]) -> Path:
        return self.out / f"{job[0]}-{job[1]}.error.txt"

    def is_over(self, job: tuple[str, int]) -> bool:
        return self.result(job).exists() or self.failed(job).exists()

    def chunks(self) -> dict[str, list[tuple[str, int]]]:
        """Jobs that one process trains, by name: on a GPU all of a width, else of a width and seed."""
        found: dict[str, list[tuple[str, int]]] = {}
        for job in self.jobs:
            if not (self.is_trained(job) or self.is_over(job)):
                width = WORLDS[job[0]].width
                name = f"train-{width}" if self.device == "cuda" else f"train-{width}-{job[1]}"
                found.setdefault(name, []).append(job)
        return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default=",".join(w for w in WORLDS if w not in LEFT_OUT))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after these")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and prompts, to try the code"
    )
    parser.add_argument("--train-only", action="store_true", help="measure nothing")
    parser.add_argument("--rules-only", action="store_true", help="no frontiers")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    call = Call(
        _jobs(given.worlds.split(","), [int(seed) for seed in given.seeds.split(",")]),
        given.out,
        given.device,
        time.time() + given.seconds,
        given.quick,
        given.train_only,
        given.rules_only,
    )
    call.models.mkdir(parents=True, exist_ok=True)
    claims = call.out / "claims"
    claims.mkdir(exist_ok=True)
    for claim in claims.iterdir():  # of a run that was stopped
        claim.unlink()
    if given.processes == 1:
        work(call, claims)
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(call, claims)) for _ in range(given.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _jobs(names: list[str], seeds: list[int]) -> tuple[tuple[str, int], ...]:
    """The first three seeds of every world before further seeds of any."""
    blocks = [seeds[:3], seeds[3:]]
    return tuple((name, seed) for block in blocks for name in names for seed in block)


def work(call: Call, claims: Path) -> None:
    """Train what nobody trains yet, then measure what is trained, until nothing is left or it is late."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
    torch.set_num_threads(1)
    for name, chunk in call.chunks().items():
        if time.time() < call.deadline and _claim(claims / name):
            _train(call, chunk)
    while time.time() < call.deadline and not call.train_only:
        open_jobs = [
            j for j in call.jobs if not (call.is_over(j) or (claims / _claim_name(j)).exists())
        ]
        if not open_jobs:
            return
        ready = (j for j in open_jobs if call.is_trained(j) and _claim(claims / _claim_name(j)))
        job = next(ready, None)
        if job is None:
            time.sleep(0.2)
            continue
        with _reporting(call, job):
            _measure(call, job)


def _train(call: Call, chunk: list[tuple[str, int]]) -> None:
    """All of a chunk in stacks; one by one on a CPU, or where that fails."""
    shorten: Callable[[Stage], Stage] = _shortened if call.quick else lambda stage: stage
    trainer = Trainer(call.models, torch.device(call.device), shorten)
    if call.device == "cuda":
        try:
            trainer.run([(WORLDS[name], seed) for name, seed in chunk])
        except Exception:
            log.exception("training in stacks failed; one by one")
    for job in chunk:
        if time.time() < call.deadline and not call.is_trained(job):
            with _reporting(call, job):
                trainer.run([(WORLDS[job[0]], job[1])])


def _shortened(stage: Stage) -> Stage:
    return replace(stage, steps=QUICK_STEPS, batch=8)


def _measure(call: Call, job: tuple[str, int]) -> None:
    name, seed = job
    device = torch.device(call.device)
    trained = load_trained(call.models, WORLDS[name], seed)
    size = Size(frontier=not call.rules_only)
    if call.quick:
        size = replace(size, prompts=QUICK_PROMPTS, rounds=1)
    result = world_table(WORLDS[name], seed, trained, device, size)
    temporary = call.result(job).with_suffix(".part")
    temporary.write_text(json.dumps(result) + "\n")
    temporary.replace(call.result(job))
    log.info("%s seed %d done in %.0f s", name, seed, result["seconds"]["table"])


@contextmanager
def _reporting(call: Call, job: tuple[str, int]) -> Iterator[None]:
    """A failure is written beside the results, and the others go on."""
    try:
        yield
    except Exception as error:
        call.failed(job).write_text("".join(traceback.format_exception(error)))
        log.error("%s seed %d failed: %s", *job, error)


def _claim_name(job: tuple[str, int]) -> str:
    return f"{job[0]}-{job[1]}"


def _claim(path: Path) -> bool:
    """Whether this process is the first to take it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
