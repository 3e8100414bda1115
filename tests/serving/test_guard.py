"""What is admitted, in which form, and that nothing uncorrected ever is."""

import gc
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
import torch
from builders import CONFIG, REPORT, WEIGHTS
from refusing import add, refused

import csulora
from csulora.serving import counters, guard
from csulora.serving.guard import RefusedError, refusal_text
from csulora.serving.signature import new_key


def test_an_entry_is_what_correct_folder_makes(place):
    folder = place.adapter()
    (folder / "extra.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    g = place.guard({"lambda_off": 30})
    found = g.admit(folder, "one")
    assert (found.how, found.rank, found.form) == ("corrected", 8, "exact")
    assert found.path == place.cache / found.key
    expected = place.root / "expected"
    subspace = csulora.SafetySubspace.load(place.root / "subspace.safetensors")
    csulora.correct_folder(
        folder, subspace, expected, csulora.Correction(lambda_off=30), portable=True
    )
    entry = builders.tree(found.path)
    # A server may read any safetensors file of a folder: nothing else is in it.
    assert entry.keys() == {WEIGHTS, CONFIG, REPORT}
    for name in (WEIGHTS, CONFIG):
        assert entry[name] == (expected / name).read_bytes()
    assert g.admit(folder, "one").how == "hit"
    assert counters.collect()["corrected", ""] == counters.collect()["hits", ""] == 1


def test_the_key_is_of_what_determines_the_result(place):
    folder = place.adapter()
    key = place.guard().admit(folder, "one").key
    for settings, changes in (
        ({"lambda_off": 11}, {}),
        ({"form": "same", "lambda_off": 0.01}, {}),
        ({}, {"method": "realign"}),
        ({}, {"form": "keep"}),
        ({}, {"dtype": "bfloat16"}),
    ):
        assert place.guard(settings, **changes).admit(folder, "one").key != key
    assert place.guard(folders=None, audit=None).admit(folder, "another name").key == key
    copy = shutil.copytree(folder, place.root / "copy")
    assert place.guard().admit(copy, "copy").key == key
    builders.edit_json(copy / CONFIG, lora_alpha=9)
    assert place.guard().admit(copy, "copy").key != key
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert place.guard().admit(folder, "one").key != key
    builders.write_subspace(place.root / "subspace.safetensors", builders.subspace_tensors(seed=1))
    shutil.rmtree(folder)
    assert place.guard().admit(place.adapter(), "one").key != key


def test_the_method_number_is_in_the_key(place, monkeypatch):
    folder = place.adapter()
    key = place.guard().admit(folder, "one").key
    monkeypatch.setattr("csulora.serving.policy.METHOD", 2)
    assert place.guard().admit(folder, "one").key != key


def test_a_cold_request_reads_and_hashes_its_source_once_and_its_result_while_writing(
    place, monkeypatch
):
    folder, g, read = place.adapter(), place.guard(), []
    real = csulora.adapter.read_safetensors
    monkeypatch.setattr(
        csulora.adapter, "read_safetensors", lambda path, **k: read.append(path) or real(path, **k)
    )
    for module in ("csulora.serving.cache", "csulora.adapter", "csulora.output"):
        monkeypatch.setattr(f"{module}.sha256_file", None)
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("fsync"))
    found = g.admit(folder, "one")
    g.check(found.path, "one")
    assert found.how == "corrected" and read == [folder / WEIGHTS]
    assert found.seconds.keys() == {"read", "digest", "correct", "write"}


def test_fifty_first_requests_over_five_names_make_one_correction(place):
    first = place.adapter()
    folders = [first]
    for i in range(2):
        folders.append(shutil.copytree(first, place.adapters / f"copy{i}"))
        folders.append(place.adapters / f"link{i}")
        folders[-1].symlink_to(first)
    g = place.guard()
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda i: g.admit(folders[i % 5], f"name{i % 5}"), range(50)))
    assert len({one.key for one in found}) == 1
    assert [one.how for one in found].count("corrected") == 1
    assert [line["decision"] for line in place.decisions()].count("corrected") == 1
    assert counters.collect()["corrected", ""] == 1
    assert place.leftovers() == []


