"""Runs that are killed, interrupted, run out of disk, meet another run, or resume on changed ground."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import builders
import pytest
from builders import JOURNAL, REPORT, WEIGHTS

from csulora import LoraAdapter
from csulora.batch import work
from csulora.batch.journal import Journal


def call(capsys, *arguments):
    return builders.run(capsys, "correct", *arguments)


@pytest.fixture
def batch(tmp_path, subspace, monkeypatch):
    """Three adapters in a tree and the options to correct it; their files count as long unchanged."""
    monkeypatch.setattr(work, "SETTLED_NS", 0)
    for i, name in enumerate(("t/a", "t/b", "c")):
        builders.write_adapter(tmp_path / "in" / name, seed=i)
    return (
        tmp_path / "in",
        ("--subspace", subspace, "--out-dir", tmp_path / "out"),
        tmp_path / "out",
    )


def outcomes(result):
    return {
        os.path.basename(entry["adapter"]): (entry["status"], entry.get("kind"))
        for entry in json.loads(result.out)["adapters"]
    }


def journal_lines(out):
    lines = (out / JOURNAL).read_bytes().splitlines()
    return [json.loads(line) for line in lines if line.startswith(b"{")]


# --- killed ---------------------------------------------------------------------------------------

# Children are forked from a process that has imported everything: a kill costs no second of imports.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import csulora.batch.local, csulora.cli.correct
from csulora.cli import main

out, kills, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
chance = random.Random(0)
sync = os.fsync

def slow(descriptor):
    time.sleep(0.004)
    sync(descriptor)

os.fsync = slow
for number in range(kills):
    before = len(os.listdir(out)) if os.path.exists(out) else 0
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(arguments))
    deadline = time.monotonic() + 60
    while (len(os.listdir(out)) if os.path.exists(out) else 0) <= before:
        if time.monotonic() > deadline:
            sys.exit("the run does not go on")
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    names = sorted(name for name in os.listdir(out) if not name.startswith("."))
    print(*names, flush=True)
"""


@pytest.mark.slow
def test_fifty_kills_then_resume_gives_the_same_bytes(capsys, tmp_path, subspace):
    kills = 50
    for i in range(1000):
        builders.write_adapter(tmp_path / "in" / f"n{i:04}", seed=i)
    common = ("--subspace", subspace, "--resume")
    assert call(capsys, tmp_path / "in", *common, "--out-dir", tmp_path / "whole").code == 0
    expected = builders.tree(tmp_path / "whole")
    out = tmp_path / "out"
    arguments = ["correct", tmp_path / "in", *common, "--out-dir", out]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER, *map(str, (out, kills, *arguments))],
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
    result = call(capsys, tmp_path / "in", *common, "--out-dir", out, "--json")
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
        [sys.executable, "-m", "csulora.cli", *map(str, arguments)],
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
    again = call(capsys, *arguments[1:], "--resume")
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
    assert call(capsys, *common, "--out-dir", tmp_path / "whole").code == 0
    expected = builders.tree(tmp_path / "whole")
    out = small_disk / "out"
    result = call(capsys, *common, "--out-dir", out, "--json")
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
    again = call(capsys, *common, "--out-dir", out, "--resume", "--json")
    assert again.code == 0
    assert json.loads(again.out)["summary"]["skipped"] == len(names)
    assert builders.tree(out) == expected


def test_a_journal_that_cannot_be_written_loses_nothing(capsys, batch, monkeypatch):
    source, common, out = batch

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    result = call(capsys, source, *common, "--json")
    done = [name for name, (status, _) in outcomes(result).items() if status == "corrected"]
    assert done and not (out / JOURNAL).exists()
    assert len(result.warnings) == 1 and "journal cannot be written" in result.warnings[0]
    monkeypatch.undo()
    again = call(capsys, source, *common, "--resume", "--json")
    assert again.code == 0
    assert [outcomes(again)[name] for name in done] == [("skipped", None)] * len(done)
    assert len(journal_lines(out)) == 4


# --- another run ----------------------------------------------------------------------------------


