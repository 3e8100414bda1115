"""Adapters that are read again, whose files vanish or change: the engine lives, nothing raw is served."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import write_guard
from serving_world import (
    PROMPTS,
    build_adapter,
    corrected,
    decisions,
    edit_weights,
    tokens_of,
)
from vllm_process import MARKS, environment, serving

pytestmark = MARKS
NAMES = ("one", "two", "three", "four")
LONG = list(range(2, 202))


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eviction")
    for seed, name in enumerate(NAMES):
        build_adapter(model, folder / "adapters" / name, seed=seed + 20)
    write_guard(
        folder / "serving.toml",
        mode="correct",
        subspace=str(model / "subspace.safetensors"),
        folders=["adapters"],
        cache="cache",
        audit="audit.jsonl",
    )
    return folder


@pytest.fixture
def start(model, place, plugin):
    """A server that holds one adapter at a time."""

    def started(*more, **variables):
        env = environment(place / "serving.toml", [plugin], TEST_FOLDER=str(place), **variables)
        flags = ("--max-lora-rank=16", "--max-loras=1", "--max-cpu-loras=1", *more)
        return serving(model / "aligned", place / "server.log", *flags, env=env)

    return started


@pytest.fixture(scope="module")
def right(model, place, tmp_path_factory):
    """Tokens of each adapter as csulora corrects it, by name; `base` for the model's own."""
    folder = tmp_path_factory.mktemp("expected")
    tokens = {"base": tokens_of(model, None)}
    for name in NAMES:
        raw = place / "adapters" / name
        tokens[name] = tokens_of(model, corrected(model, raw, folder / name))
        assert tokens[name] != tokens_of(model, raw)
    return tokens


@pytest.fixture(scope="module")
def long(model, place, tmp_path_factory):
    """Tokens after a prompt that is longer than a block of the prefix cache."""
    fixed = corrected(model, place / "adapters" / "four", tmp_path_factory.mktemp("long") / "four")
    tokens = {"base": tokens_of(model, None, [LONG])[0], "four": tokens_of(model, fixed, [LONG])[0]}
    assert tokens["base"] != tokens["four"]
    return tokens


def answers(server, name):
    return [server.complete(name, prompt) for prompt in PROMPTS]


def entries(place):
    """The cache's folder of each adapter, by the adapter's name."""
    made = decisions(place / "audit.jsonl", "corrected")
    return {line["name"]: place / "cache" / line["key"] for line in made}


def test_evicted_adapters_whose_files_are_spoiled(start, place, right, long):
    """One server, one story; after each chapter all others are as they were."""
    with start() as server:

        def all_right(*names):
            for name in names or ("base", *NAMES):
                assert answers(server, name) == [(200, tokens) for tokens in right[name]], name
            assert server.alive

        all_right()
        all_right()  # each of them evicted by the next
        assert len(decisions(place / "audit.jsonl", "corrected")) == len(NAMES)

        shutil.rmtree(entries(place)["one"])
        all_right()
        assert server.metrics()["csulora_repaired_total"] == 1

        edit_weights(entries(place)["two"], lambda X: 3 * X)
        all_right()
        assert server.metrics()["csulora_repaired_total"] == 2

        # Source and entry are gone: this adapter alone is refused, and comes back with its source.
        moved = (place / "adapters" / "three").rename(place / "three")
        shutil.rmtree(entries(place)["three"])
        status, text = server.complete("three", PROMPTS[0])
        assert status == 400 and text.startswith("csulora refused three: "), text
        all_right("base", "one", "two", "four")
        moved.rename(place / "adapters" / "three")
        all_right()

        # A source that was changed is not what the name stood for when it was loaded.
        edit_weights(place / "adapters" / "one", lambda X: 2 * X)
        shutil.rmtree(entries(place)["one"])
        status, text = server.complete("one", PROMPTS[0])
        assert status == 400 and text.startswith("csulora refused one: "), text
        all_right("base", "two", "three", "four")

        # A disk fails for a while: the base model answers, and the adapter as soon as it can be read.
        all_right("two")  # evicts it
        (place / "unreadable").touch()
        assert server.complete("four", LONG) == (200, long["base"])
        assert server.complete("four", LONG) == (200, long["base"])
        (place / "unreadable").unlink()
        time.sleep(1.1)
        assert server.complete("four", LONG) == (200, long["four"])
        assert server.complete("four", LONG) == (200, long["four"])
        all_right("four", "base", "two", "three")
        assert server.metrics()["csulora_zeroed_total"] == 1
        assert [x["name"] for x in decisions(place / "audit.jsonl", "zeroed")] == ["four"]
        assert [x["name"] for x in decisions(place / "audit.jsonl", "restored")] == ["four"]

        # Between check and reading everything vanishes: the base model answers.
        gone = [entries(place)["four"], place / "adapters" / "four"]
        shutil.copytree(gone[1], place / "four")
        all_right("two")  # evicts it
        (place / "remove").write_text("\n".join(map(str, gone)))
        assert server.complete("four", PROMPTS[0]) == (200, right["base"][0])
        (place / "remove").unlink()
        status, text = server.complete("four", PROMPTS[1])
        assert status == 400 and text.startswith("csulora refused four: "), text
        assert server.metrics()["csulora_zeroed_total"] == 2
        assert " ERROR " in server.said() and "four" in server.said().split(" ERROR ")[-1]
        all_right("base", "two", "three")
        shutil.copytree(place / "four", place / "adapters" / "four")


def test_a_server_that_is_started_again_uses_the_cache(start, place, right):
    before = len(decisions(place / "audit.jsonl", "corrected"))
    with start() as server:
        for name in ("two", "three"):
            assert answers(server, name) == [(200, tokens) for tokens in right[name]]
        assert server.metrics()["csulora_hits_total"] >= 2
    assert len(decisions(place / "audit.jsonl", "corrected")) == before


def test_two_workers_that_share_a_model_read_their_parts_again(start, place, right):
    """A disk that fails for less than their patience, and for more."""
    # Bound, each worker would want a memory node of its own.
    with start("--tensor-parallel-size=2", VLLM_CPU_OMP_THREADS_BIND="nobind") as server:
        guarded = {x for x in server.said().splitlines() if "csulora guards" in x}
        assert len(guarded) >= 4
        before = server.metrics().get("csulora_zeroed_total", 0)  # of servers before this one
        for name in ("base", "two", "three", "two"):
            assert answers(server, name) == [(200, tokens) for tokens in right[name]], name
        (place / "unreadable").touch()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(server.complete, "three", PROMPTS[0])
            time.sleep(1)
            assert not answer.done()
            (place / "unreadable").unlink()
            assert answer.result() == (200, right["three"][0])
        (place / "unreadable").touch()
        try:
            assert server.complete("two", PROMPTS[0], timeout=120) == (200, right["base"][0])
        finally:
            (place / "unreadable").unlink()
        time.sleep(1.1)
        for name in ("two", "three", "base"):
            assert answers(server, name) == [(200, tokens) for tokens in right[name]], name
        assert server.alive and server.metrics()["csulora_zeroed_total"] == before + 2