def test_processes_at_once_make_one_correction(place):
    folder = place.adapter()
    code = "sys.stdin.read(1); print(g.admit(sys.argv[1], 'one').how)"
    running = [place.process(code, folder) for _ in range(3)]
    for one in running:
        one.stdin.write("x")
        one.stdin.flush()
    said = sorted(one.communicate(timeout=300)[0].strip() for one in running)
    assert said.count("corrected") == 1 and set(said) <= {"corrected", "waited", "hit"}
    assert place.leftovers() == []


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, "exact"), (8, "exact"), (7, "same"), (4, "same")]
)
def test_the_form_is_exact_where_its_rank_fits(place, limit, expected):
    """Weak strengths, so that the result is near one of rank r."""
    folder = place.adapter()
    settings = {"lambda_left": 0.01, "lambda_right": 0.01, "lambda_off": 0.01}
    given = [place.guard(settings, max_lora_rank=limit).admit(folder, "one")]
    if limit is not None:  # what the stack says counts more than the configuration
        g = place.guard(settings, max_lora_rank=1)
        given.append(g.admit(folder, "one", max_rank=limit))
    for found in given:
        assert (found.form, found.rank) == (expected, 8 if expected == "exact" else 4)
        assert json.loads((found.path / CONFIG).read_text())["r"] == found.rank


def test_ranks_that_do_not_fit(place):
    folder = place.adapter()
    assert refused(place.guard(max_lora_rank=3), folder).reason == "rank"
    error = refused(place.guard({"form": "exact"}, max_lora_rank=7), folder)
    assert error.reason == "rank"
    assert str(error) == "its rank in the form exact is 8, and the server takes 7"
    g = place.guard(method="realign", max_lora_rank=4)
    found = g.admit(folder, "one")
    assert (found.form, found.rank) == ("same", 4)
    assert refused(g, found.path, max_rank=3).reason == "rank"


def test_form_same_is_refused_above_the_commands_warning(place, monkeypatch):
    folder = place.adapter()
    settings = {"lambda_left": 0, "lambda_right": 0, "lambda_off": 1e4}
    g = place.guard(settings, max_lora_rank=4)
    error = refused(g, folder)
    assert error.reason == "rank error" and "off the exact result" in str(error)
    assert place.entries() == [] and place.leftovers() == []
    monkeypatch.setattr("csulora.folder.correct_batch", None)  # it is not tried again
    assert str(refused(g, folder)) == str(error)
    monkeypatch.undo()
    assert place.guard(settings | {"form": "same"}, max_lora_rank=4).admit(folder, "x").rank == 4


def test_the_source_changes_and_its_path_stays(place):
    folder = place.adapter()
    g = place.guard()
    first = g.admit(folder, "one")
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    second = g.admit(folder, "one")
    assert second.how == "corrected" and second.path != first.path  # no stale prefix cache
    g.check(first.path, "one")
    g.check(second.path, "one")