def test_two_runs_on_one_folder(capsys, batch):
    source, common, out = batch
    journal = Journal(out)
    result = call(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert "another run is writing there" in result.complaints[0]
    assert builders.outputs(out) == []
    journal.close()
    assert call(capsys, source, *common).code == 0


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
    result = call(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert (tmp_path / "elsewhere").read_text() == ""


# --- resuming -------------------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("this adapter was read again")


def test_resume_reads_nothing_that_is_finished(capsys, batch, monkeypatch):
    source, common, out = batch
    assert call(capsys, source, *common).code == 0
    before = builders.tree(out)
    for name in ("read", "identify", "read_json"):
        monkeypatch.setattr(work, name, never)
    result = call(capsys, source, *common, "--resume", "--json")
    assert result.code == 0
    assert set(outcomes(result).values()) == {("skipped", None)}
    assert builders.tree(out) == before
    # Skipped adapters count in the figures of the batch too.
    assert json.loads(result.out)["summary"]["spread"]["off"]["median"] > 0


def lose_journal(source, out):
    (out / JOURNAL).unlink()


def tear_last_line(source, out):
    data = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(data[: data.rstrip(b"\n").rindex(b"\n") + 40])


def garble_a_line(source, out):
    lines = (out / JOURNAL).read_bytes().split(b"\n")
    lines[1] = b"\x00\xff" * 10
    (out / JOURNAL).write_bytes(b"\n".join(lines))


def remove_output(source, out):
    shutil.rmtree(out / "t" / "a")


def change_weights(source, out):
    builders.write_adapter(source / "t" / "a", seed=99)


def change_config(source, out):
    builders.edit_json(source / "t" / "a" / builders.CONFIG, lora_alpha=3)


def touch_source(source, out):
    os.utime(source / "t" / "a" / WEIGHTS)


def remove_source_weights(source, out):
    (source / "t" / "a" / WEIGHTS).unlink()


def remove_report(source, out):
    (out / "t" / "a" / REPORT).unlink()


def replace_output(source, out):
    """The output is not what the journal says: made with other settings behind its back."""
    from csulora import Correction, SafetySubspace, correct

    subspace = SafetySubspace.load(out.parent / "subspace.safetensors")
    new, report = correct(LoraAdapter.load(source / "t" / "a"), subspace, Correction(lambda_off=3))
    new.save(out / "t" / "a", overwrite=True, report=report.to_dict())


MATRIX = {
    "nothing": (lambda source, out: None, ("skipped", None), ""),
    "journal-lost": (lose_journal, ("skipped", None), ""),
    "last-line-torn": (tear_last_line, ("skipped", None), ""),
    "line-garbled": (garble_a_line, ("skipped", None), ""),
    "output-removed": (remove_output, ("corrected", None), ""),
    "source-touched": (touch_source, ("skipped", None), ""),
    "weights-changed": (change_weights, ("failed", "changed"), "other source"),
    "config-changed": (change_config, ("failed", "changed"), "other source"),
    "source-vanished": (remove_source_weights, ("failed", "source"), "no such file"),
    "report-removed": (remove_report, ("failed", "exists"), "not an output of csulora"),
    "output-replaced": (replace_output, ("failed", "changed"), "other settings"),
}


@pytest.mark.parametrize("case", MATRIX)
def test_resume(case, capsys, batch):
    change, expected, word = MATRIX[case]
    source, common, out = batch
    assert call(capsys, source, *common).code == 0
    before = builders.tree(out)
    change(source, out)
    result = call(capsys, source, *common, "--resume", "--json")
    found = outcomes(result)
    assert found.pop("a") == expected, result.err
    assert set(found.values()) == {("skipped", None)}
    assert result.code == (1 if expected[0] == "failed" else 0)
    assert word in "".join(result.complaints)
    if expected[0] != "failed":
        assert builders.tree(out) == before
        assert {line.get("output") for line in journal_lines(out)} == {None, "t/a", "t/b", "c"}


@pytest.mark.parametrize(
    "change", [("--lambda-off", 3), ("--rank", "same"), ("--subspace-rank", 2), ("--portable",)]
)
def test_resume_with_other_settings_mixes_nothing(change, capsys, batch):
    source, common, out = batch
    assert call(capsys, source, *common).code == 0
    shutil.rmtree(out / "t" / "a")
    before = builders.tree(out)
    result = call(capsys, source, *common, "--resume", "--json", *change)
    assert result.code == 1
    found = outcomes(result)
    assert found == {
        "a": ("failed", "not started"),
        "b": ("failed", "changed"),
        "c": ("failed", "changed"),
    }
    assert builders.tree(out) == before


def test_a_file_that_changed_a_moment_ago_is_looked_at_again(capsys, batch, monkeypatch):
    monkeypatch.setattr(work, "SETTLED_NS", 3_600_000_000_000)
    source, common, out = batch
    assert call(capsys, source, *common).code == 0
    assert all(line["files"] is None for line in journal_lines(out)[1:])
    monkeypatch.setattr(work, "identify", never)
    assert call(capsys, source, *common, "--resume").code == 1


def test_the_journal_of_another_version(capsys, batch):
    source, common, out = batch
    out.mkdir()
    (out / JOURNAL).write_text('{"format": "csulora_journal/2"}\n')
    result = call(capsys, source, *common)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert "csulora_journal/1" in result.complaints[0]


def test_an_unreadable_source_fails_alone(capsys, batch, monkeypatch):
    source, common, _ = batch
    read = open

    def denied(path, *rest, **options):
        if str(path).endswith(f"t/a/{WEIGHTS}") and str(source) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest, **options)

    monkeypatch.setattr("builtins.open", denied)
    result = call(capsys, source, *common, "--json")
    assert result.code == 1
    assert outcomes(result)["a"] == ("failed", "source")
    assert "Permission denied" in result.complaints[0]
    assert json.loads(result.out)["summary"]["corrected"] == 2


def test_a_source_that_vanishes_fails_alone_and_is_not_sought_elsewhere(
    batch, monkeypatch, tmp_path, subspace
):
    from pathlib import Path

    from csulora import SafetySubspace, files
    from csulora.batch import Call, find, stream

    monkeypatch.chdir(tmp_path)
    items = find(["in/c", "in/t"])
    shutil.rmtree("in/c")
    monkeypatch.setattr(files, "resolve_source", never)
    found = list(stream(items, SafetySubspace.load(subspace), Call(Path("out"))))
    assert [outcome.status for outcome in found] == ["failed", "corrected", "corrected"]
    assert (found[0].kind, found[0].error) == ("source", "in/c: no such folder any more")


# --- memory ---------------------------------------------------------------------------------------


def test_no_more_than_the_budget_is_in_memory(tmp_path, subspace, monkeypatch):
    import threading

    from csulora import SafetySubspace, correct_many
    from csulora.batch.local import HELD

    for i in range(30):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}")
    size = (tmp_path / "in" / "n00" / WEIGHTS).stat().st_size
    held, most, lock = 0, 0, threading.Lock()
    read, write = work.read, work.write

    def reading(*arguments):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return read(*arguments)

    def writing(*arguments):
        nonlocal held
        time.sleep(random.random() / 500)
        with lock:
            held -= 1
        return write(*arguments)

    monkeypatch.setattr(work, "read", reading)
    monkeypatch.setattr(work, "write", writing)
    loaded = SafetySubspace.load(subspace)
    for budget, expected in ((1, 1), (2 * HELD * size, 2), (3 * HELD * size, 3)):
        most = 0
        out = tmp_path / f"out{budget}"
        correct_many([tmp_path / "in"], loaded, out, batch_bytes=budget)
        assert most == expected


PEAK = """
import resource, sys
import torch
torch.set_num_threads(1)
from csulora.cli import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number(tmp_path, subspace):
    for i in range(1200):
        builders.write_adapter(tmp_path / "in" / f"t{i // 120}" / f"n{i:04}")
    peaks = []
    for place in ("in/t0", "in"):
        arguments = ["correct", tmp_path / place, "--subspace", subspace, "--out-dir"]
        out = tmp_path / "out" / str(len(peaks))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, (*arguments, out))],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks
