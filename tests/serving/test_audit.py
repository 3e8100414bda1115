"""The audit log: never a reason to end anything, and never written to what is no file."""

import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from csulora.errors import CsuloraError
from csulora.serving import audit, counters
from csulora.serving.guard import RefusedError


class Unwilling:
    """A value that cannot even be shown."""

    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


def of_no_text(place, monkeypatch, log):
    log.line("hit", Unwilling())


def of_a_value_without_text(place, monkeypatch, log):
    log.line("hit", "one", rank=Unwilling())


def of_itself(place, monkeypatch, log):
    values = {}
    values["x"] = values
    log.line("hit", "one", settings=values)


def with_a_handler_that_raises(place, monkeypatch, log):
    monkeypatch.setattr(logging.Logger, "handle", lambda *_: 1 / 0)
    log.line("refused", "one")


def without_memory(place, monkeypatch, log):
    monkeypatch.setattr(json, "dumps", Unwilling)
    log.line("hit", "one")


def at_a_path_that_is_none(place, monkeypatch, log):
    audit.Audit(place.root / "a\0b").line("hit", "one")


@pytest.mark.parametrize(
    "line",
    [
        *(of_no_text, of_a_value_without_text, of_itself, with_a_handler_that_raises),
        *(without_memory, at_a_path_that_is_none),
    ],
)
def test_a_line_never_raises(place, monkeypatch, line):
    log = audit.Audit(place.root / "audit.jsonl")
    log.check()
    line(place, monkeypatch, log)
    monkeypatch.undo()
    log.line("hit", "after")
    assert place.decisions()[-1]["name"] == "after"


def test_a_decision_whose_line_fails_counts_once(place, monkeypatch):
    g = place.guard()
    monkeypatch.setattr(audit, "encodable", lambda name: 1 / 0)
    with pytest.raises(RefusedError, match="no such adapter folder"):
        g.admit(place.root / "nowhere", "one")
    assert counters.collect() == {("refused", "missing"): 1}


def a_pipe(file):
    os.mkfifo(file)


def a_device(file):
    file.symlink_to("/dev/null")


def a_folder(file):
    file.mkdir()


@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder])
@pytest.mark.parametrize("reader", [False, True])
def test_what_is_no_file_is_refused_at_the_start(place, make, reader):
    file = place.root / "audit.jsonl"
    make(file)
    end = os.open(file, os.O_RDONLY | os.O_NONBLOCK) if reader else None
    with pytest.raises(CsuloraError, match=r"audit: .*(not a regular file|cannot be written)"):
        place.guard()
    if end is not None:
        os.close(end)


def test_a_device_is_not_even_opened(place, monkeypatch):
    opened, real = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k)
    )
    with pytest.raises(CsuloraError, match="not a regular file"):
        audit.Audit(Path("/dev/null")).check()
    assert opened == []


@pytest.mark.parametrize("reader", [False, True])
def test_a_pipe_that_comes_later_is_neither_waited_for_nor_written(place, reader):
    file = place.root / "audit.jsonl"
    g = place.guard()
    file.unlink()
    os.mkfifo(file)
    end = os.open(file, os.O_RDONLY | os.O_NONBLOCK) if reader else None
    asked = threading.Thread(target=g.admit, args=(place.adapter(), "one"), daemon=True)
    asked.start()
    asked.join(120)
    assert not asked.is_alive()
    if end is not None:
        with pytest.raises(BlockingIOError):
            if not os.read(end, 1):  # nobody has it open
                raise BlockingIOError
        os.close(end)


def test_half_a_line_spoils_no_other(place, monkeypatch):
    log = audit.Audit(place.root / "audit.jsonl")
    log.line("hit", "before")
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:20]))
        log.line("hit", "half")
    log.line("hit", "after")
    lines = (place.root / "audit.jsonl").read_text().splitlines()
    assert [json.loads(lines[i])["name"] for i in (0, 2)] == ["before", "after"]
    assert len(lines) == 3


def test_a_full_disk(place, monkeypatch, caplog):
    g = place.guard()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert g.admit(place.adapter(), "one").how == "corrected"
    assert "cannot be written" in caplog.text
