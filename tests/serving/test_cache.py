"""The cache on disk: whose it is, what is sound in it, what may go, and what a kill leaves."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time

import builders
import pytest
import torch
from builders import CONFIG, REPORT, WEIGHTS

import csulora
from csulora.serving import cache as caches
from csulora.serving import counters
from csulora.serving.guard import RefusedError


def test_the_folder_is_made_private(place):
    old = os.umask(0)
    try:
        place.guard(cache="deep/cache")
    finally:
        os.umask(old)
    found = (place.root / "deep" / "cache").stat()
    assert found.st_mode & 0o777 == 0o700 and found.st_uid == os.geteuid()


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.parametrize("mode", [0o666, 0o000, 0o040])
@pytest.mark.parametrize("proven", [False, True])
def test_entries_are_for_their_user_alone(place, monkeypatch, umask, mode, proven):
    folder = place.adapter()
    if proven:
        subspace = csulora.SafetySubspace.load(place.root / "subspace.safetensors")
        csulora.correct_folder(folder, subspace, place.root / "fixed", portable=True)
        folder = place.root / "fixed"
    for file in folder.iterdir():
        file.chmod(mode)
    g = place.guard()
    written, real = [], os.fchmod
    monkeypatch.setattr(os, "fchmod", lambda file, bits: written.append(bits) or real(file, bits))
    old = os.umask(umask)
    try:
        found = g.admit(folder, "one")
    finally:
        os.umask(old)
    assert found.how == ("recomputed" if proven else "corrected")
    assert {path.stat().st_mode & 0o7777 for path in found.path.iterdir()} == {0o600}
    assert found.path.stat().st_mode & 0o7777 == 0o700
    assert found.path.with_suffix(".json").stat().st_mode & 0o7777 == 0o600
    # Whoever is not root reads the copy back, so its bits must be right from the beginning.
    assert {*written} == {0o600}


def open_to_others(place, monkeypatch):
    place.cache.mkdir(mode=0o755)
    place.cache.chmod(0o755)


def closed_to_itself(place, monkeypatch):
    place.cache.mkdir(mode=0o500)


def of_another(place, monkeypatch):
    place.cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)


def a_link(place, monkeypatch):
    (place.root / "elsewhere").mkdir(mode=0o700)
    place.cache.symlink_to(place.root / "elsewhere")


def a_file(place, monkeypatch):
    place.cache.write_text("x")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (open_to_others, "others may enter it, its mode is 0755; 0700 is needed. Or name a folder"),
        (closed_to_itself, "mode is 0500"),
        (of_another, "belongs to user .*, this is user 12345"),
        (a_link, "is a link or no folder"),
        (a_file, "is a link or no folder"),
    ],
)
def test_a_folder_that_others_could_have_written_is_refused(place, monkeypatch, spoil, text):
    spoil(place, monkeypatch)
    with pytest.raises(csulora.CsuloraError, match=text):
        place.guard()


def test_a_folder_that_opens_to_others_later(place):
    folder, g = place.adapter(), place.guard()
    place.cache.chmod(0o750)
    with pytest.raises(RefusedError, match="others may enter") as caught:
        g.admit(folder, "one")
    assert caught.value.reason == "cache"
    place.cache.chmod(0o700)
    assert g.admit(folder, "one").how == "corrected"


def longer(path):
    path.write_bytes(path.read_bytes() + b"x")


def flipped(path):
    """One bit, at the same size and time."""
    found, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def linked(path):
    other = path.parent.parent.parent / f"moved-{path.name}"
    path.rename(other)
    path.symlink_to(other)


def in_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


SPOILED = {
    "longer weights": lambda entry: longer(entry / WEIGHTS),
    "flipped weights": lambda entry: flipped(entry / WEIGHTS),
    "longer configuration": lambda entry: longer(entry / CONFIG),
    "flipped configuration": lambda entry: flipped(entry / CONFIG),
    "no weights": lambda entry: (entry / WEIGHTS).unlink(),
    "no configuration": lambda entry: (entry / CONFIG).unlink(),
    "linked weights": lambda entry: linked(entry / WEIGHTS),
    "a pipe": lambda entry: in_a_pipe(entry / WEIGHTS),
    "another file": lambda entry: (entry / "more.safetensors").write_bytes(b"x"),
    "a pickle": lambda entry: (entry / "adapter_model.bin").write_bytes(b"x"),
    "no folder": shutil.rmtree,
    "a linked folder": linked,
    "no record": lambda entry: entry.with_suffix(".json").unlink(),
    "no cache": lambda entry: shutil.rmtree(entry.parent),
    "an empty cache": lambda entry: [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in entry.parent.iterdir()
    ],
}
UNSEEN = {"no record"}  # by a process that has seen the entry sound


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("how", ["check", "again", "admit", "another process"])
def test_a_spoiled_entry_is_made_anew(place, spoil, how):
    folder, g = place.adapter(), place.guard()
    found = g.admit(folder, "one")
    sound = builders.tree(found.path)
    SPOILED[spoil](found.path)
    if how == "another process":
        g = place.guard()
        assert g.admit(folder, "one").how == "corrected"
    elif how == "admit":
        assert g.admit(folder, "one").how == ("hit" if spoil in UNSEEN else "corrected")
    elif how == "again":
        assert g.again(found.path, "one") == found.path
    else:
        g.check(found.path, "one")
    assert builders.tree(found.path) == sound
    repaired = spoil not in UNSEEN and how in ("check", "again")
    assert counters.collect().get(("repaired", ""), 0) == repaired
    # Whatever the process remembers, the cache is whole for the next one.
    if spoil not in UNSEEN:
        assert place.guard().admit(folder, "one").how == "hit"
    assert place.leftovers() == []


def test_a_record_of_something_else_proves_nothing(place):
    """An entry whose weights were swapped for raw ones, with their digests in its record and report."""
    folder = place.adapter()
    found = place.guard().admit(folder, "one")
    shutil.copy(folder / WEIGHTS, found.path / WEIGHTS)
    record = found.path.with_suffix(".json")
    for changes in ({"format": "csulora_cache/0"}, {"key": "0" * 64}, {"policy": None}, {"x": 1}):
        builders.edit_json(record, **changes)
        assert place.guard().admit(folder, "one").how == "corrected"
    for content in (b"", b"[]", b'{"format": "csulora_cache/1"}', b"\xff"):
        record.write_bytes(content)
        assert place.guard().admit(folder, "one").how == "corrected"


def test_what_cannot_be_repaired_is_refused_alone(place):
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    g = place.guard()
    first, second = g.admit(one, "one"), g.admit(two, "two")
    longer(first.path / WEIGHTS)
    builders.edit_tensors(one / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(RefusedError, match=r"is damaged, and .* is another now") as caught:
        g.check(first.path, "one")
    assert caught.value.reason == "changed"
    with pytest.raises(RefusedError) as caught:
        g.again(first.path, "one")
    assert caught.value.reason == "changed"
    g.zeroed(first.path, "one", caught.value)
    g.check(second.path, "two")
    assert counters.collect()["zeroed", ""] == 1
    last = place.decisions()[-1]
    assert (last["decision"], last["reason"]) == ("zeroed", "changed")
    shutil.rmtree(one)
    with pytest.raises(RefusedError, match="no such adapter folder"):
        g.check(first.path, "one")
    shutil.rmtree(first.path)
    first.path.with_suffix(".json").unlink()
    with pytest.raises(RefusedError, match="what it was made of unknown") as caught:
        place.guard().check(first.path, "one")
    assert caught.value.reason == "damaged"


def test_again_of_a_raw_folder_raises_refusals_alone(place):
    folder, g = place.adapter(), place.guard()
    assert g.again(folder, "one") == g.admit(folder, "one").path
    last = g.admit(folder, "one").path
    builders.edit_tensors(folder / WEIGHTS, lambda tensors: tensors.popitem())
    assert g.again(folder, "one") == last  # what this process served before
    shutil.rmtree(folder)
    assert g.again(folder, "one") == last
    for path in (place.root / "nowhere", "a\0b", "", "~"):
        with pytest.raises(RefusedError):
            g.again(path, "one")


def test_check_takes_entries_only(place):
    folder, g = place.adapter(), place.guard()
    found = g.admit(folder, "one")
    for path in (
        folder,
        place.cache,
        found.path / "..",
        f"{found.path}x",
        "relative",
        found.path / "a",
    ):
        with pytest.raises(RefusedError) as caught:
            g.check(path, "one")
        assert caught.value.reason == "not corrected"
    assert g.admit(found.path, "by its path").how == "hit"


def test_entries_of_other_settings_are_not_served(place):
    folder = place.adapter()
    weak = place.guard({"lambda_off": 0, "lambda_left": 0, "lambda_right": 0}).admit(folder, "one")
    g = place.guard()
    for call in (g.admit, g.check, g.admit):
        with pytest.raises(RefusedError, match="made with other settings"):
            call(weak.path, "one")
    with pytest.raises(RefusedError):
        g.again(weak.path, "one")


def test_digests_are_computed_once_a_process(place, monkeypatch):
    folder = place.adapter()
    path = place.guard().admit(folder, "one").path
    hashed = []
    digest = caches.sha256_file
    monkeypatch.setattr(caches, "sha256_file", lambda *a: hashed.append(a[0]) or digest(*a))
    time.sleep(0.1)
    g = place.guard()
    for _ in range(5):
        g.check(path, "one")
        g.admit(folder, "one")
    assert sorted(file.name for file in hashed) == [CONFIG, WEIGHTS]
    assert len(hashed) == 2


def test_a_check_costs_three_stats(place, monkeypatch):
    g = place.guard()
    path = g.admit(place.adapter(), "one").path
    g.check(path, "one")
    calls = []
    for name in ("stat", "lstat", "open", "scandir", "listdir", "utime"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    g.check(path, "one")
    monkeypatch.undo()
    assert calls == ["lstat"] * 3


KILLED = """
import csulora.{module} as module
real = module.{function}
def stop(*arguments, **options):
    {before}
    print('here', flush=True)
    sys.stdin.read()
