"""The size of the cache: what goes, what a lease holds, and the leases that a process leaves."""

import errno
import fcntl
import os
import shutil
import signal

import pytest

from csulora.files.plain import open_regular
from csulora.serving import cache as caches
from csulora.serving.guard import RefusedError


def size(place):
    return sum(
        path.stat().st_size
        for key in place.entries()
        for path in (*(place.cache / key).iterdir(), place.cache / f"{key}.json")
    )


def made_by_another(place, *folders):
    """Entries of these adapters, in order of use, made by a process that has ended."""
    code = (
        "for folder in sys.argv[1:]:\n"
        "    print(g.admit(folder, 'x').key, flush=True)\n"
        "    time.sleep(0.05)\n"
    )
    out, _ = place.process(code, *folders).communicate(timeout=300)
    return out.split()


def test_the_least_recently_used_go_and_none_that_live_processes_hold(place):
    folders = [place.adapter(str(i), seed=i) for i in range(4)]
    keys = made_by_another(place, *folders)
    assert sorted(keys) == place.entries()
    one = size(place) // 4
    holder = place.process(
        "print(g.admit(sys.argv[1], 'x').how, flush=True); sys.stdin.read()", folders[0]
    )
    assert holder.stdout.readline() == "hit\n"
    os.utime(place.cache / f"{keys[1]}.json")  # used last
    place.guard(cache_bytes=int(2.5 * one))
    assert sorted([keys[0], keys[1]]) == place.entries()  # held; used last
    place.guard(cache_bytes=1)
    assert place.entries() == [keys[0]]
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    place.guard(cache_bytes=1)
    assert place.entries() == []
    assert not list((place.cache / "leases").iterdir())


def test_a_new_entry_makes_room_and_stays(place):
    folders = [place.adapter(str(i), seed=i) for i in range(3)]
    old = made_by_another(place, *folders[:2])
    one = size(place) // 2
    g = place.guard(cache_bytes=int(1.5 * one))
    new = g.admit(folders[2], "new")
    assert new.path.is_dir() and not set(old) & set(place.entries())
    # Beyond the limit with what it holds itself, nothing goes.
    assert g.admit(folders[0], "0").path.is_dir() and new.path.is_dir()
    g.check(new.path, "new")


