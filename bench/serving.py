"""Serving with and without the guard: three real vLLM servers side by side, asked in turn.

    python bench/serving.py [--model DIR] [--adapters 100] [--rounds 3] [--method realign] [--json FILE]

Needs vLLM, pytest and csulora in one environment (docs/serving.md). "stock" and "stock again" are vLLM
with its own folder resolver, which serves adapters as they are; how far apart these two are is the
noise. "guarded" has csulora in its place, with an empty cache. Without --model a small random model is
served; on a GPU each server takes a quarter of its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
import transformers
from cpu import environment as machine
from make_adapters import make_subspace, write_adapter

sys.path.append(str(Path(__file__).parent.parent / "tests" / "vllm_server"))
from vllm_process import Server, environment, serving

STOCK = "stock", "stock again"
GUARDED = "guarded"
RANKS = 8, 16, 32
IN_MEMORY = 16  # adapters that a server keeps; others are read again
CLIENTS = 8
REQUESTS = 100  # of a mix
TURNS = 6  # of each server in a round of warm requests
BLOCK = 10  # requests that one server answers before it is the next one's turn
PROMPT = list(range(5, 29))
VOCABULARY = 223


@dataclass
class Sample:
    """Times of requests of one kind at one server. processor: seconds of all its processes."""

    seconds: list[float] = field(default_factory=list)
    processor: float = 0.0

    def row(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "requests": len(ordered),
            "median_ms": 1e3 * statistics.median(ordered),
            "p95_ms": 1e3 * ordered[int(0.95 * (len(ordered) - 1))],
            "processor_ms": 1e3 * self.processor / len(ordered),
        }


def small_model(folder: Path) -> Path:
    """A random model of the Llama family, 3 million weights: what is not its own stands out."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assets = Path(__file__).parent.parent / "csulora" / "demo" / "assets" / "aligned"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((assets / name).read_bytes())
    return folder


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear modules of a model's layers, by name."""
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(model)
        )
    return {
        name: tuple(module.weight.shape)
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def make_adapters(place: Path, model: Path, count: int) -> list[str]:
    """Random adapters for a model, of several ranks, and a subspace that fits them; their names."""
    subspace = make_subspace(linear_shapes(model), 64)
    subspace.save(place / "subspace.safetensors")
    names = [f"lora-{number:03d}" for number in range(count)]
    for number, name in enumerate(names):
        folder = place / "adapters" / name
        write_adapter(folder, number, subspace, RANKS[number % len(RANKS)], torch.bfloat16)
        file = folder / "adapter_config.json"
        # vLLM's own resolver asks for the path of the model that it serves.
        values = json.loads(file.read_text()) | {"base_model_name_or_path": str(model)}
        file.write_text(json.dumps(values))
    return names


@contextlib.contextmanager
def three_servers(place: Path, model: Path, method: str) -> Iterator[dict[str, Server]]:
    """The servers by name, all up."""
    config = place / "serving.toml"
    config.write_text(
        f'mode = "correct"\nsubspace = "subspace.safetensors"\nmethod = "{method}"\n'
        'folders = ["adapters"]\ncache = "cache"\naudit = "audit.jsonl"\n'
    )
    stock = environment(
        None,
        VLLM_PLUGINS="lora_filesystem_resolver",
        VLLM_LORA_RESOLVER_CACHE_DIR=str(place / "adapters"),
    )
    flags = [f"--max-lora-rank={2 * max(RANKS)}", "--max-loras=4", f"--max-cpu-loras={IN_MEMORY}"]
    if torch.cuda.is_available():
        flags += ["--dtype=bfloat16", "--gpu-memory-utilization=0.25"]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                serving(
                    model,
                    place / f"{name.replace(' ', '-')}.log",
                    *flags,
                    env=stock if name in STOCK else environment(config),
                )
            )
            for name in (STOCK[0], GUARDED, STOCK[1])
        }


