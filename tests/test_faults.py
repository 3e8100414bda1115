"""The file system fails once, at every call in turn: nothing is lost, nothing half written stays."""

import builtins
import errno
import itertools
import os
import shutil
import threading

import builders
import pytest
from builders import JOURNAL

from csulora import folder

COUNTED = ("open", "mkdir", "rename", "replace", "fsync", "pread", "pwrite", "fchmod", "ftruncate")


class Faults:
    """Counts calls that concern files below a folder; the one of the number `at` fails."""

    def __init__(self, patch, root):
        self.root, self.lock = str(root), threading.Lock()
        self.count, self.at, self.error, self.name = 0, 0, errno.EIO, ""
        for name in COUNTED:
            patch.setattr(os, name, self.counting(name, getattr(os, name)))
        self.real_open = builtins.open
        patch.setattr(builtins, "open", self.open)

    def set(self, at, error):
        self.count, self.at, self.error, self.name = 0, at, error, ""

    def step(self, name):
        with self.lock:
            self.count += 1
            if self.count == self.at:
                self.name = name
                raise OSError(self.error, os.strerror(self.error))

    def concerns(self, path, options):
        return isinstance(path, int) or "dir_fd" in options or self.root in str(path)

    def counting(self, name, real):
        def call(path, *rest, **options):
            if self.concerns(path, options):
                self.step(name)
            return real(path, *rest, **options)

        return call

    def open(self, path, *rest, **options):
        file = self.real_open(path, *rest, **options)
        return File(self, file) if self.concerns(path, {}) else file


class File:
    """An open file whose reads and writes count."""

    def __init__(self, faults, file):
        self._faults, self._file = faults, file

    def __getattr__(self, name):
        if name in ("read", "readinto", "readline", "write", "truncate"):
            self._faults.step(name)
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def everything(faults):
    """Each call of one run, as often as there are errors to try; ends when a run needs no more calls."""
    for number in itertools.count(1):
        for error in (errno.EIO, errno.ENOSPC):
            faults.set(number, error)
            yield
            faults.at = 0
            if not faults.name:
                assert number > 20, "the run was not watched"
                return


@pytest.fixture
def computed_once(monkeypatch):
    """What is computed of a source is remembered: these tests are about files."""
    compute, known = folder.correct_batch, {}

    def remembered(adapters, subspace, correction, **options):
        key = (*(adapter.source.sha256 for adapter in adapters), correction)
        if key not in known:
            known[key] = compute(adapters, subspace, correction, **options)
        return known[key]

    monkeypatch.setattr(folder, "correct_batch", remembered)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes its time on a real disk


def check_said(result):
    """A failure is a line, never a traceback."""
    assert "Traceback" not in result.err and "unforeseen" not in result.err, result.err
    assert len(result.complaints) >= (result.code != 0), result.err
    assert result.code in (0, 1, 2)


def place(root, name, template):
    """An output folder as it was before the run."""
    out = root / name
    shutil.rmtree(out, ignore_errors=True)
    if template is not None:
        shutil.copytree(template, out)
    return out


@pytest.mark.parametrize("there", [False, True])
def test_every_call_of_a_batch_fails_once(
    capsys, tmp_path, subspace, monkeypatch, computed_once, there
):
    source = tmp_path / "in"
    for i, name in enumerate("ab"):
        builders.write_adapter(source / "t" / name, seed=i)
        (source / "t" / name / "more").mkdir()
        (source / "t" / name / "more" / "log").write_text("text")
    common = (source, "--subspace", subspace, "--jobs", 1, "--out-dir")
    assert builders.run_correct(capsys, *common, tmp_path / "whole").code == 0
    new = {name: builders.tree(tmp_path / "whole" / "t" / name) for name in "ab"}
    template, old, again = None, {}, "--resume"
    if there:
        template, again = tmp_path / "before", "--overwrite"
        assert builders.run_correct(capsys, *common, template, "--lambda-off", 3).code == 0
        old = {name: builders.tree(template / "t" / name) for name in "ab"}
        assert old["a"] != new["a"]
    faults = Faults(monkeypatch, tmp_path)
    tried = 0
    for _ in everything(faults):
        faults_at, faults.at = faults.at, 0
        out = place(tmp_path, "out", template)
        faults.set(faults_at, faults.error)
        result = builders.run_correct(capsys, *common, out, *(["--overwrite"] * there))
        faults.at, where = 0, faults.name
        tried += bool(where)
        check_said(result)
        for name in "ab":
            folder = out / "t" / name
            found = builders.tree(folder) if folder.exists() else {}
            assert found in (old.get(name, {}), new[name]), (where, faults_at)
        assert builders.run_correct(capsys, *common, out, again).code == 0, where
        assert {name: builders.tree(out / "t" / name) for name in "ab"} == new
        left = [path for path in out.rglob("*") if path.name.startswith(".")]
        assert not left, (where, faults_at, left)
        assert (out / JOURNAL).exists()
    assert tried > 100


@pytest.mark.parametrize("there", [False, True])
def test_every_call_of_an_estimate_fails_once(
    capsys, tmp_path, pair, monkeypatch, computed_once, there
):
    out = tmp_path / "out" / "s.safetensors"
    arguments = ("estimate", *pair, "--rank", 2, "--out", out)
    assert builders.run(capsys, *arguments).code == 0
    new, old = out.read_bytes(), b""
    if there:
        assert builders.run(capsys, *arguments, "--seed", 3).code == 0
        old = out.read_bytes()
        assert new != old
    faults = Faults(monkeypatch, tmp_path)
    for _ in everything(faults):
        at, faults.at = faults.at, 0
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if there:
            out.write_bytes(old)
        faults.set(at, faults.error)
        result = builders.run(capsys, *arguments)
        faults.at, where = 0, faults.name
        check_said(result)
        assert (out.read_bytes() if out.exists() else b"") in (old, new), where
        assert result.code or out.read_bytes() == new
        assert {path.name for path in out.parent.iterdir()} <= {out.name}, where
        assert builders.run(capsys, *arguments).code == 0
        assert out.read_bytes() == new