module.{function} = stop
g.admit(sys.argv[1], 'one')
"""
STOPS = {
    "before the weights": ("adapter", "write_safetensors", "pass"),
    "in the weights": ("adapter", "write_safetensors", "arguments[0].write_bytes(b'half')"),
    "before the report": ("adapter", "json_rows", "pass"),
    "before the record": ("serving.record", "json_bytes", "pass"),
    "in the record": ("serving.cache", "write_bytes", "arguments[0].write_bytes(b'{')"),
    "after the record": ("serving.cache", "_settle", "pass"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_kill_9_in_the_middle_heals_at_the_next_start(place, stop):
    module, function, before = STOPS[stop]
    folder = place.adapter()
    code = KILLED.format(module=module, function=function, before=before)
    running = place.process(code, folder)
    assert running.stdout.readline() == "here\n"
    live = place.guard()  # another server starts beside it, and must not wait nor disturb
    assert live.find("one") == folder
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    g = place.guard()
    assert place.leftovers() == [] and place.entries() == []
    found = g.admit(folder, "one")
    assert found.how == "corrected"
    assert builders.tree(found.path).keys() == {WEIGHTS, CONFIG, REPORT}
    g.check(found.path, "one")


def test_kill_9_of_the_one_that_corrects_lets_the_next_one_go_on(place):
    folder = place.adapter()
    module, function, before = STOPS["in the weights"]
    code = KILLED.format(module=module, function=function, before=before)
    running = place.process(code, folder)
    assert running.stdout.readline() == "here\n"
    found = []
    waiting = threading.Thread(target=lambda: found.append(place.guard().admit(folder, "one")))
    waiting.start()
    time.sleep(0.3)
    assert not found
    running.send_signal(signal.SIGKILL)
    waiting.join(120)
    assert (
        found[0].how == "corrected"
        and torch.isfinite(next(iter(builders.effective(found[0].path).values()))).all()
    )
    running.wait(60)


def test_records_say_what_an_entry_was_made_of(place):
    folder = place.adapter()
    found = place.guard().admit(folder, "one")
    record = json.loads(found.path.with_suffix(".json").read_text())
    assert record["format"] == "csulora_cache/1" and record["source"] == str(folder)
    assert record["source_sha256"] == builders.digest(folder / WEIGHTS)
    assert record["sha256"] == builders.digest(found.path / WEIGHTS)
    assert record["config_sha256"] == builders.digest(found.path / CONFIG)


def test_a_source_in_the_making_is_refused_for_that_moment_only(place, monkeypatch):
    folder, g = place.adapter(), place.guard()
    found = g.admit(folder, "one")
    shutil.rmtree(found.path)

    def changing(folder):
        raise RefusedError("changed", "is being changed")

    monkeypatch.setattr(g._entries.sources, "read", changing)
    with pytest.raises(RefusedError, match="is being changed"):
        g.admit(folder, "one")
    monkeypatch.undo()
    assert g.admit(folder, "one").how == "corrected"


def test_processes_that_start_at_once_do_not_clean_up_side_by_side(place, monkeypatch):
    place.guard()
    alone = []

    def tried(*arguments):
        with open(place.cache / "lock", "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        alone.append(arguments)

    monkeypatch.setattr(counters, "share", tried)
    monkeypatch.setattr(caches, "recover_folders", tried)
    (place.cache / ("0" * 64)).mkdir()
    place.guard()
    assert len(alone) == 2 and place.entries() == []


def test_other_things_in_the_cache_are_left_alone(place):
    place.cache.mkdir(mode=0o700)
    (place.cache / "notes.txt").write_text("mine")
    (place.cache / "x.json").write_text("mine")
    place.guard(cache_bytes=1).admit(place.adapter(), "one")
    assert place.leftovers() == ["notes.txt", "x.json"]