def processor_seconds(server: Server) -> float:
    """What all processes of a server have used so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == server.process.pid:  # its session
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ask(server: Server, name: str, tokens: int) -> float:
    """Seconds of one request, which must succeed."""
    start = time.perf_counter()
    status, answer = server.complete(name, PROMPT, tokens, timeout=600)
    spent = time.perf_counter() - start
    assert status == 200, answer
    return spent


def cold(servers: dict[str, Server], names: Sequence[str]) -> dict[str, dict[str, Sample]]:
    """First tokens: of adapters that a server has not read yet, and of each once more right after."""
    found = {kind: {s: Sample() for s in servers} for kind in ("first", "second")}
    order = list(servers)
    for number, name in enumerate(names):
        begin = number % len(order)
        for which in order[begin:] + order[:begin]:
            for kind in found:
                sample = found[kind][which]
                before = processor_seconds(servers[which])
                sample.seconds.append(ask(servers[which], name, 1))
                sample.processor += processor_seconds(servers[which]) - before
    return found


def in_turn(
    servers: dict[str, Server], turns: int, work: Callable[[Server], list[float]]
) -> dict[str, Sample]:
    """`work` at each server, turn by turn, the first turn to warm up."""
    found = {which: Sample() for which in servers}
    order = list(servers)
    for count in range(turns + 1):
        begin = count % len(order)
        for which in order[begin:] + order[:begin]:
            before = processor_seconds(servers[which])
            seconds = work(servers[which])
            if count:
                found[which].seconds += seconds
                found[which].processor += processor_seconds(servers[which]) - before
    return found


def warm(names: Sequence[str]) -> Callable[[Server], list[float]]:
    """Requests for adapters that stay in memory, one after another."""
    return lambda server: [ask(server, names[i % 4], 1) for i in range(BLOCK)]


def mixed(names: Sequence[str]) -> Callable[[Server], list[float]]:
    """Requests of several clients at once for all adapters, the first ones most often."""
    weights = [1 / (1 + i) for i in range(len(names))]
    drawn = random.Random(0).choices(names, weights, k=REQUESTS)

    def work(server: Server) -> list[float]:
        with ThreadPoolExecutor(CLIENTS) as clients:
            return list(clients.map(lambda name: ask(server, name, 4), drawn))

    return work


def steps(audit: Path) -> dict[str, float]:
    """Median milliseconds of each step of a correction, as the guard logged them."""
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["decision"] == "corrected"]
    return {step: 1e3 * statistics.median(s[step] for s in seconds) for step in sorted(seconds[0])}


def copying(place: Path, names: Sequence[str]) -> float:
    """Median milliseconds of reading an adapter's weights and writing as much as its entry's."""
    entries = [p.stat().st_size for p in (place / "cache").rglob("adapter_model.safetensors")]
    zeros = bytes(sum(entries) // len(entries))
    spent = []
    for name in names:
        start = time.perf_counter()
        (place / "adapters" / name / "adapter_model.safetensors").read_bytes()
        (place / "copy").write_bytes(zeros)
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent)


def measure(place: Path, model: Path, names: list[str], rounds: int, method: str) -> dict:
    with three_servers(place, model, method) as servers:
        for server in servers.values():
            ask(server, names[0], 4)  # what any server does once
        found = cold(servers, names[1:])
        found["warm"] = in_turn(servers, TURNS * rounds, warm(names))
        what = f"mix of {len(names)}, {CLIENTS} clients"
        found[what] = in_turn(servers, rounds, mixed(names))
        counters = servers[GUARDED].metrics()
    rows = {w: {s: sample.row() for s, sample in by.items()} for w, by in found.items()}
    return {
        "rows": rows,
        "correction_ms": steps(place / "audit.jsonl"),
        "read_and_write_ms": copying(place, names),
        "counters": counters,
    }


def show(result: dict) -> None:
    for what, by in result["rows"].items():
        print(what)
        for which, row in by.items():
            base = by[STOCK[0]]
            print(
                f"  {which:12s} {row['requests']:5d} requests   median {row['median_ms']:8.2f} ms "
                f"({row['median_ms'] / base['median_ms']:.3f})   p95 {row['p95_ms']:8.2f}   "
                f"processor {row['processor_ms']:8.2f} ms "
                f"({row['processor_ms'] / base['processor_ms']:.3f})"
            )
    split = ", ".join(f"{step} {value:.1f}" for step, value in result["correction_ms"].items())
    print(f"of a first request at the guarded server, ms: {split}")
    print(f"reading and writing as many bytes, ms: {result['read_and_write_ms']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the model that is served")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=("csulora", "realign"), default="csulora")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = arguments.model or small_model(place / "model")
        names = make_adapters(place, model.resolve(), arguments.adapters)
        result = {
            "environment": machine() | {"vllm": version(packages_distributions()["vllm"][0])},
            "method": arguments.method,
            **measure(place, model.resolve(), names, arguments.rounds, arguments.method),
        }
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
