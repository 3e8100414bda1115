"""`csulora prewarm`: the cache is full before a server asks."""

import json
from pathlib import Path

import builders
import pytest
from builders import WEIGHTS

from csulora.serving.config import VARIABLE


def prewarm(capsys, place, *arguments):
    return builders.run(capsys, "prewarm", "--config", place.file, *arguments)


def test_all_adapters_of_the_folders(capsys, place, monkeypatch):
    folders = [place.adapter(name, seed=i) for i, name in enumerate(("one", "org/two", "three"))]
    result = prewarm(capsys, place, "--jobs", 2)
    assert (result.code, result.out) == (0, f"3 corrected: {place.cache}\n")
    assert "prewarming 3/3" in result.err and len(place.entries()) == 3
    monkeypatch.setenv(VARIABLE, str(place.file))
    result = builders.run(capsys, "prewarm", "--json")
    said = json.loads(result.out)
    assert said["format"] == "csulora_prewarm/1" and said["counts"] == {"hit": 3}
    assert sorted(entry["adapter"] for entry in said["adapters"]) == sorted(map(str, folders))
    g = place.guard(mode="require")  # the keys are those that a server asks for
    for folder in folders:
        assert g.admit(folder, "x").how == "hit"


def test_for_a_server_that_only_takes_what_is_there(capsys, place):
    folder = place.adapter()
    place.write(mode="require", max_lora_rank=1)
    assert prewarm(capsys, place, folder, "--max-lora-rank", 8).code == 0
    assert place.guard(mode="require").admit(folder, "x", max_rank=8).rank == 8


def test_what_names_reach_by_a_link(capsys, place):
    place.adapter(".store/v3")
    (place.adapters / "current").symlink_to(".store/v3")
    (place.adapters / "latest").symlink_to("current")
    result = prewarm(capsys, place)
    assert (result.code, result.out) == (0, f"1 corrected: {place.cache}\n")
    g = place.guard(mode="require")
    assert g.admit(g.find("current"), "current").how == "hit"


def test_what_is_refused_is_named_and_the_rest_is_made(capsys, place):
    one, two = place.adapter("one"), place.adapter("two")
    (two / WEIGHTS).write_bytes(b"x")
    result = prewarm(capsys, place, one, two, place.root / "nowhere", "--json")
    assert result.code == 1 and len(result.complaints) == 2
    assert str(two) in result.err and "nowhere: no such adapter folder" in result.err
    first, second, third = json.loads(result.out)["adapters"]
    assert (first["how"], first["rank"], first["form"]) == ("corrected", 8, "exact")
    assert (second["how"], second["reason"]) == ("failed", "source")
    assert (third["how"], third["reason"]) == ("failed", "missing")


def test_more_than_the_cache_holds(capsys, place):
    for i in range(3):
        place.adapter(str(i), seed=i)
    place.write(cache_bytes=1)
    result = prewarm(capsys, place, "--jobs", 1)
    assert result.code == 1 and "cache_bytes is too small for all" in result.err
    assert len(result.complaints) >= 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--jobs", 0), "--jobs must be at least 1"),
        (("--max-lora-rank", 0), "--max-lora-rank must be at least 1"),
        ((), "no adapters: none are named"),
        (("no*thing",), "matches no folder"),
        ((Path(__file__).parent,), "there are no adapters in it"),
        (("--config", "/no/such.toml"), "no such file"),
    ],
)
def test_calls_that_are_wrong(capsys, place, arguments, text):
    result = prewarm(capsys, place, *arguments)
    assert result.code == 2 and text in result.err and len(result.complaints) == 1


def test_without_a_configuration(capsys):
    result = builders.run(capsys, "prewarm", "x")
    assert result.code == 2 and f"--config or {VARIABLE}" in result.err
