"""Many adapters in one call: bad ones never stop good ones, resuming, and being killed."""

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import builders
import pytest
import torch
from builders import run_correct

from csulora import CsuloraError, LoraAdapter, SafetySubspace, correct, correct_many


@pytest.fixture
def three(tmp_path, subspace):
    """Two good adapters with a bad one between them, and the common options."""
    good = [builders.write_adapter(tmp_path / "in" / name, seed=i) for i, name in enumerate("ac")]
    bad = builders.write_adapter(tmp_path / "in" / "b")
    (bad / builders.WEIGHTS).write_bytes(b"\xff" * 40)
    common = ("--subspace", subspace, "--out-dir", tmp_path / "out")
    return [good[0], bad, good[1]], common, tmp_path / "out"


@pytest.mark.parametrize("jobs", [1, 2])
def test_good_ones_are_written_and_the_bad_one_is_named(capsys, three, jobs):
    adapters, common, out = three
    result = run_correct(capsys, *adapters, *common, "--jobs", jobs, "--json")
    assert result.code == 1
    outcomes = json.loads(result.out)["adapters"]
    assert [entry["status"] for entry in outcomes] == ["corrected", "failed", "corrected"]
    assert len(result.complaints) == 1 and str(adapters[1]) in result.complaints[0]
    assert builders.outputs(out) == ["a", "c"]
    for name in "ac":
        assert LoraAdapter.load(out / name).modules


def test_adapters_from_a_file_and_from_standard_input(capsys, three, monkeypatch, tmp_path):
    adapters, common, out = three
    (tmp_path / "list").write_text(f"{adapters[0]}\n\n")
    assert run_correct(capsys, *common, "--adapters-from", tmp_path / "list").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{adapters[2]}\n"))
    assert run_correct(capsys, *common, "--adapters-from", "-").code == 0
    assert builders.outputs(out) == ["a", "c"]


def test_resume_skips_finished_and_refuses_to_mix(capsys, three):
    adapters, common, out = three
    assert run_correct(capsys, adapters[0], *common).code == 0
    before = builders.tree(out)
    again = run_correct(capsys, adapters[0], adapters[2], *common, "--resume", "--json")
    statuses = [entry["status"] for entry in json.loads(again.out)["adapters"]]
    assert again.code == 0 and statuses == ["skipped", "corrected"]
    assert builders.tree(out).items() >= before.items()
    for change in (("--lambda-off", 3), ("--rank", "same"), ("--subspace-rank", 2)):
        changed = run_correct(capsys, adapters[0], *common, "--resume", *change)
        assert changed.code == 1 and "made with other" in changed.complaints[0]
    builders.write_adapter(adapters[0], seed=77)
    changed = run_correct(capsys, adapters[0], *common, "--resume")
    assert changed.code == 1 and "source" in changed.complaints[0]
    assert run_correct(capsys, adapters[0], *common).code == 1  # neither --overwrite nor --resume
    assert builders.tree(out).items() >= before.items()
    assert run_correct(capsys, adapters[0], *common, "--overwrite").code == 0
    assert not builders.tree(out).items() >= before.items()


def test_same_input_same_bytes(capsys, three, tmp_path):
    adapters, common, out = three
    assert run_correct(capsys, adapters[0], *common).code == 0
    first = builders.tree(out)
    assert run_correct(capsys, adapters[0], *common, "--overwrite").code == 0
    assert builders.tree(out) == first


def test_a_full_disk_leaves_nothing_behind(capsys, three, monkeypatch):
    adapters, common, out = three

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run_correct(capsys, adapters[0], *common)
    assert result.code == 1 and "No space left" in result.complaints[0]
    assert builders.tree(out) == {}


