"""One guarded server and many adapters: right tokens or a refusal, whichever way an adapter comes in."""

import itertools
import json
import shutil
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from builders import edit_json, write_guard
from safetensors.torch import load_file, save_file
from serving_world import (
    KINDS,
    PROMPTS,
    build_adapter,
    corrected,
    decisions,
    edit_weights,
    tokens_of,
)
from vllm_process import MARKS, environment, serving

pytestmark = MARKS
SHARED = [f"shared-{i}" for i in range(5)]
LONG = list(range(2, 202))  # more than a block of the prefix cache


def with_peft(model, folder, **options):
    """An adapter of a kind that is not of the served ones."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model / "aligned")
    options = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(folder)


def pickled(model, folder):
    build_adapter(model, folder)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def not_a_number(model, folder):
    build_adapter(model, folder)
    edit_weights(folder, lambda X: X.index_fill(0, torch.tensor([0]), torch.nan))


def rename(folder, old, new):
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace(old, new): X for name, X in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def foreign_names(model, folder):
    build_adapter(model, folder)
    rename(folder, "lora_A", "lora_down")


def truncated(model, folder):
    build_adapter(model, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_bias(model, folder):
    with_peft(model, folder, bias="lora_only")


REFUSED = {
    "pickle": pickled,
    "nan": not_a_number,
    "foreign": foreign_names,
    "truncated": truncated,
    "dora": lambda model, folder: with_peft(model, folder, use_dora=True),
    "saved": lambda model, folder: with_peft(model, folder, modules_to_save=["lm_head"]),
    "embedding": lambda model, folder: with_peft(model, folder, target_modules=["embed_tokens"]),
    "rank": lambda model, folder: with_peft(model, folder, r=200),
}


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """Adapters: those in `adapters` are known by name, those in `stock` to vLLM's own resolver too."""
    folder = tmp_path_factory.mktemp("guarded")
    for kind in KINDS:
        build_adapter(model, folder / "adapters" / kind, kind)
    for name in SHARED:
        build_adapter(model, folder / "adapters" / name, seed=7)
    build_adapter(model, folder / "adapters" / "a-slow", seed=8)
    build_adapter(model, folder / "adapters" / "static", seed=9)
    build_adapter(model, folder / "elsewhere" / "reload", seed=10)
    build_adapter(model, folder / "elsewhere" / "long-names", seed=13)
    build_adapter(model, folder / "adapters" / "short-names", seed=13)
    rename(folder / "adapters" / "short-names", "base_model.model.", "")
    for name, make in REFUSED.items():
        make(model, folder / "adapters" / f"bad-{name}")
    build_adapter(model, folder / "stock" / "stock-good", seed=11)
    for name in ("stock-bad", "bad-nan"):
        not_a_number(model, folder / "stock" / name)
    for place in ("stock", "first"):
        build_adapter(model, folder / place / f"{place}-and-known", seed=14)
        not_a_number(model, folder / place / f"bad-{place}-and-known")
        for name in (f"{place}-and-known", f"bad-{place}-and-known"):
            shutil.copytree(folder / place / name, folder / "adapters" / name)
    for adapter in (*(folder / "stock").iterdir(), *(folder / "first").iterdir()):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model / "aligned"))
    (folder / "outside").symlink_to(folder / "stock" / "stock-good")
    return folder


@pytest.fixture(scope="module")
def server(model, place, plugin):
    config = write_guard(
        place / "serving.toml",
        mode="correct",
        subspace=str(model / "subspace.safetensors"),
        folders=["adapters"],
        cache="cache",
        audit="audit.jsonl",
    )
    env = environment(
        config,
        [plugin],
        TEST_FOLDER=str(place),
        VLLM_LORA_RESOLVER_CACHE_DIR=str(place / "stock"),
    )
    flags = ("--max-lora-rank=128", "--max-loras=4", "--max-cpu-loras=64")
    modules = f"--lora-modules=static={place / 'adapters' / 'static'}"
    with serving(model / "aligned", place / "server.log", *flags, modules, env=env) as running:
        yield running
        assert running.alive


