"""Batch runs beside plain copying and the bare arithmetic, in one run.

    python bench/batch.py disk [--count 200] [--rounds 3]     llama-3.2-1b shapes, disk to disk
    python bench/batch.py small [--count 20000]               small ones: processor time, memory, resume
    python bench/batch.py journal [--count 2000]              what the journal costs
    python bench/batch.py ray [--count 200]                   two Ray workers beside the local engine

Work happens below --dir (default: a new folder in the current one, removed afterwards). Every kind of
work is timed in turn, round by round; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cpu import environment, products, seconds
from make_adapters import make_subspace, shapes_of, write_adapter

from csulora import Correction, LoraAdapter, SafetySubspace, correct
from csulora.batch import Call, find, pick_engine, stream
from csulora.batch.journal import Journal
from csulora.batch.summary import Summary

CORES = len(os.sched_getaffinity(0))
OUTPUT = ("adapter_model.safetensors", "adapter_config.json", "csulora_report.json")
DIFFERENT = 8  # adapters that are generated; the others are copies, each a file of its own


def prepare(place: Path, model: str, count: int, rank: int) -> tuple[Path, Path]:
    """`count` adapter folders in bfloat16 and the subspace file that fits them."""
    subspace = make_subspace(shapes_of(model, None), 64)
    subspace.save(place / "subspace.safetensors")
    for number in range(count):
        folder = place / "in" / f"t{number // 100:03d}" / f"n{number:05d}"
        if number < DIFFERENT:
            write_adapter(folder, number, subspace, rank, torch.bfloat16)
        else:
            like = number % DIFFERENT
            shutil.copytree(place / "in" / "t000" / f"n{like:05d}", folder)
    os.sync()
    return place / "in", place / "subspace.safetensors"


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and of the writes reaching the disk."""
    spent = seconds(
        lambda: (
            subprocess.run(
                [
                    "cp",
                    "-r",
                    source,
                    target,
                ],
                check=True,
            )
            and os.sync()
        )
    )
    shutil.rmtree(target)
    os.sync()
    return spent


def on_all_cores(work: Callable[[], object], count: int) -> float:
    """Seconds for `count` calls spread over one process a core, from a quarter of them.

    Processes, because threads would wait for Python's lock, which is no part of a floor.
    """
    calls = max(1, count // 4 // CORES)

    def run() -> None:
        children = []
        for _ in range(CORES):
            child = os.fork()
            if not child:
                for _ in range(calls):
                    work()
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)

    return seconds(run) * count / (calls * CORES)


def batch(
    source: Path, subspace: SafetySubspace, out: Path, engine: str = "local", **options: object
) -> Summary:
    """One run, which must be without failures."""
    items = find([source])
    call = Call(out, jobs=CORES, **options)  # type: ignore[arg-type]
    summary = Summary(len(items))
    for outcome in stream(
        items, subspace, call, pick_engine(engine, None, CORES if engine == "ray" else None)
    ):
        summary.add(outcome)
    assert not summary.failures, summary.examples
    os.sync()
    return summary


def disk(place: Path, count: int, rounds: int) -> dict:
    source, file = prepare(place, "llama-3.2-1b", count, 16)
    subspace = SafetySubspace.load(file)
    subspace.sha256  # noqa: B018  not part of a run's time
    adapter = LoraAdapter.load(source / "t000" / "n00000")
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        out = place / "out"
        before = time.process_time()
        run = seconds(lambda: batch(source, subspace, out))  # noqa: B023
        spent = {
            "run": run,
            "processor time of the run": time.process_time() - before,
            "cp of what is written": copy(out, place / "copy"),
            "cp of what is read": copy(source, place / "copy"),
            "products": on_all_cores(products(adapter, subspace), count),
            "correct in memory": on_all_cores(
                lambda: correct(adapter, subspace, Correction()), count
            ),
        }
        shutil.rmtree(out)
        for name, value in spent.items():
            times.setdefault(name, []).append(value)

    def ratio(*parts: str) -> float:
        return statistics.median(
            run / sum(times[part][i] for part in parts) for i, run in enumerate(times["run"])
        )

    return {
        "adapters": count,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "run / (cp written + products)": ratio("cp of what is written", "products"),
        "run / (cp read + products)": ratio("cp of what is read", "products"),
        "run / (cp written + correct)": ratio("cp of what is written", "correct in memory"),
        "run / (cp read + correct)": ratio("cp of what is read", "correct in memory"),
    }