KILLED = """
import os, sys, time
sync = os.fsync
def slow(descriptor):
    time.sleep(0.01)
    sync(descriptor)
os.fsync = slow
from csulora.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_leaves_only_whole_folders_and_resumes(capsys, tmp_path, subspace):
    adapters = [builders.write_adapter(tmp_path / "in" / f"n{i}", seed=i) for i in range(8)]
    whole = tmp_path / "whole"
    assert run_correct(capsys, *adapters, "--subspace", subspace, "--out-dir", whole).code == 0
    expected = builders.tree(whole)
    out = tmp_path / "out"
    arguments = ["correct", *adapters, "--subspace", subspace, "--out-dir", out, "--resume"]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not out.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)  # imports take their time: aim at the writing
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in out.iterdir():
            if folder.is_dir() and not folder.name.startswith("."):
                wanted = {k: v for k, v in expected.items() if k.startswith(folder.name + "/")}
                found = {f"{folder.name}/{k}": v for k, v in builders.tree(folder).items()}
                assert found == wanted
    assert (
        run_correct(capsys, *adapters, "--subspace", subspace, "--out-dir", out, "--resume").code
        == 0
    )
    assert builders.tree(out) == expected


def test_saving_onto_the_source_is_refused(tmp_path, subspace, adapter):
    new, _ = correct(LoraAdapter.load(adapter), SafetySubspace.load(subspace))
    with pytest.raises(CsuloraError, match="lies inside"):
        new.save(adapter, overwrite=True)


def test_groups_as_on_a_gpu_give_the_same_and_a_bad_one_fails_alone(
    tmp_path, subspace, monkeypatch
):
    """On a GPU what has been read is corrected in one go; an error nobody foresaw is pinned down."""
    from csulora import folder
    from csulora.batch import local

    for i in range(30):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}", seed=i)
    loaded = SafetySubspace.load(subspace)
    correct_many([tmp_path / "in"], loaded, tmp_path / "one-by-one")
    sizes = []
    batch = folder.correct_batch

    def slow(adapters, *rest, **options):
        sizes.append(len(adapters))
        time.sleep(0.02)  # meanwhile others are read
        if any(adapter.source.name == "n17" for adapter in adapters):
            raise RuntimeError("kernel\nfell over")
        return batch(adapters, *rest, **options)

    monkeypatch.setattr(folder, "correct_batch", slow)
    monkeypatch.setattr(local, "pick_device", lambda device: torch.device("cuda"))
    outcomes = correct_many([tmp_path / "in"], loaded, tmp_path / "out")
    assert max(sizes) > 3
    assert [(o.kind, o.error) for o in outcomes if o.status == "failed"] == [
        ("unforeseen", f"{tmp_path / 'in' / 'n17'}: RuntimeError: kernel fell over")
    ]
    expected = builders.tree(tmp_path / "one-by-one")
    assert builders.tree(tmp_path / "out") == {
        name: data for name, data in expected.items() if not name.startswith("n17/")
    }


def test_outcomes_come_in_order_with_their_number(tmp_path, subspace):
    for i in range(20):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}", seed=i)
    seen = []
    outcomes = correct_many(
        [tmp_path / "in"],
        SafetySubspace.load(subspace),
        tmp_path / "out",
        jobs=3,
        on_done=lambda outcome, done, total: seen.append((outcome.output.name, done, total)),
    )
    assert seen == [(f"n{i:02}", i + 1, 20) for i in range(20)]
    assert [outcome.output.name for outcome in outcomes] == [name for name, _, _ in seen]
    assert all(o.seconds > 0 and 0 < o.bytes_in < o.bytes_out for o in outcomes)
    assert all(o.report is not None and not o.report.modules and o.totals for o in outcomes)


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--engine", "ray"), "csulora[ray]"), (("--ray-address", "auto"), "engine ray")],
)
def test_ray_absent_or_not_asked_for(three, capsys, monkeypatch, options, word):
    adapters, common, out = three
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "ray" else find_spec(name)
    )
    result = run_correct(capsys, adapters[0], *common, *options)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert word in result.complaints[0]
    assert not out.exists()


def test_an_error_that_ends_a_run_leaves_nobody_waiting(tmp_path, subspace, monkeypatch):
    """Adapters that were read wait for memory, which the step that failed had."""
    for i in range(8):
        builders.write_adapter(tmp_path / "in" / f"n{i}", seed=i)

    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("csulora.batch.steps.correct_group", broken)
    loaded = SafetySubspace.load(subspace)
    before, errors = threading.active_count(), []

    def run():
        try:
            correct_many([tmp_path / "in"], loaded, tmp_path / "out", batch_bytes=1)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert errors == ["the device is gone"]
    # Threads that were told to end may need a moment where other processes have the cores.
    until = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() == before