@pytest.mark.parametrize("mode", ["correct", "require"])
def test_what_is_known_is_recalled_and_nothing_is_made_for_it(place, mode):
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    place.guard().admit(one, "one")
    g = place.guard(mode=mode)
    before = place.decisions()
    assert g.recall(one, "one") is None and g.recall(two, "two") is None
    assert place.decisions() == before
    found = g.admit(one, "one")
    again = g.recall(one, "one")
    assert (again.path, again.how, again.rank) == (found.path, "hit", found.rank)
    assert place.decisions()[-1]["decision"] == "hit"
    assert g.recall(found.path, "its path") is None
    (found.path / WEIGHTS).write_bytes(b"x")
    assert g.recall(one, "one") is None and (found.path / WEIGHTS).read_bytes() == b"x"
    builders.edit_tensors(one / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert g.recall(one, "one") is None
    (two / WEIGHTS).write_bytes(b"x")
    place.age(two)
    assert refused(g, two).reason == "source"
    lines = len(place.decisions())
    with pytest.raises(RefusedError):  # what was refused a moment ago
        g.recall(two, "two")
    assert len(place.decisions()) == lines + 1
    with pytest.raises(RefusedError, match="no entry of it"):
        g.recall(place.cache / "x", "x")


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_what_is_served_raw_is_never_recalled(place, mode):
    folder, g = place.adapter(), place.guard(mode=mode)
    g.admit(folder, "one")
    assert g.recall(folder, "one") is None


def test_observe_serves_raw_and_says_what_would_change(place):
    one, two = place.adapter("one"), place.adapter("two")
    builders.edit_tensors(two / WEIGHTS, add("odd"))
    g = place.guard(mode="observe", max_lora_rank=8)
    for folder in (one, two, place.root / "nowhere", one):
        found = g.admit(folder, folder.name)
        assert (found.path, found.how, found.key) == (folder, "raw", None)
        g.check(folder, "x")
        assert g.again(folder, "x") == folder
    first, second, third, again = place.decisions()
    assert {line["decision"] for line in place.decisions()} == {"observed"}
    adapter = csulora.LoraAdapter.load(one)
    expected = csulora.decompose(adapter, g.subspace, csulora.Correction()).totals
    assert first["relative_change"] == pytest.approx(expected.relative_change)
    assert first["relative_energy_after"] == pytest.approx(expected.relative_energy_after)
    assert (first["form"], first["rank"]) == ("exact", 8)
    assert (second["would_refuse"], third["would_refuse"]) == ("not lora", "missing")
    assert again["relative_change"] == first["relative_change"]
    assert place.entries() == []


def test_observe_does_not_raise_for_a_path_that_is_none(place):
    g = place.guard(mode="observe")
    assert g.admit("/a\0b", "one").how == "raw"
    (line,) = place.decisions()
    assert line["would_refuse"] == "unforeseen" and "null byte" in line["text"]


def test_observe_sees_that_the_files_of_a_folder_changed(place):
    folder, g = place.adapter(), place.guard(mode="observe")
    g.check(folder, "one")  # nobody has asked for it yet
    g.admit(folder, "one")
    for _ in range(3):
        g.check(folder, "one")
    assert len(place.decisions()) == 1
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    for _ in range(3):
        g.check(folder, "one")
    first, second = place.decisions()
    assert first["source"] != second["source"] == builders.digest(folder / WEIGHTS)
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: tensors.popitem())
    shutil.rmtree(folder)
    for _ in range(3):
        g.check(folder, "one")
    assert [line.get("would_refuse") for line in place.decisions()] == [None, None, "missing"]
    g.check("a\0b", "one")


def adapters_in_memory():
    gc.collect()
    return sum(type(X) is csulora.LoraAdapter for X in gc.get_objects())


@pytest.mark.parametrize("reason", ["subspace", "rank error"])
def test_a_refusal_that_is_remembered_holds_no_adapter(place, reason):
    shapes = {"model.layers.7.odd": (24, 16)} if reason == "subspace" else None
    folder = place.adapter(shapes=shapes)
    g = place.guard(max_lora_rank=4)
    before = adapters_in_memory()
    for _ in range(2):
        assert refused(g, folder).reason == reason
        assert adapters_in_memory() <= before


def test_off_does_nothing(place):
    g = place.guard(mode="off", subspace="gone", audit=None)
    assert g.admit("any/path", "one").how == "raw" and not place.cache.exists()
    g.check("any/path", "one")
    assert str(g.again("any/path", "one")) == "any/path"


