"""A full disk: what is there is served, what cannot be taken is refused, and nothing is counted away."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from builders import WEIGHTS

from csulora.adapter import write_folder
from csulora.errors import DiskFullError
from csulora.serving import counters
from csulora.serving.guard import RefusedError

# No file may have a byte more, whatever its folder; empty files and folders can be made.
NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def fill(place, monkeypatch):
    """No new bytes, by any of the calls that write in the cache."""
    real = os.open

    def opened(path, flags, *arguments, **options):
        if flags & os.O_CREAT and not os.path.lexists(path):
            no_space()
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", no_space)
    monkeypatch.setattr(os, "mkdir", no_space)
    for name in ("csulora.serving.counters", "csulora.serving.cache"):
        monkeypatch.setattr(f"{name}.write_bytes", no_space)


def ended(place, *folders):
    """A process that admitted these and has ended; the keys."""
    code = "[print(g.admit(folder, 'x').key, flush=True) for folder in sys.argv[1:]]"
    out, _ = place.process(code, *folders).communicate(timeout=300)
    return out.split()


def test_a_server_starts_and_serves_what_is_there(place):
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    (key,) = ended(place, one)
    code = (
        "found = [g.admit(sys.argv[1], 'one').how]\n"
        "g.check(g.admit(sys.argv[1], 'one').path, 'one')\n"
        "try: g.admit(sys.argv[2], 'two')\n"
        "except guard.RefusedError as error: found += [error.reason, str(error)]\n"
        "print(json.dumps(found))\n"
        "print(json.dumps(sorted(map(list, counters.collect().items()))))\n"
    )
    before = (place.root / "audit.jsonl").read_bytes()
    running = place.process(code, one, two, before=NO_ROOM)
    out, _ = running.communicate(timeout=300)
    (how, reason, text), counted = map(json.loads, out.splitlines())
    assert (how, reason) == ("hit", "cache") and "cannot be written" in text
    counted = {tuple(name): value for name, value in counted}
    assert counted["corrected", ""] == 1  # by the process that had ended
    assert counted["hits", ""] == 2 and counted["refused", "cache"] == 1
    assert place.entries() == [key] and place.leftovers() == []
    assert (place.root / "audit.jsonl").read_bytes() == before
    place.guard()
    assert counters.collect()["corrected", ""] == 1


def test_a_start_without_a_byte_or_a_file_to_be_had(place, monkeypatch):
    one, two = place.adapter("one"), place.adapter("two", seed=1)
    (key,) = ended(place, one)
    with monkeypatch.context() as patch:
        fill(place, patch)
        g = place.guard()
        assert g.admit(one, "one").how == "hit"
        with pytest.raises(RefusedError) as caught:
            g.admit(two, "two")
        assert caught.value.reason == "cache"
        assert counters.collect()["refused", "cache"] == counters.collect()["corrected", ""] == 1
    assert place.entries() == [key] and place.leftovers() == []
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert g.admit(two, "two").how == "corrected"  # once there is room


def test_nothing_is_corrected_at_each_request_for_want_of_room(place, monkeypatch):
    folder, g = place.adapter(), place.guard()
    tried = []

    def full(*_, **__):
        tried.append(1)
        raise DiskFullError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("csulora.serving.entries.write_folder", full)
        for _ in range(5):
            with pytest.raises(RefusedError, match="No space left") as caught:
                g.admit(folder, "one")
            assert caught.value.reason == "cache"
    assert len(tried) == 1
    with pytest.raises(RefusedError):
        g.admit(folder, "one")
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert g.admit(folder, "one").how == "corrected"


def test_a_first_start(place, monkeypatch):
    folder = place.adapter()
    with monkeypatch.context() as patch:
        fill(place, patch)
        g = place.guard(audit=None)
        with pytest.raises(RefusedError) as caught:
            g.admit(folder, "one")
        assert caught.value.reason == "cache"
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    assert g.admit(folder, "one").how == "corrected"


def test_what_may_go_goes_before_anything_is_written(place, monkeypatch):
    (key,) = ended(place, place.adapter("old"))
    there, real = [], os.replace

    def replace(old, new):
        there.append((place.cache / key).exists())
        if there[-1]:
            no_space()
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    place.guard(cache_bytes=1)
    assert there and not any(there)


def test_what_may_go_goes_for_a_new_entry(place, monkeypatch):
    """It has become free since, with the process that held it."""
    g = place.guard(cache_bytes=1)
    place.write()
    (key,) = ended(place, place.adapter("old"))
    real = write_folder

    def write(*arguments, **options):
        if (place.cache / key).exists():
            raise DiskFullError("No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr("csulora.serving.entries.write_folder", write)
    found = g.admit(place.adapter("new", seed=1), "new")
    assert found.how == "corrected" and place.entries() == [found.key]


@pytest.mark.parametrize("file", ["counters", "leases"])
def test_a_file_in_place_of_a_folder_of_the_cache(place, file):
    (key,) = ended(place, place.adapter())
    shutil.rmtree(place.cache / file)
    (place.cache / file).write_text("x")
    assert place.guard().admit(place.adapters / "one", "one").key == key


def test_a_damaged_entry_that_cannot_be_made_anew(place, monkeypatch):
    folder, g = place.adapter(), place.guard()
    path = g.admit(folder, "one").path
    (path / WEIGHTS).write_bytes(b"x")
    with monkeypatch.context() as patch:
        fill(place, patch)
        with pytest.raises(RefusedError) as caught:
            g.check(path, "one")
        assert caught.value.reason == "cache"
    monkeypatch.setattr("csulora.serving.recent.MOMENT", 0)
    g.check(path, "one")


@pytest.mark.parametrize("step", ["replace", "unlink"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_counts_survive_a_start_that_ends_while_it_adds_them_up(place, monkeypatch, step, error):
    folder = place.adapter()
    ended(place, folder)
    ended(place, folder)
    owner = os if step == "replace" else Path
    real = getattr(owner, step)

    def failing(path, *arguments, **options):
        if "counters" in str(path):
            raise error
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, failing)
        with contextlib.suppress(KeyboardInterrupt):
            place.guard()
    for _ in range(2):
        place.guard()
        found = counters.collect()
        assert found["corrected", ""] == found["hits", ""] == 1
    assert [path.name for path in (place.cache / "counters").iterdir()] == ["ended.json"]
