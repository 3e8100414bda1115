"""Runs that are killed, interrupted, run out of disk, meet another run, or resume on changed ground."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import builders
import pytest
from builders import JOURNAL, journal_lines, outcomes, run_correct

from csulora import LoraAdapter, SafetySubspace
from csulora.batch import Call, find, steps, stream
from csulora.batch.journal import Journal
from csulora.batch.local import WRITERS
from csulora.files.folders import make_folders, not_made_anew

# --- killed ---------------------------------------------------------------------------------------

# Children are forked from a process that has imported everything: a kill costs no second of imports.


@pytest.mark.slow
def test_fifty_kills_then_resume_gives_the_same_bytes(capsys, tmp_path, subspace):
    kills = 50
    for i in range(1000):
        builders.write_adapter(tmp_path / "in" / f"n{i:04}", seed=i)
    common = ("--subspace", subspace, "--resume")
    assert run_correct(capsys, tmp_path / "in", *common, "--out-dir", tmp_path / "whole").code == 0
    expected = builders.tree(tmp_path / "whole")
    out = tmp_path / "out"
    arguments = ["correct", tmp_path / "in", *common, "--out-dir", out]
    process = subprocess.Popen(
        [
            sys.executable,
            builders.HERE / "batch" / "killer.py",
            *map(str, (out, kills, *arguments)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    ends, checked = [], set()
    for line in process.stdout:
        ends.append(line.strip())
        # The next run is at work meanwhile; what was visible must be whole and stay as it is.
        names = set(next(process.stdout).split()) - checked - {JOURNAL}
        for name in names:
            wanted = {k: v for k, v in expected.items() if k.startswith(name + "/")}
            found = {f"{name}/{k}": v for k, v in builders.tree(out / name).items()}
            assert found == wanted
        checked |= names
    assert process.wait() == 0
    assert ends == ["killed"] * kills
    assert 0 < len(checked) < 1000
    result = run_correct(capsys, tmp_path / "in", *common, "--out-dir", out, "--json")
    counts = json.loads(result.out)["summary"]
    assert result.code == 0
    assert counts["skipped"] >= len(checked) and counts["corrected"] > 0
    assert counts["skipped"] + counts["corrected"] == 1000
    assert builders.tree(out) == expected
    assert {line.get("output") for line in journal_lines(out)} >= {f"n{i:04}" for i in range(1000)}


# --- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_finishes_what_is_in_memory(capsys, tmp_path, subspace):
    for i in range(600):
        builders.write_adapter(tmp_path / "in" / f"n{i:04}", seed=i % 7)
    out = tmp_path / "out"
    arguments = ["correct", tmp_path / "in", "--subspace", subspace, "--out-dir", out, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "csulora", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not out.exists() or len(os.listdir(out)) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaints and "interrupted" in complaints
    found = json.loads(text)
    done = [entry for entry in found["adapters"] if entry["status"] == "corrected"]
    assert len(found["adapters"]) == 600 and 20 <= len(done) < 600
    assert found["summary"]["failures"] == {"not started": 600 - len(done)}
    assert len(builders.outputs(out)) == len(done)
    assert len(journal_lines(out)) == 1 + len(done)
    again = run_correct(capsys, *arguments[1:], "--resume")
    assert again.code == 0
    assert json.loads(again.out)["summary"]["corrected"] == 600 - len(done)


def test_an_exception_from_the_caller_drops_the_rest_whole(tmp_path, subspace):
    from csulora import SafetySubspace, correct_many

    for i in range(60):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}")

    def stop(outcome, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        correct_many(
            [tmp_path / "in"], SafetySubspace.load(subspace), tmp_path / "out", on_done=stop
        )
    names = builders.outputs(tmp_path / "out")
    assert 1 <= len(names) < 60
    assert {line.get("output") for line in journal_lines(tmp_path / "out")} == {None, *names}
    for name in names:
        LoraAdapter.load(tmp_path / "out" / name)


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs needs root")
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(capsys, tmp_path, subspace, small_disk):
    for i in range(200):
        builders.write_adapter(tmp_path / "in" / f"n{i:03}", seed=i)
    common = (tmp_path / "in", "--subspace", subspace)
    assert run_correct(capsys, *common, "--out-dir", tmp_path / "whole").code == 0
    expected = builders.tree(tmp_path / "whole")
    out = small_disk / "out"
    result = run_correct(capsys, *common, "--out-dir", out, "--json")
    assert result.code == 1
    assert "No space left on device" in result.complaints[0]
    summary = json.loads(result.out)["summary"]
    names = builders.outputs(out)
    assert 0 < len(names) < 100 and not any(name.startswith(".") for name in names)
    assert summary["corrected"] == len(names)
    assert summary["corrected"] + summary["failed"] == 200
    # What was in memory by then is tried, the rest is not begun.
    assert set(summary["failures"]) == {"disk full", "not started"}
    assert len(result.complaints) == summary["failures"]["disk full"] + 1
    assert builders.tree(out).items() <= expected.items()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = run_correct(capsys, *common, "--out-dir", out, "--resume", "--json")
    assert again.code == 0
    assert json.loads(again.out)["summary"]["skipped"] == len(names)
    assert builders.tree(out) == expected


def test_a_journal_that_cannot_be_written_loses_nothing(capsys, batch, monkeypatch):
    source, common, out = batch

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    result = run_correct(capsys, source, *common, "--json")
    done = [name for name, (status, _) in outcomes(result).items() if status == "corrected"]
    assert done and not (out / JOURNAL).exists()
    assert len(result.warnings) == 1 and "journal cannot be written" in result.warnings[0]
    monkeypatch.undo()
    again = run_correct(capsys, source, *common, "--resume", "--json")
    assert again.code == 0
    assert [outcomes(again)[name] for name in done] == [("skipped", None)] * len(done)
    assert len(journal_lines(out)) == 4


# --- another run ----------------------------------------------------------------------------------


def test_two_runs_on_one_folder(capsys, batch):
    source, common, out = batch
    journal = Journal(out)
    result = run_correct(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert "another run is writing there" in result.complaints[0]
    assert builders.outputs(out) == []
    journal.close()
    assert run_correct(capsys, source, *common).code == 0


def test_a_run_without_an_output_leaves_no_journal(tmp_path):
    Journal(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    Journal(tmp_path / "old").close()
    assert list((tmp_path / "old").iterdir()) == []


def test_a_journal_that_is_a_link_is_not_followed(capsys, batch, tmp_path):
    source, common, out = batch
    out.mkdir()
    (tmp_path / "elsewhere").write_text("")
    (out / JOURNAL).symlink_to(tmp_path / "elsewhere")
    result = run_correct(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert (tmp_path / "elsewhere").read_text() == ""


# --- the output folder taken away ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "journal", "replaced"])
def test_an_output_folder_taken_away_ends_the_run(capsys, tmp_path, subspace, monkeypatch, what):
    for i in range(80):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}", seed=i % 3)
    out, moved = tmp_path / "out", tmp_path / "moved"
    written, turn = [], threading.Lock()
    write = steps.write

    def take_away(run, ready):
        with turn:
            done = write(run, ready)
            written.append(ready.loaded.job.item.target)
            if len(written) == 5:
                if what == "journal":
                    (out / JOURNAL).unlink()
                else:
                    out.rename(moved)
                if what == "replaced":
                    out.mkdir()
        return done

    monkeypatch.setattr(steps, "write", take_away)
    call = (tmp_path / "in", "--subspace", subspace, "--out-dir", out)
    result = run_correct(capsys, *call, "--json")
    assert result.code == 1 and not result.warnings
    (line,) = result.complaints
    place = (
        f"the {'journal in' if what == 'journal' else 'output folder'} {out} was removed or renamed"
    )
    assert "adapters were not started, the first: " in line and line.endswith(f"as {place}")
    place = out if what == "journal" else moved
    done = {name for name, (status, _) in outcomes(result).items() if status == "corrected"}
    elsewhere = builders.outputs(out) if what == "replaced" else []
    assert len(elsewhere) < WRITERS  # those that were being written
    assert 5 <= len(done) < 15 and len(builders.outputs(place)) + len(elsewhere) >= len(done)
    assert out.exists() == (what != "folder")
    monkeypatch.undo()
    # The next run begins a journal of its own, or goes on with that of the folder.
    again = run_correct(capsys, *call[:-1], place, "--resume", "--json")
    assert again.code == 0
    assert json.loads(again.out)["summary"]["skipped"] >= len(done) - len(elsewhere)


def test_an_output_folder_taken_away_at_the_end_is_told_of(capsys, batch, monkeypatch):
    source, common, out = batch
    write, written = steps.write, []

    def take_away(run, ready):
        done = write(run, ready)
        written.append(done)
        if len(written) == 3:
            shutil.rmtree(out)
        return done

    monkeypatch.setattr(steps, "write", take_away)
    result = run_correct(capsys, source, *common)
    (warning,) = result.warnings
    assert warning == f"csulora: warning: the output folder {out} was removed or renamed"
    assert not out.exists()


def test_folders_are_not_made_anew_while_a_run_works_in_them(tmp_path):
    with not_made_anew(tmp_path / "out"):
        with pytest.raises(FileNotFoundError):
            make_folders(tmp_path / "out" / "a" / "b")
        make_folders(tmp_path / "other" / "a")
    make_folders(tmp_path / "out" / "a" / "b")


def test_a_stop_does_not_wait_for_a_hub(tmp_path, subspace, monkeypatch):
    asked, answer = threading.Event(), threading.Event()
    read = steps.read

    def wait(run, job):
        if not job.item.local:
            asked.set()
            answer.wait(60)
        return read(run, job)

    monkeypatch.setattr(steps, "read", wait)
    adapter = builders.write_adapter(tmp_path / "a")
    call = Call(tmp_path / "out")
    run = stream(find([adapter, "org/x"]), SafetySubspace.load(subspace), call)
    try:
        assert next(run).status == "corrected" and asked.wait(60)
        run.close()  # returns, though nobody answers
        assert not answer.is_set()
    finally:
        answer.set()
    assert builders.outputs(tmp_path / "out") == ["a"]


# --- folders that become links --------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "waiting", "late"])
def test_a_folder_that_becomes_a_link_during_a_run(capsys, batch, tmp_path, monkeypatch, when):
    """Folders that adapters share are looked at again before each output."""
    source, common, out = batch
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write, locked, place = steps.write, steps.locked, steps.write_folder

    def swap():
        moved = itertools.count()
        while not (out / "t").is_symlink():
            if (out / "t").exists():
                (out / "t").rename(tmp_path / f"moved{next(moved)}")
            # The other adapter's thread may have made the folder again meanwhile.
            with contextlib.suppress(FileExistsError):
                (out / "t").symlink_to(elsewhere)

    def writing(run, ready):
        if when == "before" and ready.loaded.job.item.target == "t/b":
            swap()
        return write(run, ready)

    def locking(target):
        if when == "waiting" and target.name == "b":
            swap()
        return locked(target)

    def placing(adapter, target, **options):
        if when == "late" and target.name == "b":
            swap()
        return place(adapter, target, **options)

    monkeypatch.setattr(steps, "write", writing)
    monkeypatch.setattr(steps, "locked", locking)
    monkeypatch.setattr(steps, "write_folder", placing)
    result = run_correct(capsys, source, *common)
    assert result.code == 1 and result.complaints, result.err
    others = [line for line in result.complaints if "link" not in line and "t/a" not in line]
    assert not others, result.complaints
    assert not list(elsewhere.iterdir()) and (out / "c").is_dir()