def test_the_guard_of_a_process(place, monkeypatch):
    assert guard.guard() is None
    monkeypatch.setattr(guard, "_guard", None)
    monkeypatch.setenv("CSULORA_CONFIG", str(place.file))
    found = guard.guard()
    assert found is guard.guard() and found.config == place.config()
    monkeypatch.setattr(guard, "_guard", (os.getpid() + 1, found))  # as after a fork
    mine = guard.guard()
    assert mine is not found and mine.subspace is found.subspace
    monkeypatch.setattr(guard, "_guard", None)
    (place.root / "subspace.safetensors").write_bytes(b"x")
    with pytest.raises(csulora.CsuloraError, match=r"subspace\.safetensors: not a readable"):
        guard.guard()


def test_no_gpu_and_no_threads_are_touched(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("set threads"))
    assert place.guard().admit(place.adapter(), "one").how == "corrected"
    place.guard(mode="observe").admit(place.adapters / "one", "one")
    assert place.decisions()[-1]["relative_change"] > 0


def test_counters_and_audit_of_all_processes(place):
    folder = place.adapter()
    g = place.guard()
    g.admit(folder, "one")
    code = (
        "g.admit(sys.argv[1], 'two')\n"
        "try: g.admit('/nowhere', 'three')\n"
        "except guard.RefusedError: pass\n"
        "print(json.dumps(sorted(map(list, counters.collect())))); sys.stdout.flush()\n"
        "sys.stdin.read()"
    )
    other = place.process(code, folder)
    assert ["corrected", ""] in json.loads(other.stdout.readline())
    for _ in range(2):  # while the other lives, and from its file afterwards
        found = counters.collect()
        assert found["corrected", ""] == found["hits", ""] == found["refused", "missing"] == 1
        assert found["seconds_correct", ""] > 0
        other.communicate(timeout=60)
    again = place.guard()  # takes over what the dead one counted
    assert counters.collect() == found
    assert len(list((place.cache / "counters").glob("*.counters"))) == 1
    assert again.admit(folder, "one").how == "hit"
    lines = place.decisions()
    assert [line["decision"] for line in lines] == ["corrected", "hit", "refused", "hit"]
    assert lines[0].keys() == {
        *("time", "pid", "decision", "name", "folder", "key", "source", "settings", "rank", "form"),
        "seconds",
    } - {"form"}
    assert lines[0]["source"] == builders.digest(folder / WEIGHTS)
    assert lines[1]["pid"] != lines[0]["pid"] == os.getpid()


def not_a_key(path):
    path.write_text("nonsense")


def a_private_key(path):
    private, _ = new_key(path.with_name("ops"))
    path.write_bytes(private.read_bytes())


def a_key_that_vanished(path):
    path.unlink()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("mode", ["correct", "require", "observe"])
@pytest.mark.parametrize("spoil", [not_a_key, a_private_key, a_key_that_vanished, a_pipe])
def test_a_trusted_key_that_is_none_stops_the_start(place, spoil, mode):
    _, good = new_key(place.root / "good")
    bad = place.root / "bad.pub"
    bad.write_bytes(good.read_bytes())
    found = guard.Guard(place.config(mode=mode, trusted_keys=["good.pub", "bad.pub"]))
    found.open()
    spoil(bad)
    with pytest.raises(csulora.CsuloraError, match=r"trusted_keys: .*bad\.pub: ") as caught:
        found.open()
    assert not isinstance(caught.value, RefusedError)


def test_an_audit_log_that_cannot_be_written(place):
    with pytest.raises(csulora.CsuloraError, match=r"audit: .*: cannot be written"):
        place.guard(audit="adapters")
    g = place.guard()
    (place.root / "audit.jsonl").unlink()
    (place.root / "audit.jsonl").mkdir()
    assert g.admit(place.adapter(), "one").how == "corrected"


def test_names_in_logs_are_one_line(place):
    g = place.guard()
    with pytest.raises(RefusedError):
        g.admit(place.root / "no\nwhere", "a\nb\udce9")
    assert place.decisions()[-1]["name"] == "a\nb\\udce9"
    assert "\n" not in refusal_text("a\nb", RefusedError("x", "c\nd"))