USED = """
import resource, sys, torch
from csulora.cli import main
assert main(sys.argv[1:]) == 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


class Used(NamedTuple):
    """What `csulora correct` took in a process of its own."""

    seconds: float
    processor: float  # seconds
    peak: float  # megabytes


def command(*arguments: object) -> Used:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", USED, "correct", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    processor, peak = done.stdout.split()[-2:]
    return Used(time.perf_counter() - start, float(processor), int(peak) / 1024)


def floors(source: Path, out: Path, subspace: SafetySubspace, times: int = 300) -> dict:
    """Processor milliseconds of what no run can avoid for one small adapter, each on its own.

    Reading and hashing its two files, the products of its modules, and making the three files of its
    output whole and durable: five fsyncs, two folders, a rename.
    """
    adapter = LoraAdapter.load(source)
    contents = {file: (out / file).read_bytes() for file in OUTPUT}
    place = out.parent / "floor"
    place.mkdir()

    def sync(path: Path, flags: int, data: bytes = b"") -> None:
        descriptor = os.open(path, flags, 0o600)
        if data:
            hashlib.sha256(data)
            os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)

    def read() -> None:
        for file in OUTPUT[:2]:
            hashlib.sha256((source / file).read_bytes())

    def write() -> None:
        folder = place / "new"
        folder.mkdir()
        for file, data in contents.items():
            sync(folder / file, os.O_WRONLY | os.O_CREAT, data)
        sync(folder, os.O_RDONLY)
        folder.rename(place / str(time.perf_counter_ns()))
        sync(place, os.O_RDONLY)

    found = {}
    for name, work in (("read", read), ("products", products(adapter, subspace)), ("write", write)):
        start = time.process_time()
        for _ in range(times):
            work()
        found[name] = 1e3 * (time.process_time() - start) / times
    shutil.rmtree(place)
    return found


def small(place: Path, count: int, _: int) -> dict:
    source, file = prepare(place, "tiny", count, 8)
    few = place / "few"
    few.mkdir()
    for folder in ("t000", "t001"):
        shutil.copytree(source / folder, few / folder)
    options = ("--subspace", file, "--out-dir")
    time.sleep(3)  # sources that changed a moment ago are looked at twice
    started = command(find_first(source), *options, place / "out-one")  # what a run takes anyway
    first = command(few, *options, place / "out-few")
    run = command(source, *options, place / "out")
    resume = command(source, *options, place / "out", "--resume")
    one = find_first(place / "out")
    return {
        "adapters": count,
        "run_s": run.seconds,
        "ms_per_adapter": 1e3 * run.seconds / count,
        "processor_ms_per_adapter": 1e3 * (run.processor - started.processor) / (count - 1),
        "floor_ms": floors(find_first(source), one, SafetySubspace.load(file)),
        "peak_mb_200": first.peak,
        "peak_mb_all": run.peak,
        "peak_ratio": run.peak / first.peak,
        "resume_s": resume.seconds,
        "peak_mb_resume": resume.peak,
    }


def journal(place: Path, count: int, rounds: int) -> dict:
    """Time inside the journal as a share of the run, and runs with and without it in turn."""
    source, file = prepare(place, "tiny", count, 8)
    subspace = SafetySubspace.load(file)
    append, inside = Journal.append, [0.0]

    def timed(self: Journal, entries: object) -> None:
        start = time.perf_counter()
        append(self, entries)  # type: ignore[arg-type]
        inside[0] += time.perf_counter() - start

    shares, with_it, without = [], [], []
    for _ in range(rounds):
        for kind in (timed, lambda *_: None):
            Journal.append = kind  # type: ignore[method-assign, assignment]
            inside[0] = 0.0
            out = place / "journal-out"
            call = Call(out, jobs=CORES)
            spent = seconds(lambda: list(stream(find([source]), subspace, call)))  # noqa: B023
            shutil.rmtree(out)
            if kind is timed:
                with_it.append(spent)
                shares.append(inside[0] / spent)
            else:
                without.append(spent)
    Journal.append = append  # type: ignore[method-assign]
    return {
        "adapters": count,
        "share_inside": statistics.median(shares),
        "with_over_without": statistics.median(
            a / b for a, b in zip(with_it, without, strict=True)
        ),
    }


def on_ray(place: Path, count: int, rounds: int) -> dict:
    import ray

    source, file = prepare(place, "llama-3.2-1b", count, 16)
    subspace = SafetySubspace.load(file)
    rows: dict[str, list[float]] = {"local": [], "ray": [], "ray with its start": []}
    for _ in range(rounds):
        rows["local"].append(seconds(lambda: batch(source, subspace, place / "out-local")))
        rows["ray with its start"].append(
            seconds(lambda: batch(source, subspace, place / "out-ray", "ray"))
        )
        same = subprocess.run(
            ["diff", "-r", "-q", "-x", "*.jsonl", place / "out-local", place / "out-ray"],
            check=False,
        )
        assert same.returncode == 0
        shutil.rmtree(place / "out-ray")
        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
        batch(find_first(source), subspace, place / "out-warm", "ray")
        rows["ray"].append(seconds(lambda: batch(source, subspace, place / "out-ray", "ray")))
        ray.shutdown()
        for name in ("out-local", "out-ray", "out-warm"):
            shutil.rmtree(place / name)
    local = rows["local"]
    return {
        "adapters": count,
        "seconds": {name: statistics.median(values) for name, values in rows.items()},
        "rate to local": statistics.median(a / b for a, b in zip(local, rows["ray"], strict=True)),
        "rate to local, with its start": statistics.median(
            a / b for a, b in zip(local, rows["ray with its start"], strict=True)
        ),
    }


def find_first(source: Path) -> Path:
    return source / "t000" / "n00000"


COUNTS = {"disk": 200, "small": 20_000, "journal": 2_000, "ray": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=tuple(COUNTS))
    parser.add_argument("--count", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("."))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = {"disk": disk, "small": small, "journal": journal, "ray": on_ray}[arguments.what]
    count = arguments.count or COUNTS[arguments.what]
    with tempfile.TemporaryDirectory(dir=arguments.dir) as place:
        result = work(Path(place), count, arguments.rounds)
    print(json.dumps({"environment": environment(), arguments.what: result}, indent=2))


if __name__ == "__main__":
    main()