def test_room_is_made_for_the_price_of_the_new_entry(place, monkeypatch):
    """However many there are already."""
    made_by_another(place, *(place.adapter(str(i), seed=i) for i in range(4)))
    g = place.guard(cache_bytes="1GB")
    looked, real = [], os.scandir

    def scandir(path):
        looked.append(os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = g.admit(place.adapter("new", seed=4), "new")
    assert [path for path in looked if len(os.path.basename(path)) == 64] == [str(found.path)]
    # What others made and removed meanwhile is seen.
    monkeypatch.undo()
    monkeypatch.setattr(g.cache, "_limit", size(place))
    assert not g.cache.evict()
    shutil.rmtree(place.cache / made_by_another(place, place.adapter("more", seed=5))[0])
    assert not g.cache.evict()
    made_by_another(place, place.adapter("again", seed=6))
    assert g.cache.evict() and found.key in place.entries()


def test_what_cannot_be_removed_is_no_reason_to_refuse_another(place, monkeypatch):
    (old,) = made_by_another(place, place.adapter("old"))
    real = caches._remove

    def stuck(folder):
        if folder.name == old:
            raise PermissionError(13, "Permission denied")
        real(folder)

    g = place.guard()
    monkeypatch.setattr(caches, "_remove", stuck)
    monkeypatch.setattr(g.cache, "_limit", 1)
    assert g.admit(place.adapter("new", seed=1), "new").how == "corrected"
    monkeypatch.undo()
    assert old in place.entries() and not (place.cache / f"{old}.json").exists()
    place.guard()
    assert old not in place.entries()


def test_leases_stand_though_the_cache_was_emptied(place):
    folders = [place.adapter(str(i), seed=i) for i in range(2)]
    g = place.guard()
    first = g.admit(folders[0], "0")
    shutil.rmtree(place.cache)
    second = g.admit(folders[1], "1")
    assert g.again(first.path, "0") == first.path
    out, _ = place.process(
        "from csulora.serving.cache import Cache; Cache(g.cache.root, 1).open(); print('done')"
    ).communicate(timeout=300)
    assert out == "done\n"
    assert place.entries() == sorted([first.key, second.key])


def test_leases_do_not_grow_by_asking_again(place):
    """Who asks for refused adapters again and again must not fill the file that others read."""
    served, raws = place.adapter(), [place.adapter(f"raw{i}", seed=i + 1) for i in range(3)]
    place.guard().admit(served, "served")
    g = place.guard(mode="require")
    assert g.admit(served, "served").how == "hit"
    for raw in 5 * raws:
        with pytest.raises(RefusedError, match="is not corrected"):
            g.admit(raw, "raw")
    assert [len(keys) for keys in leases(place)] == [1, 1]


def leases(place):
    """The keys in each file of leases."""
    return [file.read_text().split() for file in sorted((place.cache / "leases").iterdir())]


def test_what_is_refused_while_it_is_made_is_not_held(place, monkeypatch):
    folder, g = place.adapter(), place.guard()
    monkeypatch.setattr("csulora.serving.entries.write_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(RefusedError, match="ZeroDivisionError"):
        g.admit(folder, "one")
    assert leases(place) == [[]]
    monkeypatch.undo()
    found = g.admit(folder, "one")
    assert leases(place) == [[found.key]]


def failing_after(count, error):
    """`os.pwrite` that takes so many bytes of each content, and says `error` for the rest; None: none."""
    real = os.pwrite

    def pwrite(file, data, offset):
        if error is not None and len(data) <= count:
            raise OSError(error, os.strerror(error))
        return real(file, bytes(data)[:count], offset)

    return pwrite


def test_a_lease_that_is_written_in_parts_counts(place, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing_after(7, None))
    folders = [place.adapter(str(i), seed=i) for i in range(3)]
    g = place.guard()
    keys = [g.admit(folder, "x").key for folder in folders]
    assert [sorted(found) for found in leases(place)] == [sorted(keys)]


@pytest.mark.parametrize("count", [0, 7, 40])
def test_a_lease_that_cannot_be_written_is_written_the_next_time(place, monkeypatch, count):
    folders = [place.adapter(str(i), seed=i) for i in range(3)]
    keys = made_by_another(place, *folders)
    g = place.guard()
    assert g.admit(folders[0], "0").how == "hit"
    real = os.pwrite

    def pwrite(file, data, offset):
        if real(file, bytes(data)[:count], offset) >= count:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert g.admit(folders[1], "1").how == "hit"
    monkeypatch.undo()
    assert [keys[0]] in leases(place)  # whole, as it was
    assert keys[1] in g.cache._leases.held()  # by this process itself
    assert g.admit(folders[2], "2").how == "hit"
    assert sorted(keys) in leases(place)


def file_of_leases(place, content, size):
    file = place.cache / "leases" / "1-0.leases"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    os.truncate(file, size)
    return file


def test_the_leases_of_a_dead_process_are_not_read(place):
    place.guard()
    file = file_of_leases(place, b"", 65 << 20)
    place.guard(cache_bytes=1).admit(place.adapter(), "one")
    assert not file.exists()


def test_all_leases_of_a_live_process_count(place):
    (key,) = made_by_another(place, place.adapter())
    file = file_of_leases(place, b"\n" * (65 << 20), 65 << 20)
    with open(file, "ab") as holder:
        holder.write(key.encode())
        holder.flush()
        fcntl.flock(holder, fcntl.LOCK_EX)
        place.guard(cache_bytes=1)
        assert place.entries() == [key]
    place.guard(cache_bytes=1)
    assert place.entries() == []


def test_nothing_goes_while_leases_cannot_be_read(place, monkeypatch):
    (key,) = made_by_another(place, place.adapter("old"))
    file = file_of_leases(place, b"x", 1)
    os.mkfifo(place.cache / "leases" / "2-0.leases")  # no file of a process
    real = open_regular

    def opened(path, **options):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr("csulora.serving.own_files.open_regular", opened)
    g = place.guard(cache_bytes=1)
    assert g.admit(place.adapter("new", seed=1), "new").how == "corrected"
    assert key in place.entries()
    monkeypatch.undo()
    g.cache.evict()
    assert key not in place.entries()
