"""`csulora serve-check` on folders: what it says is what a guard does."""

import json
import shutil
import tempfile

import builders
import pytest
import torch
from test_canary import REFUSED, by_vllm, serving

from csulora.errors import CsuloraError, DiskFullError
from csulora.serving import canary, config, forms
from csulora.serving.check import server_config
from csulora.serving.guard import Guard, RefusedError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A configuration, a folder of adapters, and a temporary folder of its own."""
    builders.write_subspace(tmp_path / "subspace.safetensors")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "in").mkdir()
    configure(tmp_path)
    return tmp_path


def configure(place, strength=1.0, **changes):
    values = {"mode": "correct", "subspace": "subspace.safetensors", "cache": "cache"}
    values |= {"folders": ["in"]} | changes
    settings = dict.fromkeys(("lambda_left", "lambda_right", "lambda_off"), strength)
    builders.write_guard(place / "csulora.toml", settings, **values)


def check(capsys, place, *arguments):
    """Exit code, and what was found of each adapter by its name."""
    call = ("serve-check", "--config", place / "csulora.toml", "--json", *arguments)
    result = builders.run(capsys, *call)
    found = json.loads(result.out)
    assert found["format"] == "csulora_serve_check/1"
    by_name = {entry["folder"].rpartition("/")[2]: entry for entry in found["adapters"]}
    return result, by_name, found["smallest_max_lora_rank"]


def test_each_adapter_gets_what_a_guard_would_give_it(capsys, place):
    folders = {
        "four": builders.write_adapter(place / "in" / "four"),
        "nine": builders.write_adapter(place / "in" / "nine", rank=9),
        "dora": builders.write_adapter(place / "in" / "dora"),
    }
    magnitude = f"{builders.PREFIX}{builders.LAYERS[0]}.lora_magnitude_vector"
    builders.edit_tensors(
        folders["dora"] / builders.WEIGHTS, lambda t: t.update({magnitude: torch.ones(24)})
    )
    result, found, least = check(capsys, place, "--max-lora-rank", 8)
    assert result.code == 1
    guard = Guard(config.load(place / "csulora.toml"))
    guard.open()
    for name, folder in folders.items():
        try:
            admitted = guard.admit(folder, name, max_rank=8)
        except RefusedError as error:
            assert not found[name]["served"] and found[name]["rank"] == 0
            assert (found[name]["reason"], found[name]["error"]) == (error.reason, str(error))
        else:
            assert found[name]["served"] and found[name]["how"] == admitted.how == "corrected"
            assert (found[name]["form"], found[name]["rank"]) == (admitted.form, admitted.rank)
    assert [found[name]["max_lora_rank"] for name in folders] == [8, 16, None]
    assert found["nine"]["reason"] == "rank" and least == 16
    assert sum("csulora: refused: " in line for line in result.err.splitlines()) == 2


def test_the_smallest_rank_is_where_the_last_refusal_ends(capsys, place):
    for rank in (3, 9):
        builders.write_adapter(place / "in" / str(rank), rank=rank)
    _, _, least = check(capsys, place)
    for limit in forms.MAX_RANKS:
        result, _, again = check(capsys, place, "--max-lora-rank", limit)
        assert (result.code == 0) == (limit >= least) and again == least
    _, found, least = check(capsys, place, "--stack", "sglang")  # which takes any number
    assert least == 9 and found["3"]["max_lora_rank"] == 3


def test_a_form_that_fits_badly_needs_the_rank_of_the_other(capsys, place):
    configure(place, strength=100)
    builders.write_adapter(place / "in" / "nine", rank=9)
    result, found, least = check(capsys, place, "--max-lora-rank", 16)
    assert result.code == 1 and found["nine"]["reason"] == "rank error"
    assert found["nine"]["max_lora_rank"] == least == 32


def test_what_the_stack_itself_refuses(capsys, place):
    builders.write_adapter(place / "in" / "saved", modules_to_save=["embed_tokens"])
    builders.write_adapter(place / "in" / "pattern", target_modules=".*proj")
    _, found, _ = check(capsys, place)
    assert found["saved"]["reason"] == "stack" and "modules_to_save" in found["saved"]["error"]
    assert found["pattern"]["served"]
    _, found, _ = check(capsys, place, "--stack", "sglang")
    assert found["saved"]["served"]
    assert found["pattern"]["reason"] == "stack" and ".*proj" in found["pattern"]["error"]


def test_vllm_counts_ranks_that_no_module_has(capsys, place):
    builders.write_adapter(place / "in" / "one", rank_pattern={"nowhere": 99})
    for form, needs in (("portable", 8), ("keep", 256)):
        configure(place, form=form)
        result, found, least = check(capsys, place, "--max-lora-rank", 64)
        assert found["one"]["served"] == (form == "portable") == (result.code == 0)
        assert found["one"]["max_lora_rank"] == least == needs
    assert found["one"]["reason"] == "stack" and "says rank 198" in found["one"]["error"]
    assert check(capsys, place, "--max-lora-rank", 256)[1]["one"]["served"]
    assert check(capsys, place, "--max-lora-rank", 8, "--stack", "sglang")[1]["one"]["served"]


def test_sglang_gets_the_portable_form_whatever_is_configured(capsys, place):
    configure(place, form="keep")
    builders.write_adapter(place / "in" / "one", alpha_pattern={"q_proj": 3})
    _, found, _ = check(capsys, place, "--stack", "sglang", "--max-lora-rank", 8)
    assert found["one"]["served"] and found["one"]["rank"] == 8
    given = config.load(place / "csulora.toml")
    assert server_config(given, "sglang").portable and not server_config(given, "vllm").portable


@pytest.mark.parametrize("mode", ["observe", "off", "require"])
def test_the_mode_is_that_which_protects(capsys, place, mode):
    configure(place, mode=mode)
    builders.write_adapter(place / "in" / "one")
    result, found, _ = check(capsys, place)
    assert found["one"]["served"] == (mode != "require")
    assert (f"mode is {mode}; this is what correct would do" in result.err) == (mode != "require")


@pytest.mark.parametrize("spoiled", [False, True])
def test_what_the_cache_holds_counts_where_it_is_required(capsys, place, spoiled):
    configure(place, mode="require", cache_bytes=1)  # a server would evict
    for name, seed in (("one", 0), ("two", 1)):
        builders.write_adapter(place / "in" / name, seed=seed)
    call = ("prewarm", place / "in" / "one", "--config", place / "csulora.toml")
    configure(place, mode="require")
    assert builders.run(capsys, *call, "--max-lora-rank", 8).code == 0
    configure(place, mode="require", cache_bytes=1)
    (weights,) = (place / "cache").glob(f"*/{builders.WEIGHTS}")
    if spoiled:
        weights.write_bytes(b"x")
    before = builders.tree(place)
    times = [path.stat().st_mtime_ns for path in sorted(place.rglob("*")) if path.is_file()]
    result, found, least = check(capsys, place, "--max-lora-rank", 8)
    assert result.code == 1 and least == 8
    assert found["one"]["how"] == ("repaired" if spoiled else "hit")
    assert (found["one"]["form"], found["one"]["rank"]) == ("exact", 8)
    assert found["two"]["reason"] == "not corrected" and found["two"]["max_lora_rank"] is None
    found = check(capsys, place, "--max-lora-rank", 1)[1]["one"]
    assert (found["reason"], found["max_lora_rank"]) == ("rank", 8)
    assert builders.tree(place) == before
    after = [path.stat().st_mtime_ns for path in sorted(place.rglob("*")) if path.is_file()]
    assert after == times


def test_a_record_without_its_entry_is_none_to_a_server(capsys, place):
    configure(place, mode="require")
    builders.write_adapter(place / "in" / "one")
    builders.run(capsys, "prewarm", "--config", place / "csulora.toml")
    (weights,) = (place / "cache").glob(f"*/{builders.WEIGHTS}")
    shutil.rmtree(weights.parent)
    assert check(capsys, place)[1]["one"]["reason"] == "not corrected"


UNFIT = {
    "audit is a folder": ({"audit": "in"}, "audit", "not a regular file"),
    "audit is a link": ({"audit": "link"}, "audit", "not a regular file"),
    "audit's name": ({"audit": "x" * 300}, "audit", "File name too long"),
    "cache is a file": ({"cache": "csulora.toml"}, "cache", "is a link or no folder"),
    "cache below a file": ({"cache": "csulora.toml/c"}, "cache", "Not a directory"),
    "cache is a link": ({"cache": "link"}, "cache", "is a link or no folder"),
    "cache is open": ({"cache": "open"}, "cache", "others may enter it"),
    "cache's name": ({"cache": "x" * 300}, "cache", "File name too long"),
    "cache below another's": ({"cache": "/proc/1/c"}, "cache", "cannot be used"),
}


@pytest.mark.parametrize("mode", ["correct", "require"])
@pytest.mark.parametrize("way", UNFIT)
def test_where_no_server_would_start_the_check_is_wrong(capsys, place, way, mode):
    changes, key, text = UNFIT[way]
    builders.write_adapter(place / "in" / "one")
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    (place / "link").symlink_to("csulora.toml")
    configure(place, mode=mode, **changes)
    with pytest.raises(CsuloraError) as caught:
        Guard(config.load(place / "csulora.toml")).check_start()
    before = builders.tree(place)
    result = builders.run(capsys, "serve-check", "--config", place / "csulora.toml")
    assert result.code == 2 and result.out == "" and len(result.complaints) == 1
    assert f"{key}: " in result.err and text in result.err and str(caught.value) in result.err
    assert builders.tree(place) == before
    with pytest.raises(CsuloraError, match=f"^{key}: "):
        Guard(config.load(place / "csulora.toml")).open()


def test_a_start_that_would_make_cache_and_log_is_left_to_the_server(capsys, place):
    builders.write_adapter(place / "in" / "one")
    configure(place, cache="deep/cache", audit="audit.jsonl")
    before = builders.tree(place)
    assert check(capsys, place)[0].code == 0 and builders.tree(place) == before


@pytest.mark.parametrize("content", ["nothing", "links"])
def test_a_folder_without_adapters_is_said_to_be_one(capsys, place, content):
    if content == "links":
        builders.write_adapter(place / "elsewhere")
        (place / "in" / "one").symlink_to(place / "elsewhere")
    call = ("serve-check", "--config", place / "csulora.toml")
    result = builders.run(capsys, *call)
    assert result.code == 2 and "configuration's folders hold none" in result.err
    result = builders.run(capsys, *call, place / "in")
    assert result.code == 2 and f"{place / 'in'}: there are no adapters in it" in result.err


def test_nothing_is_kept(capsys, place):
    builders.write_adapter(place / "in" / "one")
    before = builders.tree(place)
    assert check(capsys, place)[0].code == 0
    assert builders.tree(place) == before
    assert list((place / "temporary").iterdir()) == [] and not (place / "cache").exists()


def test_a_table_for_people(capsys, place, monkeypatch):
    monkeypatch.setenv(config.VARIABLE, str(place / "csulora.toml"))
    builders.write_adapter(place / "in" / "four")
    builders.write_adapter(place / "in" / "nine", rank=9)
    result = builders.run(capsys, "serve-check", place / "in" / "four", place / "in" / "nine")
    assert result.code == 0
    assert "2 would be served, 0 refused" in result.out
    assert result.out.endswith("the smallest max_lora_rank that takes all that any takes: 16\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere",), "nowhere: no such folder"),
        (("--max-lora-rank", 17), "--max-lora-rank of vLLM is one of 1, 8, 16"),
        (("--stack", "sglang", "--max-lora-rank", 0), "must be above 0"),
        (("--canary-dir", "."), "--canary-dir is for --url"),
        (("--config", "missing.toml"), "missing.toml: no such file"),
        (("--url", "http://127.0.0.1:9"), "--url asks a running server"),
    ],
)
def test_a_wrong_call_is_2(capsys, place, arguments, text):
    call = ("serve-check", "--config", place / "csulora.toml", *arguments)
    result = builders.run(capsys, *call)
    assert result.code == 2 and text in result.err


def test_without_a_configuration_the_call_is_wrong(capsys, monkeypatch):
    monkeypatch.delenv(config.VARIABLE, raising=False)
    result = builders.run(capsys, "serve-check", "x")
    assert result.code == 2 and "no configuration" in result.err


def test_a_server_is_asked_with_its_key(capsys, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    path = canary.ENDPOINTS["vllm"][0]
    with serving({path: by_vllm(REFUSED, 422)}) as (url, server):
        call = ("serve-check", "--url", url, "--api-key-env", "KEY")
        result = builders.run(capsys, *call)
        assert result.code == 0 and "refused the canary" in result.out
        found = json.loads(builders.run(capsys, *call, "--json").out)
    assert found["ok"] and found["format"] == "csulora_serve_check/1"
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in result.out + result.err
    assert (
        builders.run(capsys, *call[:2], url, "--timeout", 2).code == 1
    )  # nobody is there any more


@pytest.mark.parametrize("more", [("--api-key-env", "NO_SUCH"), ("--timeout", 0)])
def test_a_wrong_question_is_2(capsys, more):
    assert builders.run(capsys, "serve-check", "--url", "http://127.0.0.1:9", *more).code == 2


def test_no_room_for_the_check_says_nothing_of_an_adapter(capsys, place, monkeypatch):
    builders.write_adapter(place / "in" / "one")

    def full(*_, **__):
        raise DiskFullError("No space left on device")

    monkeypatch.setattr("csulora.serving.entries.write_folder", full)
    result = builders.run(capsys, "serve-check", "--config", place / "csulora.toml")
    assert result.code != 0 and result.out == ""
    assert len(result.complaints) == 1 and "No space left" in result.complaints[0]
