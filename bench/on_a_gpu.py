"""Everything that wants a GPU, the most telling first, in the minutes that a borrowed one is there for.

    python bench/on_a_gpu.py OUT [--minutes 9]

Each step's output goes to OUT/NAME.log, the benchmark's rows to OUT/gpu.json, and how each step ended to
standard output and OUT/steps.json. A step that fails or runs out of its time stops no other. Needs what
the tests need, pytest-xdist among it, and compute-sanitizer on the path.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from workloads import FORMS

HERE = Path(__file__).parent
TESTS = "tests/kernels/test_gpu.py"
# What the sanitizer sees, which makes everything many times slower.
FEW = "(ragged or splits or component or brain) and bfloat16"


class Step(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", TESTS, *arguments]


def bench(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / script), *arguments]


def compilations() -> list[Step]:
    """What the benchmark compiles, a process each: the kernels of 64 adapters are those of 8."""
    few = "gpu.py", "--all", "--seconds", "20", "--only"
    return [
        Step(
            f"compile-{N}-{r}-{form.replace(' ', '-')}",
            bench(*few, f"llama-3.1-8b N={N} r={r} {form} stages"),
            120,
        )
        for r, N, form in itertools.product((16, 64), (8, 1), FORMS)
    ]


def steps(out: Path, workers: int) -> list[Step]:
    """One after the other, after the compilations."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [
        Step(
            "benchmark", bench("gpu.py", "--json", str(out / "gpu.json"), "--seconds", "150"), 180
        ),
        Step("tests", pytest("-n", str(workers), "--durations", "5"), 240),
        Step("memcheck", [*sanitizer, "memcheck", *pytest("-k", FEW)], 120),
        Step("racecheck", [*sanitizer, "racecheck", *pytest("-k", FEW)], 120),
        Step("tune", bench("tune.py", "--ranks", "16"), 240),
    ]


def run(step: Step, out: Path, deadline: float) -> dict[str, object]:
    """How a step ended: its exit code, or None where its time or all of it was up."""
    begin = time.monotonic()
    limit = min(step.seconds, deadline - begin)
    code = None
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with (out / f"{step.name}.log").open("w") as log:
        if limit > 0:
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=HERE.parent,
                    env={**os.environ, "PYTHONPATH": paths},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                # With what it started: workers of the tests would stay on the GPU.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except OSError as error:
                log.write(f"{error}\n")
    return {"step": step.name, "code": code, "seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=9, help="start nothing after this long")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda step: run(step, out, deadline), compilations()))
    for step in steps(out, workers):
        results.append(run(step, out, deadline))
        print(json.dumps(results[-1]), flush=True)
    (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["code"] != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())
