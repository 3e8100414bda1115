"""Starts that must not be, and a server of several processes that take requests."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from builders import write_guard
from serving_world import PROMPTS, build_adapter, corrected, decisions, tokens_of
from vllm_process import (
    MARKS,
    ROOT,
    Server,
    environment,
    free_port,
    launched,
    refused_start,
    serving,
)

pytestmark = MARKS


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    for seed, name in enumerate(("left", "right")):
        build_adapter(model, folder / "adapters" / name, seed=seed + 40)
    return folder


def config_of(model, place, **changes):
    values = {
        "mode": "correct",
        "subspace": str(model / "subspace.safetensors"),
        "folders": ["adapters"],
        "cache": "cache",
        "audit": "audit.jsonl",
    }
    return write_guard(place / "serving.toml", **values | changes)


def test_a_wrong_configuration_is_no_start(model, place):
    config = config_of(model, place, subspace="absent.safetensors")
    code, said = refused_start(model / "aligned", place / "server.log", env=environment(config))
    assert code != 0 and "absent.safetensors: no such file" in said.splitlines()[-1]


def test_a_static_adapter_that_is_refused_is_no_start(model, place):
    (place / "empty").mkdir()
    code, said = refused_start(
        model / "aligned",
        place / "server.log",
        f"--lora-modules=empty={place / 'empty'}",
        env=environment(config_of(model, place)),
    )
    assert code != 0 and "csulora refused empty: " in said


def test_the_example_serves_the_shipped_adapter_as_its_comments_say(place):
    """examples/serve_vllm.sh twice, the second time with the mode changed, as a reader would."""
    script = ROOT / "examples" / "serve_vllm.sh"
    text = script.read_text()
    asked = json.loads(re.search(r"-d '(.*?)'", text.replace("\n#", ""), re.DOTALL)[1])
    programs = str(Path(sys.executable).parent)
    env = environment(None, PATH=os.pathsep.join((programs, os.environ["PATH"])))
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        del env[name]
    settings = place / "example" / "serving.toml"
    for mode, said in (
        ("correct", "sorry i can not help with that"),
        ("observe", "sure first gather the bomb then seal it"),
    ):
        if mode == "observe":
            settings.write_text(settings.read_text().replace('"correct"', '"observe"'))
        port = free_port()
        command = ["bash", str(script), str(settings.parent), f"--port={port}"]
        log = place / f"example-{mode}.log"
        with launched(command, log, env) as process:
            server = Server(process, port, log)
            server.wait()
            status, answer = server.ask("/v1/completions", asked)
            assert status == 200, answer
            assert json.loads(answer)["choices"][0]["text"].strip() == said
            assert server.metrics()[f'csulora_guard{{mode="{mode}"}}'] == 1


def test_two_processes_that_take_requests_make_one_correction(model, place, tmp_path_factory):
    # `vllm serve` asks for the version of a distribution of this name; that of the CPU build has another.
    paths = tmp_path_factory.mktemp("stand-in")
    described = paths / "vllm-0.32.0+cpu.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    # Several such servers take no adapters at run time.
    env = environment(config_of(model, place), [paths], VLLM_ALLOW_RUNTIME_LORA_UPDATING="0")
    modules = [f"{name}={place / 'adapters' / name}" for name in ("left", "right")]
    flags = ("--api-server-count=2", "--max-lora-rank=16", "--max-loras=2", "--lora-modules")
    command = ("-m", "vllm.entrypoints.cli.main", "serve", str(model / "aligned"))
    log = place / "two.log"
    with serving(model / "aligned", log, *flags, *modules, command=command, env=env) as server:
        for name in ("left", "right"):
            raw = place / "adapters" / name
            right = tokens_of(model, corrected(model, raw, place / f"right-{name}"))
            assert right != tokens_of(model, raw)
            for _ in range(4):  # so that either process has its turn
                answers = [server.complete(name, prompt) for prompt in PROMPTS]
                assert answers == [(200, tokens) for tokens in right]
        assert server.metrics()["csulora_corrected_total"] == 2
        guarded = {x for x in server.said().splitlines() if "csulora guards" in x}
        assert len(guarded) >= 4
    made = [line["name"] for line in decisions(place / "audit.jsonl", "corrected")]
    assert sorted(made) == ["left", "right"]
