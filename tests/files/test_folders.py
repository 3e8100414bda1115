"""Outputs that appear whole or not at all: nothing is lost, and modes are kept."""

import inspect
import os
import stat
import sys
from pathlib import Path

import builders
import pytest
from builders import CONFIG, REPORT, WEIGHTS, run_correct

import csulora
from csulora import CsuloraError
from csulora.files import folders
from csulora.files.folders import make_folders, recover_folders, whole_file, whole_folder


def old_output(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "file").write_text("old")
    return path


def replace(path):
    with whole_folder(path, overwrite=True) as new:
        (new / "file").write_text("new")


def failing(monkeypatch, numbers, error):
    """os.rename whose calls of these numbers, counted from 1, fail."""
    rename, calls = os.rename, []

    def renamed(old, new):
        calls.append(new)
        if len(calls) in numbers:
            raise error
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_old_output(tmp_path, monkeypatch, numbers, error):
    path = old_output(tmp_path)
    failing(monkeypatch, numbers, error)
    with pytest.raises(type(error)):
        replace(path)
    assert builders.tree(tmp_path) == {"out/file": b"old"}


@pytest.mark.parametrize("first", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_old_output_that_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch, first):
    path = old_output(tmp_path)
    rename, calls = os.rename, []

    def renamed(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise first
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(CsuloraError, match="out: cannot be replaced") as caught:
        replace(path)
    monkeypatch.undo()
    assert not path.exists()
    kept = next(Path(word) for word in str(caught.value).split() if word.endswith("/old"))
    assert (kept / "file").read_text() == "old"
    recover_folders(tmp_path, {"out"})
    assert builders.tree(tmp_path) == {"out/file": b"old"}
    replace(path)
    assert builders.tree(tmp_path) == {"out/file": b"new"}


def test_what_was_set_aside_stays_where_something_else_has_come(tmp_path, monkeypatch):
    path = old_output(tmp_path)
    rename, calls = os.rename, []

    def renamed(old, new):
        calls.append(new)
        if len(calls) == 2:
            path.write_text("of somebody else")
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(CsuloraError, match="what it held is now"):
        replace(path)
    monkeypatch.undo()
    for _ in range(2):
        assert sorted(builders.tree(tmp_path).values()) == [
            b"",
            b"new",
            b"of somebody else",
            b"old",
        ]
        recover_folders(tmp_path, {"out"})
    path.unlink()
    recover_folders(tmp_path, {"out"})
    assert builders.tree(tmp_path) == {"out/file": b"old"}


def test_a_cleanup_that_does_not_finish_is_finished_later(tmp_path, monkeypatch):
    """The lock goes last, so that what is left is known for a leftover."""
    path = old_output(tmp_path)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
    replace(path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    recover_folders(tmp_path, {"out"})
    assert builders.tree(tmp_path) == {"out/file": b"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("deep", [True, False])
def test_a_swapped_parent_is_not_followed(tmp_path, deep):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "b").mkdir(parents=True)
    swapped = inner.parent if deep else inner
    with pytest.raises((CsuloraError, OSError)), whole_folder(inner / "out", overwrite=True) as new:
        (new / "file").write_text("new")
        swapped.rename(tmp_path / "moved")
        swapped.symlink_to(elsewhere if deep else elsewhere / "b")
    assert not list((elsewhere / "b").iterdir())


def test_folders_deeper_than_the_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "_sync_folder", lambda path: None)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        make_folders(Path(*["d"] * 200))
    finally:
        sys.setrecursionlimit(limit)
    assert Path(*["d"] * 200).is_dir()
    with pytest.raises(OSError, match="too long"):
        make_folders(Path(*["d" * 200] * 30))


# --- modes ----------------------------------------------------------------------------------------


def modes(folder):
    """Permission bits by relative path, the folder itself too."""
    return {
        os.path.relpath(path, folder): stat.S_IMODE(os.stat(path).st_mode)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_an_output_is_as_private_as_its_source(capsys, adapter, subspace, out, mask):
    (adapter / "logs").mkdir()
    (adapter / "logs" / "run.sh").write_text("")
    wanted = {
        ".": 0o750,
        WEIGHTS: 0o600,
        CONFIG: 0o640,
        "README.md": 0o400,
        "logs": 0o700,
        "logs/run.sh": 0o755,
    }
    for name, mode in wanted.items():
        (adapter / name).chmod(mode)
    before = os.umask(mask)
    try:
        for option in ([], ["--overwrite"]):
            arguments = (adapter, "--subspace", subspace, "--out-dir", out, *option)
            assert run_correct(capsys, *arguments).code == 0
            assert modes(out / "lora") == wanted | {REPORT: 0o600}
    finally:
        os.umask(before)


def test_a_folder_that_its_owner_may_not_write_gives_an_output_that_can_be_removed(
    adapter, subspace, out
):
    adapter.chmod(0o555)
    loaded = csulora.SafetySubspace.load(subspace)
    csulora.correct_folder(adapter, loaded, out)
    assert modes(out)["."] == 0o755
    adapter.chmod(0o755)


def test_what_comes_from_memory_has_the_modes_of_any_new_file(adapter, subspace, out):
    loaded = csulora.LoraAdapter.load(adapter)
    (adapter / WEIGHTS).chmod(0o600)
    new = csulora.LoraAdapter.from_tensors(loaded.tensors(), loaded.config)
    before = os.umask(0o027)
    try:
        new.save(out)
    finally:
        os.umask(before)
    assert modes(out) == {".": 0o750, WEIGHTS: 0o640, CONFIG: 0o640}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, None])
def test_a_file_keeps_the_mode_of_the_one_it_replaces(tmp_path, mode):
    path = tmp_path / "s"
    if mode is not None:
        path.write_text("old")
        path.chmod(mode)
    with whole_file(path) as temporary:
        temporary.write_text("new")
        seen = stat.S_IMODE(temporary.stat().st_mode)
    assert path.read_text() == "new"
    wanted = 0o666 & ~0o022 if mode is None else mode
    assert stat.S_IMODE(path.stat().st_mode) == wanted
    assert mode is None or not seen & ~0o600  # never wider, not even for a moment
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_subspace_that_is_estimated_anew_stays_private(capsys, pair, tmp_path):
    out = tmp_path / "s.safetensors"
    for _ in range(2):
        assert builders.run(capsys, "estimate", *pair, "--out", out).code == 0
        out.chmod(0o600)
    assert builders.run(capsys, "estimate", *pair, "--out", out).code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
