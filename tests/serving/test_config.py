"""The operator's file: what it means, and one line for each way in which it can be wrong."""

import os

import pytest
import torch

from csulora import Correction, CsuloraError, Realignment
from csulora.serving import config


def test_the_least_there_can_be(place):
    found = place.config(folders=None, audit=None)
    assert found == config.ServingConfig(
        mode="correct",
        subspace=place.root / "subspace.safetensors",
        method=Correction(),
        fixed_form=False,
        folders=(),
        cache=place.cache,
        cache_bytes=None,
        portable=True,
        dtype=None,
        max_lora_rank=None,
        audit=None,
        trusted_keys=(),
    )


def test_every_key(place, monkeypatch):
    (place.root / "ops.pub").write_text("a key")
    monkeypatch.setenv("HOME", str(place.root))
    found = place.config(
        {"strength": 2.5, "form": "exact"},
        mode="require",
        method="realign",
        cache="~/store",
        cache_bytes="1.5GB",
        form="keep",
        dtype="bfloat16",
        max_lora_rank=64,
        trusted_keys=["ops.pub"],
    )
    assert found.method == Realignment(strength=2.5, form="exact") and found.fixed_form
    assert (found.mode, found.cache) == ("require", place.root / "store")
    assert (found.cache_bytes, found.portable, found.dtype) == (
        1_500_000_000,
        False,
        torch.bfloat16,
    )
    assert (found.max_lora_rank, found.trusted_keys) == (64, (place.root / "ops.pub",))
    assert found.audit == place.root / "audit.jsonl"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1000, 1000), ("7B", 7), ("2 KiB", 2048), ("50GB", 50 * 10**9), ("1TiB", 1 << 40)],
)
def test_sizes(place, given, expected):
    assert place.config(cache_bytes=given).cache_bytes == expected


def test_patterns_keep_their_order(place):
    place.write()
    text = place.file.read_text() + '[settings.strength_for]\n"z*" = 1\n"a*" = "drop"\n'
    place.file.write_text(text)
    found = config.load(place.file).method
    assert list(found.strength_for.items()) == [("z*", 1.0), ("a*", "drop")]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "correctly"}, "mode: must be one of correct, require, observe, off, not 'corr"),
        ({"mode": None}, "mode is missing"),
        ({"subspace": None}, "subspace is missing"),
        ({"cache": None}, "cache is missing"),
        ({"subspace": "typo"}, "subspace: {root}/typo: no such file"),
        ({"subspace": 3}, "subspace: must be a path, not 3"),
        ({"subspace": ""}, "subspace: must be a path, not ''"),
        ({"cache": "a\0b"}, "cache: must be a path, not 'a\\x00b'"),
        ({"folder": "adapters"}, "folder is no key; there are mode, subspace, cache, method, "),
        ({"folders": "adapters"}, "folders: must be a list of paths, not 'adapters'"),
        ({"folders": [1]}, "folders: must be a path, not 1"),
        ({"folders": ["typo"]}, "folders: {root}/typo: no such folder"),
        (
            {"cache": "adapters/cache"},
            "cache: {root}/adapters/cache lies within {root}/adapters or",
        ),
        ({"cache": "."}, "cache: {root} lies within {root}/adapters or around it"),
        ({"method": "realigned"}, "method: must be one of csulora, realign, not 'realigned'"),
        (
            {"cache_bytes": 0},
            "cache_bytes: must be a number of bytes, or text such as 50GB, above 0",
        ),
        ({"cache_bytes": "50 gigs"}, "cache_bytes: must be a number of bytes"),
        ({"cache_bytes": True}, "cache_bytes: must be a number of bytes"),
        ({"cache_bytes": "9" * 400 + "B"}, "cache_bytes: must be a number of bytes"),
        ({"cache_bytes": "9" * 300 + "TB"}, "cache_bytes: must be a number of bytes"),
        ({"form": "exact"}, "form: must be one of portable, keep, not 'exact'"),
        ({"dtype": "int8"}, "dtype: must be one of keep, float32, bfloat16, float16, not 'int8'"),
        ({"max_lora_rank": 0}, "max_lora_rank: must be a whole number, above 0, not 0"),
        ({"max_lora_rank": 1.5}, "max_lora_rank: must be a whole number, above 0, not 1.5"),
        ({"audit": "no/such/file"}, "audit: {root}/no/such: no such folder"),
        ({"audit": "x" * 300 + "/y"}, "audit: {root}/xxxx"),
        ({"subspace": "x" * 300}, "subspace: {root}/xxxx"),
        ({"folders": ["x" * 5000]}, "folders: {root}/xxxx"),
        ({"trusted_keys": ["x" * 300]}, "trusted_keys: {root}/xxxx"),
        ({"trusted_keys": ["typo.pub"]}, "trusted_keys: {root}/typo.pub: no such file"),
        (
            {"settings": {"lambda_of": 3}},
            "settings: 'lambda_of' is no setting; there are lambda_al",
        ),
        ({"settings": {"lambda_off": -1}}, "settings: lambda_off must "),
        ({"settings": {"lambda_off": "much"}}, "settings: lambda_off must "),
        ({"settings": {"form": "portable"}}, "settings: form must be one of exact, same"),
        ({"settings": {"method": "realign"}}, "settings: method is a key of its own"),
        ({"settings": {"strength": 3}}, "settings: 'strength' is no setting"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(place, changes, text):
    settings = changes.pop("settings", None)
    with pytest.raises(CsuloraError) as caught:
        place.config(settings, **changes)
    expected = f"{place.file}: {text.format(root=place.root)}"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("method", ["csulora", "realign"])
@pytest.mark.parametrize("pattern", ["mlp.down_proj", "model.layers.0.mlp"])
def test_a_pattern_without_quotes(place, method, pattern):
    place.write(method=method)
    table = f"[settings.strength_for]\n{pattern} = 0\n"
    place.file.write_text(place.file.read_text() + table)
    with pytest.raises(CsuloraError) as caught:
        config.load(place.file)
    text = str(caught.value)
    assert text.startswith(f"{place.file}: settings: strength_for ")
    assert text.endswith(f'; a pattern with a point in it needs quotes: "{pattern}"')


@pytest.mark.parametrize("content", [b"mode = ", b"\xff\xfe", b"a.b = 1\na = 2", b"[" * 5000])
def test_what_is_no_toml(place, content):
    place.file.write_bytes(content)
    with pytest.raises(CsuloraError, match="not readable as TOML"):
        config.load(place.file)


def test_a_settings_key_that_is_no_table(place):
    place.file.write_text(place.file.read_text() + "settings = 3\n")
    with pytest.raises(CsuloraError, match="settings: must be a table, not 3"):
        config.load(place.file)


def test_off_looks_for_nothing(place):
    assert place.config(mode="off", subspace="gone", folders=["gone"]).mode == "off"


def test_the_environment(place, monkeypatch):
    assert config.from_environment() is None
    monkeypatch.setenv(config.VARIABLE, str(place.file))
    assert config.from_environment() == config.load(place.file)
    for value, text in ((" ", "is set and names no file"), ("/no/such.toml", "no such file")):
        monkeypatch.setenv(config.VARIABLE, value)
        with pytest.raises(CsuloraError, match=text):
            config.from_environment()


def test_relative_to_the_file_and_not_to_the_process(place, monkeypatch):
    monkeypatch.chdir(place.adapters)
    given = os.path.relpath(place.file)
    assert config.load(given).subspace == place.root / "subspace.safetensors"
