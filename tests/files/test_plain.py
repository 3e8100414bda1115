"""Single files from outside: what is opened, how much of it is read, and what a copy is."""

import os
import stat

import builders
import pytest

from csulora import CsuloraError
from csulora.files import plain
from csulora.files.json import read_json
from csulora.files.locks import open_locked

READERS = {
    "bytes": lambda path: plain.read_bytes(path, 100),
    "digest": plain.sha256_file,
    "start": lambda path: plain.read_start(path, 8),
    "json": read_json,
    "copy": lambda path: plain.copy_file(path, path.with_name("copy")),
}


def a_pipe(path):
    os.mkfifo(path)


def a_device(path):
    path.symlink_to("/dev/zero")


def a_circle(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (a_pipe, "not a regular file"),
        (a_device, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (a_circle, "Too many levels of symbolic links"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, reader, make, word):
    path = tmp_path / "x"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CsuloraError, match=f"x: .*{word}"):
        reader(path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(CsuloraError, match="cannot be the name"):
        plain.read_bytes(tmp_path / name, 100)


def test_a_name_that_changes_its_meaning_between_look_and_open(tmp_path, monkeypatch):
    """It is the opened file that is looked at."""
    path = tmp_path / "x"
    path.write_bytes(b"1")
    real = os.open

    def swapped(name, *rest, **options):
        path.unlink()
        os.mkfifo(path)
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(CsuloraError, match="not a regular file"):
        plain.read_bytes(path, 100)


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    assert plain.read_bytes(path, 100) == b"a" * 100
    os.truncate(path, 1 << 40)
    for read in (lambda: plain.read_bytes(path, 100), lambda: plain.sha256_file(path, 100)):
        with pytest.raises(CsuloraError, match="has 1099511627776 bytes; at most 100"):
            read()


@pytest.mark.parametrize(
    "spans", [[], [(0, 5)], [(1 << 20, 5)], [(0, 1), (3 << 20, (1 << 20) + 3)]]
)
def test_a_copy_has_the_bytes_the_mode_and_no_more_blocks(tmp_path, spans):
    source, target = tmp_path / "x", tmp_path / "y"
    with open(source, "wb") as file:
        for begin, size in spans:
            file.seek(begin)
            file.write(os.urandom(size))
        file.truncate(8 << 20)
    source.chmod(0o640)
    plain.copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert target.stat().st_blocks <= source.stat().st_blocks


def test_a_file_that_is_cut_short_while_it_is_copied(tmp_path, monkeypatch):
    source = tmp_path / "x"
    source.write_bytes(b"a" * 100)
    seek = os.lseek

    def meanwhile(*arguments):
        found = seek(*arguments)
        os.truncate(source, 10)
        return found

    monkeypatch.setattr(os, "lseek", meanwhile)
    with pytest.raises(CsuloraError, match="x: changed while it was being read"):
        plain.copy_file(source, tmp_path / "y")


def test_a_file_system_that_tells_of_no_holes(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(os.urandom(3_000_000))

    def unknown(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", unknown)
    plain.copy_file(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_a_file_that_grows_while_it_is_hashed(tmp_path):
    """Whoever writes to it for ever does not keep the reader for ever."""
    path = tmp_path / "x"
    path.write_bytes(b"a")

    class Growing:
        def update(self, piece):
            with open(path, "ab") as file:
                file.write(b"a")

    with pytest.raises(CsuloraError, match="changed while"), open(path, "rb", buffering=0) as file:
        plain.hash_rest(path, file, Growing())


@pytest.mark.parametrize("make", [a_pipe, a_device, a_circle, os.mkdir])
def test_a_lock_is_a_file(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(OSError, match="lock"):
        open_locked(tmp_path / "lock")


@pytest.mark.parametrize(
    "text", [b"[" + b"{}," * 1_100_000 + b"0]", b"[" * 2_100_000, b'{"a":' * 2_100_000]
)
def test_more_values_than_any_file_has(tmp_path, text):
    path = tmp_path / "x"
    path.write_bytes(text)
    with pytest.raises(CsuloraError, match="more than 2097152 values"):
        read_json(path)


def test_digest(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(os.urandom(3_000_000))
    assert plain.sha256_file(path) == builders.digest(path)
