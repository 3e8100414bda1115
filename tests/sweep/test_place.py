"""What a sweep may write to: nothing but its own folder, and only one sweep at a time."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest

from csulora import CsuloraError, ExistsError, UsageError
from csulora.sweep.place import EVALUATIONS, RESULT, VARIANT, Place

MEASURE = Path(__file__).with_name("measure.py")


def test_folders_that_are_none_of_a_sweep_are_refused(capsys, adapter, subspace, tmp_path):
    out = tmp_path / "out"
    call = ("sweep", adapter, "--subspace", subspace, "--out-dir")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for where, text in (
        (out, "a folder that holds no sweep"),
        (out / "notes.txt", "exists and is not a folder"),
        (adapter, "inside the adapter"),
        (adapter / "below", "inside the adapter"),
        (adapter.parent, "inside the adapter"),
        ("", "--out-dir is empty"),
    ):
        before = builders.tree(tmp_path)
        found = builders.run(capsys, *call, where)
        assert found.code == 2 and text in found.err, found.err
        assert builders.tree(tmp_path) == before
    (out / RESULT).write_text('{"format": "another/1"}')
    assert "was not written by a sweep" in builders.run(capsys, *call, out).err
    (out / RESULT).unlink()
    (out / "notes.txt").unlink()
    assert builders.run(capsys, *call, out).code == 0
    assert sorted(os.listdir(out)) == ["energies.png", RESULT]
    # And once more: a sweep replaces its own.
    assert builders.run(capsys, *call, out, "--ranks", "2").code == 0


def test_a_picture_of_others_is_not_replaced(capsys, adapter, subspace, out):
    call = ("sweep", adapter, "--subspace", subspace, "--out-dir", out)
    assert builders.run(capsys, *call).code == 0
    (out / "energies.png").write_text("mine")
    found = builders.run(capsys, *call)
    assert found.code == 0 and "no picture: " in found.err and "not a PNG" in found.err
    assert (out / "energies.png").read_text() == "mine"
    assert "energies.png" not in found.out.splitlines()[-1]


def test_one_sweep_at_a_time(tmp_path):
    place = Place(tmp_path / "out", None)
    try:
        with pytest.raises(UsageError, match="another sweep is at work"):
            Place(tmp_path / "out", None)
    finally:
        place.close()
    assert not (tmp_path / "out").exists()  # nothing was kept
    (tmp_path / "mine").mkdir()
    Place(tmp_path / "mine", None).close()
    assert os.listdir(tmp_path / "mine") == []


def test_the_folder_of_another_sweep_is_left_alone(tmp_path):
    """One that began where this one's folder was taken away."""
    first = Place(tmp_path / "out", None)
    shutil.rmtree(tmp_path / "out")
    second = Place(tmp_path / "out", None)
    first.close()
    second.keep("a", {"x": 1.0}, command="c")
    second.close()
    third = Place(tmp_path / "out", None)
    assert third.find("a") == {"x": 1.0}
    third.close()


def test_what_is_kept_and_what_is_refused(tmp_path):
    out = tmp_path / "out"
    place = Place(out, None)
    place.keep("a", {"x": 1.0}, command="c")
    place.keep("b", {"x": 2.0})
    place.close()
    for entry in (b'{"key": "c", "metrics": {"x": "1"}}\n', b'{"key": "d", "metr', b'{"key": 1}'):
        with open(out / EVALUATIONS, "ab") as file:
            file.write(entry)
        place = Place(out, None)
        assert place.find("a") == {"x": 1.0} and place.find("b") == {"x": 2.0}
        assert place.find("c") is None and place.find("d") is None
        place.close()
    with open(out / EVALUATIONS, "ab") as file:
        file.write(b'{"key": "' + 500 * b"x")  # longer than what comes in its place
    place = Place(out, None)
    place.keep("e", {"x": 3.0})
    place.close()
    lines = (out / EVALUATIONS).read_text().splitlines()
    assert json.loads(lines[-1]) == {"key": "e", "metrics": {"x": 3.0}}
    assert all(line.startswith("{") for line in lines)
    (out / VARIANT.join(("", "old"))).mkdir()
    place = Place(out, None, fresh=True)
    assert place.find("a") is None and os.listdir(out) == [EVALUATIONS]
    place.close()
    for text in ('{"format": "other/1"}\n', "no json\n"):
        out.mkdir(exist_ok=True)
        (out / EVALUATIONS).write_text(text)
        (out / f"{VARIANT}mine").mkdir(exist_ok=True)
        for fresh in (False, True):
            with pytest.raises(CsuloraError, match="not kept by this version"):
                Place(out, None, fresh=fresh)
        assert (out / EVALUATIONS).read_text() == text and (out / f"{VARIANT}mine").is_dir()


