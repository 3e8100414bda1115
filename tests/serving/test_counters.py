"""Counters of many processes in one folder: whole for whoever reads them, and never less than before."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora.serving import counters, own_files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "counters"


class Process:
    """The counters of one process among others in this one; `with` it the module's functions are its."""

    def __init__(self, folder):
        self.own = counters._Own()
        with self:
            counters.share(folder)

    def __enter__(self):
        self.before, counters._own = counters._own, self.own

    def __exit__(self, *_):
        counters._own = self.before

    def add(self, *arguments):
        with self:
            counters.add(*arguments)

    def collect(self):
        with self:
            return counters.collect()

    def end(self):
        """The kernel closes the files of a process."""
        if self.own.file._file >= 0:
            os.close(self.own.file._file)


def test_nobody_sees_a_part_of_what_another_writes(folder, monkeypatch):
    writer, reader = Process(folder), Process(folder)
    writer.add("hits")
    seen, real = [], os.pwrite

    def pwrite(file, data, offset):
        count = real(file, bytes(data)[:16] if len(data) > 4000 else data, offset)
        reader.own.shown.clear()  # what is there counts here, not what was seen before
        seen.append(reader.collect().get(("hits", ""), 0))
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    for reason in ("", "a", "much longer than it was"):
        writer.add("refused" if reason else "hits", reason)
    assert len(seen) > 10 and set(seen) == {1, 2}
    assert seen == sorted(seen)


@pytest.mark.parametrize("long", [False, True])
def test_a_note_that_fails_half_way_leaves_the_one_before(folder, monkeypatch, long):
    writer = Process(folder)
    writer.add("hits")
    reasons = [f"{i}" * 40 for i in range(200)] if long else ["x"]
    real = os.pwrite

    def pwrite(file, data, offset):
        real(file, bytes(data)[:16], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    for reason in reasons:
        writer.add("refused", reason)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        for _ in range(3):
            writer.add("hits")
            assert Process(folder).collect()["hits", ""] == 1
    assert writer.collect()["hits", ""] == 4
    writer.add("hits")
    writer.end()
    found = Process(folder).collect()
    assert found["hits", ""] == 5 and len(found) == 1 + len(reasons)
    assert [path.name for path in folder.iterdir()] == ["ended.json"]


def test_nobody_sees_less_while_what_ended_processes_counted_is_added_up(folder, monkeypatch):
    ended, reader = Process(folder), Process(folder)
    ended.add("hits")
    ended.end()
    real, within = os.scandir, []

    def scandir(path):
        if not within:
            within.append(path)
            Process(folder)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert reader.collect() == {("hits", ""): 1}
    assert within and not list(folder.glob("*.counters"))


def test_a_file_that_its_process_replaces_is_none_of_a_dead_one(folder, monkeypatch):
    """Whoever has it open sees it without a lock then."""
    live = Process(folder)
    live.add("hits")
    real = own_files.open_regular

    def opened(path):
        file = real(path)
        live.own.file.write(path.read_bytes())
        return file

    monkeypatch.setattr(own_files, "open_regular", opened)
    Process(folder)
    monkeypatch.undo()
    assert not (folder / "ended.json").exists()
    assert Process(folder).collect() == {("hits", ""): 1}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["add", "end", "share"]), max_size=12))
def test_every_count_is_in_the_sum_once(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("counters") / "counters"
    live, count = [Process(folder)], 0
    for step in steps:
        if step == "add":
            live[-1].add("hits")
            count += 1
        else:
            if step == "end":
                live.pop().end()
            live.append(Process(folder))
        assert Process(folder).collect().get(("hits", ""), 0) == count


def test_what_a_crash_of_the_machine_spoils_is_no_reason_to_stop(folder):
    one = Process(folder)
    one.add("hits")
    one.end()
    Process(folder)
    for name, content in (("1-0.counters", b""), ("2-0.counters", b"[1]"), ("ended.json", b"\xff")):
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "3-0.counters")
    assert Process(folder).collect() == {}
    assert not (folder / "1-0.counters").exists()


def test_a_total_that_cannot_be_read_now_is_not_replaced(folder, monkeypatch):
    for _ in range(2):
        one = Process(folder)
        one.add("hits")
        one.end()
    real = counters.read_bytes

    def failing(*_):
        raise counters.CsuloraError("too many open files")

    monkeypatch.setattr(counters, "read_bytes", failing)
    assert Process(folder).collect() == {}
    monkeypatch.setattr(counters, "read_bytes", real)
    assert Process(folder).collect() == {("hits", ""): 2}