@pytest.fixture(scope="module")
def expected(model, place, tmp_path_factory):
    """Tokens of an adapter as csulora corrects it, which are not those of the adapter or the model."""
    folder, number = tmp_path_factory.mktemp("expected"), itertools.count()

    def tokens(adapter, prompts=PROMPTS):
        right = tokens_of(model, corrected(model, adapter, folder / str(next(number))), prompts)
        assert right != tokens_of(model, adapter, prompts) != tokens_of(model, None, prompts)
        return right

    return tokens


def asked(server, name, prompts=PROMPTS):
    return [server.complete(name, prompt) for prompt in prompts]


def fine(tokens):
    return [(200, right) for right in tokens]


def test_each_process_says_that_it_is_guarded(server):
    lines = [line for line in server.said().splitlines() if "csulora guards" in line]
    assert len({line.partition("process ")[2] for line in lines}) >= 3, server.said()[-3000:]
    assert server.metrics()['csulora_guard{mode="correct"}'] == 1


def test_the_base_model_is_as_ever(server, model):
    assert asked(server, "base") == fine(tokens_of(model, None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_answers_as_peft_does_with_the_corrected_adapter(kind, server, place, expected):
    assert asked(server, kind) == fine(expected(place / "adapters" / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_one_that_is_loaded(kind, server, place, expected):
    status, text = server.load(f"loaded-{kind}", place / "adapters" / kind)
    assert status == 200, text
    assert asked(server, f"loaded-{kind}") == fine(expected(place / "adapters" / kind))


def test_so_does_one_whose_names_lack_the_prefix_of_peft(server, place, expected):
    """PEFT reads nothing of such a folder, and vLLM all of it."""
    assert asked(server, "short-names") == fine(expected(place / "elsewhere" / "long-names"))


def test_so_does_one_of_the_command_line(server, place, expected):
    assert asked(server, "static") == fine(expected(place / "adapters" / "static"))


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_corrected_is_refused_with_its_reason(why, server, model, place):
    name = f"bad-{why}"
    status, text = server.complete(name, PROMPTS[0])
    assert status == 422 and text.startswith(f"csulora refused {name}: "), text
    status, text = server.load("bad", place / "adapters" / name)
    assert status == 422 and text.startswith("csulora refused bad: "), text
    assert not {"bad", name} & {x["id"] for x in json.loads(server.ask("/v1/models")[1])["data"]}
    assert asked(server, "base") == fine(tokens_of(model, None))


@pytest.mark.parametrize("name", ["../stock/stock-good", "../outside", "{place}/stock/stock-good"])
def test_names_stay_inside_the_folders(name, server, place):
    status, text = server.complete(name.format(place=place), PROMPTS[0])
    assert status == 422 and text.startswith("csulora refused "), text


def test_unknown_names_are_unknown(server):
    status, text = server.complete("nobody", PROMPTS[0])
    assert status == 404 and "does not exist" in text


@pytest.mark.parametrize("path", ["some/adapter-of-the-hub", "/nowhere/at/all"])
def test_what_is_not_there_is_refused(path, server):
    status, text = server.load("absent", path)
    assert status == 422 and text.startswith("csulora refused absent: "), text


def test_what_only_vllms_own_resolver_knows_is_corrected_too(server, place, expected):
    assert asked(server, "stock-good") == fine(expected(place / "stock" / "stock-good"))


@pytest.mark.parametrize("name", ["stock-bad", "bad-nan"])
def test_vllms_own_resolver_serves_nothing_that_is_refused(name, server):
    status, text = server.complete(name, PROMPTS[0])
    assert status == {"stock-bad": 400, "bad-nan": 422}[name], text


@pytest.mark.parametrize(("place_of", "by"), [("stock", "Resolver"), ("first", "First")])
def test_beside_vllms_own_resolver_on_the_same_adapters(place_of, by, server, place, expected):
    """Whichever of the two is asked first: one that is asked before csulora's finds the raw folder."""
    name = f"{place_of}-and-known"
    assert asked(server, name) == fine(expected(place / "adapters" / name))
    assert f"'{name}' using {by}\n" in server.said()
    status, text = server.complete(f"bad-{name}", PROMPTS[0])
    assert status == 422 and text.startswith(f"csulora refused bad-{name}: "), text


def test_many_first_requests_over_names_of_one_source_make_one_correction(server, place, expected):
    right = fine(expected(place / "adapters" / SHARED[0], PROMPTS[:1]))
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda i: asked(server, SHARED[i % 5], PROMPTS[:1]), range(50)))
    assert answers == [right] * 50
    made = decisions(place / "audit.jsonl", "corrected")
    assert len([line for line in made if line["name"] in SHARED]) == 1


def test_other_requests_go_on_while_an_adapter_is_corrected(server, place, expected):
    """As often as just before and after, in the middle, whatever else the machine does: a correction that
    held them up for its four seconds would be one gap. The longest gap tells of the machine as well."""
    right = fine(expected(place / "adapters" / "a-slow", PROMPTS[:1]))
    ended = threading.Event()
    times = []

    def others():
        while not ended.is_set():
            assert server.complete("plain", PROMPTS[0], tokens=2)[0] == 200
            times.append(time.monotonic())

    with ThreadPoolExecutor(1) as thread:
        stream = thread.submit(others)
        time.sleep(4)
        began = time.monotonic()
        try:
            assert asked(server, "a-slow", PROMPTS[:1]) == right
            finished = time.monotonic()
            time.sleep(4)
        finally:
            ended.set()
        stream.result()
    gaps = {"before": [], "during": [], "after": []}
    for a, b in itertools.pairwise(times):
        gaps["before" if b < began else "during" if a < finished else "after"].append(b - a)
    usual = max(statistics.median(gaps[when]) for when in ("before", "after"))
    told = {
        when: (len(g), round(statistics.median(g), 3), round(max(g), 3)) for when, g in gaps.items()
    }
    print(f"a correction took {finished - began:.2f} s; count, median and longest gap: {told}")
    assert finished - began > 4
    assert statistics.median(gaps["during"]) < 3 * usual, told
    assert max(gaps["during"]) < (finished - began) / 2, told


def test_changed_weights_that_are_loaded_in_place_are_not_stale(server, model, place, expected):
    adapter = place / "elsewhere" / "reload"
    assert server.load("reload", adapter)[0] == 200
    first = expected(adapter, [LONG])
    assert asked(server, "reload", [LONG]) == asked(server, "reload", [LONG]) == fine(first)
    shutil.rmtree(adapter)
    build_adapter(model, adapter, seed=12)
    status, text = server.load("reload", adapter, load_inplace=True)
    assert status == 200, text
    second = expected(adapter, [LONG])
    assert second != first and asked(server, "reload", [LONG]) == fine(second)


def test_a_clean_adapter_is_right_after_one_with_nan_was_asked_for(server, place, expected):
    assert server.complete("bad-nan", PROMPTS[0])[0] == 422
    right = fine(expected(place / "adapters" / "plain"))
    assert asked(server, "plain") + asked(server, "plain") == right + right


def test_the_counters_are_those_of_the_audit_log(server, place):
    shown = server.metrics()
    made = decisions(place / "audit.jsonl", "corrected")
    assert shown["csulora_corrected_total"] == len(made) > len(KINDS)
    refused = sum(v for k, v in shown.items() if k.startswith("csulora_refused_total{"))
    assert refused == len(decisions(place / "audit.jsonl", "refused")) > len(REFUSED)
    assert "csulora_zeroed_total" not in shown