def test_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    Place(tmp_path / "link", None).close()  # where the caller said that outputs go
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(ExistsError, match="leads nowhere"):
        Place(tmp_path / "nowhere", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / EVALUATIONS).symlink_to(tmp_path / "file")
    with pytest.raises(CsuloraError, match="cannot be written"):
        Place(tmp_path / "out", None)


class Running:
    """A sweep in a process of its own, in a folder that holds adapter and subspace."""

    def __init__(self, folder, like=None):
        self.folder, self.log, self.block = folder, folder / "log", folder / "block"
        builders.write_adapter(folder / "lora")
        builders.write_subspace(folder / "s.safetensors")
        if like is not None:  # the very bytes: safetensors orders metadata at random
            for name in (f"lora/{builders.WEIGHTS}", "s.safetensors"):
                shutil.copy(like.folder / name, folder / name)

    def start(self):
        words = [
            sys.executable,
            str(MEASURE),
            "lora",
            "{adapter}",
            "--log",
            "log",
            "--block",
            "block",
        ]
        call = ["sweep", "lora", "--subspace", "s.safetensors", "--out-dir", "out", "--jobs", "2"]
        call += [
            "--methods",
            "realign",
            "--ranks",
            "2,4",
            "--steps",
            "2",
            "--eval",
            shlex.join(words),
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "csulora", *call],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def stopped(self, number):
        """Start, wait until evaluations block, send a signal; returns the exit code and stderr."""
        self.block.touch()
        process = self.start()
        try:
            while len(self.calls()) < 5 and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        except BaseException:
            self.block.unlink()  # whatever waits for it ends
            process.kill()
            raise
        return process.returncode, err


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a sweep that nothing disturbed."""
    running = Running(tmp_path_factory.mktemp("whole"))
    process = running.start()
    assert process.wait(timeout=300) == 0
    return running


def test_a_killed_sweep_goes_on_to_the_same_end(tmp_path, whole):
    running = Running(tmp_path, like=whole)
    code, _ = running.stopped(signal.SIGKILL)
    assert code == -signal.SIGKILL
    running.block.unlink()  # the two that were left behind come to their end
    out = tmp_path / "out"
    assert any(name.startswith(VARIANT) for name in os.listdir(out))
    kept = len((out / EVALUATIONS).read_text().splitlines()) - 1
    assert kept >= 1
    process = running.start()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    text, calls = (whole.folder / "out" / RESULT).read_bytes(), len(whole.calls())
    assert (out / RESULT).read_bytes() == text
    assert not any(name.startswith(VARIANT) for name in os.listdir(out))
    # Only the two that were cut short ran twice.
    assert calls < len(running.calls()) <= calls + 2
    assert json.loads(text)["best"] is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_commands_too(tmp_path, number):
    running = Running(tmp_path)
    code, err = running.stopped(number)
    assert code == 128 + number
    assert "Traceback" not in err and err.splitlines()[-1].startswith("csulora: ")
    assert not any(alive(int(line.split()[0])) for line in running.calls())
    left = os.listdir(tmp_path / "out")
    assert left == [EVALUATIONS]
