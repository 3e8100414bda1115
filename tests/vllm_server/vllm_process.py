"""A real vLLM server as a group of processes, and what a client sees of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
START_LIMIT = 300.0  # seconds
FLAGS = (
    "--served-model-name=base",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--enable-lora",
    "--max-num-seqs=16",
)
_spec = importlib.util.find_spec("vllm")
MARKS = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        _spec is None or _spec.origin is None,
        reason="vLLM is not installed here; .ci/run has a virtual environment with it",
    ),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(config: Path | None, paths: Sequence[Path] = (), **more: str) -> dict[str, str]:
    """Of a process with vLLM: on few threads, without a network, guarded as `config` says."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "CSULORA_"))}
    values = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if config is not None:
        values["CSULORA_CONFIG"] = str(config)
    return kept | values | more


class Server:
    """A server that answers on its port."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def ask(self, path: str, body: object = None, timeout: float = 60.0) -> tuple[int, str]:
        """Status and text of an answer; a body is posted as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(
        self, model: str, prompt: Sequence[int], tokens: int = 8, timeout: float = 60.0
    ) -> tuple[int, list[int] | str]:
        """Status and tokens, or what the error says."""
        status, text = self.ask(
            "/v1/completions",
            {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
            timeout,
        )
        answer = json.loads(text)
        if status != 200:
            return status, answer["error"]["message"]
        return status, answer["choices"][0]["token_ids"]

    def load(self, name: str, path: Path | str, **options: object) -> tuple[int, str]:
        """Status and message of /v1/load_lora_adapter."""
        body = {"lora_name": name, "lora_path": str(path)} | options
        status, text = self.ask("/v1/load_lora_adapter", body)
        return status, text if status == 200 else json.loads(text)["error"]["message"]

    def metrics(self) -> dict[str, float]:
        """csulora's counters as /metrics shows them."""
        lines = self.ask("/metrics")[1].splitlines()
        shown = (line.rpartition(" ") for line in lines if line.startswith("csulora_"))
        return {name: float(value) for name, _, value in shown}

    def wait(self) -> None:
        """Until it is up. Fails with the end of its log if it is not in time."""
        limit = time.monotonic() + START_LIMIT
        while True:
            code = self.process.poll()
            if code is not None:
                pytest.fail(f"the server ended with {code}:\n{self.said()[-6000:]}")
            with contextlib.suppress(OSError):
                if self.ask("/health", timeout=5)[0] == 200:
                    return
            if time.monotonic() > limit:
                pytest.fail(f"no server in {START_LIMIT:g} s:\n{self.said()[-6000:]}")
            time.sleep(0.5)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None and self.ask("/health")[0] == 200

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def launched(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process with all that it starts, ended together."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        # The first process may be gone before those that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(
    model: Path, log: Path, *flags: str, command: Sequence[str] = (), env: dict[str, str]
) -> Iterator[Server]:
    """A server that is up. Fails with the end of its log if it is not in time."""
    port = free_port()
    program = command or ("-m", "vllm.entrypoints.openai.api_server", f"--model={model}")
    with launched(
        [sys.executable, *program, f"--port={port}", *FLAGS, *flags], log, env
    ) as process:
        server = Server(process, port, log)
        server.wait()
        yield server


def refused_start(model: Path, log: Path, *flags: str, env: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a server that must not come up."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    with launched([*command, f"--port={port}", *FLAGS, *flags], log, env) as process:
        return process.wait(START_LIMIT), log.read_text(encoding="utf-8", errors="replace")
