"""Pattern keys: PEFT says which key a name meets; what takes long is refused at once."""

import random
import time

import builders
import pytest

from csulora import CsuloraError
from csulora.files import patterns
from csulora.files.patterns import Pattern

get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key


def first(keys, name):
    """The first of some keys that a name meets, and the name itself if none, as PEFT says it."""
    pattern = Pattern("adapter_config.json", "rank_pattern", dict.fromkeys(keys, 1), 2)
    key = pattern.key(name)
    return name if key is None else key


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.12.mlp.down_proj",
    "model.language_model.layers.2.mlp.up_proj",
    "base.h.3.attn.c_attn",
    "q_proj",
    "my.q_proj",
    "xq_proj",
    "layersX1Xq",
    "lm_head",
    "a-b.c",
    "a.b-c",
]

# Keys that people write.
ORDINARY = [
    "q_proj",
    r"layers\.(0|1)\.self_attn\.(q|v)_proj",
    "model.layers.(0|1|2).self_attn.q_proj",
    r"layers\.[0-9]+\.mlp",
    r".*\.mlp\..*",
    r".*\.q_proj",
    "^model.layers.0.self_attn.q_proj$",
    r"^model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj",
    r"(?:[0-9]+)?x",
    "q_proj|v_proj",
    r"^q_proj|down_proj$",
    "layers.1.q",
    r"layers\.1\d?\.mlp\.down_proj",
    r"layers\.[1-9][0-9]{0,2}\.mlp\.down_proj",
    r"[^.]+\.[a-z_]*proj",
    r"\w+_proj",
    ".*?proj",
    "a-b.c",
    r"a\-b\.c",
    ".*",
    "(a|b.(c|d))",
    "a{2}",
    "q_proj(|x)",
]


@pytest.mark.parametrize("key", ORDINARY)
def test_ordinary_keys_match_as_in_peft(key):
    for name in NAMES:
        assert first([key], name) == get_pattern_key([key], name), name


# What nobody writes, and what takes Python's matcher for ever or means something else than it seems.
HOSTILE = [
    "([a-z0-9_.]+)+!",
    "(a|aa)+",
    "((a|b))*x",
    "(.*a){12}",
    ".*.*.*.*.*x",
    "(a*)*",
    "a?" * 40,
    "(?#(a+)+)" + "b",
    "(?:(?#x)a+)+",
    "(?=a)b",
    r"(a)\1",
    "(?P<n>a)",
    "(?i)a",
    "a++",
    "a**",
    "x)|(.*",
    "[z-a]",
    "[[a]",
    "[a--b]",
    "a{3,2}",
    "a{1000}",
    "a|",
    "",
    "^",
    "a^b",
    "a$b",
    "(^a|b)",
    "(",
    "a\\",
    "\\b",
    "a\nb",
    "x" * 5000,
    "(" * 5000 + ")" * 5000,
]


@pytest.mark.parametrize("key", HOSTILE, ids=lambda key: key[:12])
def test_other_keys_are_refused_in_one_short_line(key):
    start = time.process_time()
    with pytest.raises(CsuloraError, match=r"^adapter_config.json: rank_pattern key '") as error:
        first([key], "a" * 1000)
    assert time.process_time() - start < 0.5
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_the_first_key_counts_as_in_peft():
    """Random keys, with and without dots that stand for anything, over random names."""
    generator = random.Random(0)
    parts = ["a", "b", "ab", "x1", "0", "1", "q_proj", "mlp"]
    pieces = [
        *parts,
        ".",
        ".",
        r"\.",
        ".*",
        r"\d+",
        "(a|b)",
        "[ab]",
        "(?:a|mlp.x1)?",
        "[0-9]*",
        "^",
        "|",
    ]
    found = 0
    for _ in range(600):
        keys = {"".join(generator.choices(pieces, k=generator.randint(1, 5))) for _ in range(6)}
        keys = [key for key in keys if taken(key)]
        for _ in range(4):
            name = ".".join(generator.choices(parts, k=generator.randint(1, 5)))
            key = first(keys, name)
            assert key == get_pattern_key(keys, name), (keys, name)
            found += key != name
    assert found > 500


def taken(key):
    try:
        return bool(first([key], "a"))
    except CsuloraError:
        return False


MANY = {
    "names in full": [f"model.layers.{i}.self_attn.q_proj" for i in range(30_000)],
    "dots anywhere": [f"{i:017b}".replace("0", ".").replace("1", "a") for i in range(50_000)],
    "stars": [f".*{i}.*{i + 1}.*{i + 2}.*" for i in range(2_000)],
    "one star": [f"k{i}.*x" for i in range(100_000)],
    "wide sets": ["(" + "|".join("[a-z.]" for _ in range(200)) + ")" + str(i) for i in range(500)],
    "more than anybody has": [f"k{i}" for i in range(200_000)],
}


@pytest.mark.parametrize("case", MANY)
def test_many_keys_end_soon(case):
    """Matched, or refused, in a few seconds of processor time whatever they are."""
    start = time.process_time()
    try:
        pattern = Pattern("adapter_config.json", "rank_pattern", dict.fromkeys(MANY[case], 1), 2)
        for i in range(200):
            pattern(f"{'a.' * 100}{i}.self_attn." + "a" * 600 + "0" * (i % 2))
    except CsuloraError as error:
        assert "keys" in str(error)
    assert time.process_time() - start < 6


def test_a_name_of_two_lines_meets_no_keys():
    with pytest.raises(CsuloraError, match="no key can be matched with"):
        first(["a"], "b.\na")


def test_one_key_with_four_stars_meets_a_long_name():
    start = time.process_time()
    assert first([r".*a.*a.*a.*!"], "a." * 480 + "a") != ".*a.*a.*a.*!"
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("key", ["a?" * 40, "((?#)a+)+b", "q_proj(?=x)"])
def test_a_command_refuses_hostile_keys(key, adapter, subspace, out, capsys):
    builders.edit_json(adapter / builders.CONFIG, alpha_pattern={key: 3})
    result = builders.run(capsys, "correct", adapter, "--subspace", subspace, "--out-dir", out)
    assert result.code == 1 and len(result.complaints) == 1, result.err
    assert all(word in result.complaints[0] for word in (builders.CONFIG, "alpha_pattern"))
    assert not (out / "lora").exists()


def test_a_name_costs_its_work_once(monkeypatch):
    pattern = Pattern("adapter_config.json", "rank_pattern", {r".*layers\.1\..*q_proj": 4}, 2)
    assert pattern("model.layers.1.self_attn.q_proj") == 4
    monkeypatch.setattr(patterns, "MOST_WORK", 0)
    scaled = pattern.replaced({r".*layers\.1\..*q_proj": 8}, 4)
    assert scaled("model.layers.1.self_attn.q_proj") == 8
    with pytest.raises(CsuloraError, match="too long"):
        pattern("model.layers.2.self_attn.q_proj")
