"""One folder to one folder: made, made anew, recognised; and asked for by many at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
from builders import CONFIG, REPORT, WEIGHTS

import csulora
from csulora import ChangedError, Correction, CsuloraError, ExistsError, UsageError, folder


@pytest.fixture
def loaded(subspace):
    return csulora.SafetySubspace.load(subspace)


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_a_fresh_target_is_what_the_batch_writes(capsys, adapter, subspace, loaded, tmp_path):
    outcome = csulora.correct_folder(adapter, loaded, tmp_path / "one" / "deep" / "lora")
    assert (outcome.status, outcome.adapter) == ("corrected", str(adapter))
    assert outcome.output == tmp_path / "one" / "deep" / "lora"
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", tmp_path / "two")
    assert builders.run(capsys, *arguments).code == 0
    assert builders.tree(outcome.output) == builders.tree(tmp_path / "two" / "lora")
    assert names(outcome.output.parent) == ["lora"]  # no journal, no lock, nothing temporary
    written = json.loads((outcome.output / REPORT).read_text())
    assert outcome.report == csulora.Report.from_dict(written)
    assert outcome.totals == outcome.report.totals and outcome.report.modules
    assert outcome.bytes_out == (outcome.output / WEIGHTS).stat().st_size > outcome.bytes_in


def test_what_is_up_to_date_is_recognised_and_not_touched(adapter, loaded, out, monkeypatch):
    first = csulora.correct_folder(adapter, loaded, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(folder, "correct_batch", None)  # nothing is computed
    for existing in ("refresh", "resume"):
        again = csulora.correct_folder(adapter, loaded, out, existing=existing)
        assert again.status == "skipped" and again.report == first.report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def change_weights(adapter):
    builders.edit_tensors(adapter / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))


def change_config(adapter):
    builders.edit_json(adapter / CONFIG, lora_alpha=3)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (change_weights, "source"),
        (change_config, "source"),
        (lambda adapter: {"correction": Correction(lambda_off=99)}, "settings"),
        (lambda adapter: {"correction": Correction(form="same")}, "settings"),
        (lambda adapter: {"portable": True}, "settings"),
    ],
)
def test_a_changed_source_or_setting_refreshes(adapter, loaded, out, tmp_path, change, word):
    csulora.correct_folder(adapter, loaded, out)
    options = change(adapter) or {}
    with pytest.raises(ChangedError, match=f"made with other {word}"):
        csulora.correct_folder(adapter, loaded, out, existing="resume", **options)
    outcome = csulora.correct_folder(adapter, loaded, out, **options)
    assert outcome.status == "corrected"
    csulora.correct_folder(adapter, loaded, tmp_path / "fresh", **options)
    assert builders.tree(out) == builders.tree(tmp_path / "fresh")


def test_another_subspace_refreshes(adapter, loaded, out, tmp_path):
    csulora.correct_folder(adapter, loaded, out)
    other = builders.write_subspace(tmp_path / "o", builders.subspace_tensors(seed=1))
    outcome = csulora.correct_folder(adapter, csulora.SafetySubspace.load(other), out)
    assert outcome.status == "corrected"
    assert outcome.report.subspace["sha256"] == builders.digest(other)


def test_refuse_overwrite_and_folders_of_others(adapter, loaded, out):
    csulora.correct_folder(adapter, loaded, out, existing="refuse")
    with pytest.raises(ExistsError, match=r"already exists$"):
        csulora.correct_folder(adapter, loaded, out, existing="refuse")
    assert csulora.correct_folder(adapter, loaded, out, existing="overwrite").status == "corrected"
    (out / REPORT).unlink()
    for existing in ("refresh", "resume"):
        with pytest.raises(ExistsError, match=r"not an output of csulora$"):
            csulora.correct_folder(adapter, loaded, out, existing=existing)
    with pytest.raises(UsageError, match="existing must be one of"):
        csulora.correct_folder(adapter, loaded, out, existing="never")


def test_an_output_with_uncorrected_tensors_is_not_what_was_asked_for(adapter, loaded, out):
    builders.edit_tensors(
        adapter / WEIGHTS, lambda tensors: tensors.update(odd=tensors[min(tensors)].clone())
    )
    assert csulora.correct_folder(adapter, loaded, out, pass_through=True).status == "corrected"
    assert csulora.correct_folder(adapter, loaded, out, pass_through=True).status == "skipped"
    before = builders.tree(out)
    with pytest.raises(CsuloraError, match="odd"):
        csulora.correct_folder(adapter, loaded, out)
    assert builders.tree(out) == before


def test_a_bad_source_writes_nothing_and_keeps_what_is_there(adapter, loaded, out):
    csulora.correct_folder(adapter, loaded, out)
    before = builders.tree(out)
    (adapter / WEIGHTS).write_bytes(b"\xff" * 40)
    with pytest.raises(CsuloraError, match="safetensors"):
        csulora.correct_folder(adapter, loaded, out)
    assert builders.tree(out) == before and names(out.parent) == sorted(
        ["in", "out", "subspace.safetensors"]
    )
    with pytest.raises(CsuloraError, match="no such folder"):
        csulora.correct_folder(adapter.parent / "gone", loaded, out)


@pytest.mark.parametrize("where", ["in/lora/out", "in", "in/lora"])
def test_a_target_in_the_way_of_its_source(adapter, loaded, tmp_path, where):
    before = builders.tree(tmp_path)
    with pytest.raises(CsuloraError, match="lies inside the adapter"):
        csulora.correct_folder(adapter, loaded, tmp_path / where)
    assert builders.tree(tmp_path) == before


def test_a_target_that_cannot_be_written(adapter, loaded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CsuloraError, match="cannot be written"):
        csulora.correct_folder(adapter, loaded, tmp_path / "file" / "out")


# --- many at once ---------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often a correction was computed; each takes long enough for the others to arrive."""
    calls = []
    compute = folder.correct_batch

    def slow(adapters, *rest, **options):
        calls.append(len(adapters))
        time.sleep(0.1)
        return compute(adapters, *rest, **options)

    monkeypatch.setattr(folder, "correct_batch", slow)
    return calls


@pytest.mark.parametrize("existing", folder.EXISTING)
def test_of_many_threads_one_does_the_work(adapter, loaded, out, counted, existing):
    start = threading.Barrier(8)

    def ask(_):
        start.wait()
        return csulora.correct_folder(adapter, loaded, out, existing=existing)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(ask, range(8)))
    assert counted == [1]
    assert sorted(o.status for o in outcomes) == ["corrected"] + ["skipped"] * 7
    assert len({json.dumps(o.report.to_dict()) for o in outcomes}) == 1
    assert names(out.parent) == ["in", "out", "subspace.safetensors"]


def test_threads_with_different_targets_do_not_wait_for_each_other(
    adapter, loaded, tmp_path, counted
):
    meeting = threading.Barrier(3, timeout=60)
    compute = folder.correct_batch

    def met(*arguments, **options):
        meeting.wait()  # breaks unless all three are inside at once
        return compute(*arguments, **options)

    folder.correct_batch = met  # `counted` undoes it
    with ThreadPoolExecutor(3) as pool:
        targets = [tmp_path / f"out{i}" for i in range(3)]
        found = list(pool.map(lambda t: csulora.correct_folder(adapter, loaded, t), targets))
    assert [o.status for o in found] == ["corrected"] * 3


def test_of_two_wishes_the_later_one_stands(adapter, loaded, out, counted):
    """Threads that want different settings take turns; each gets what it asked for."""

    def ask(strength):
        return csulora.correct_folder(adapter, loaded, out, Correction(lambda_off=strength))

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(ask, (1.0, 2.0)))
    assert [o.report.settings["lambda_off"] for o in outcomes] == [1.0, 2.0]
    assert len(counted) == 2
    assert json.loads((out / REPORT).read_text())["settings"]["lambda_off"] in (1.0, 2.0)


ASK = [sys.executable, str(builders.HERE / "ask_for_folder.py")]


def ask(adapter, subspace, out, *options):
    return subprocess.Popen(
        [*ASK, *map(str, (adapter, subspace, out, *options))], stdout=subprocess.PIPE, text=True
    )


def test_of_several_processes_one_does_the_work(adapter, subspace, out):
    processes = [ask(adapter, subspace, out) for _ in range(3)]
    found = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert found == ["corrected", "skipped", "skipped"]
    assert names(out.parent) == ["in", "out", "subspace.safetensors"]


@pytest.mark.parametrize("moment", ["in the middle of a write", "between two renames"])
def test_what_a_killed_process_leaves_heals(adapter, subspace, loaded, out, moment):
    csulora.correct_folder(adapter, loaded, out, Correction(lambda_off=1))
    process = ask(adapter, subspace, out, moment)
    assert process.stdout.readline().strip() == "there"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len([name for name in names(out.parent) if name.startswith(".out.")]) == 2
    outcome = csulora.correct_folder(adapter, loaded, out)
    assert outcome.status == "corrected"
    assert names(out.parent) == ["in", "out", "subspace.safetensors"]
    csulora.correct_folder(adapter, loaded, out.parent / "fresh")
    assert builders.tree(out) == builders.tree(out.parent / "fresh")


def test_an_output_set_aside_by_a_killed_process_comes_back(adapter, subspace, loaded, out):
    csulora.correct_folder(adapter, loaded, out)
    before = builders.tree(out)
    process = ask(adapter, subspace, out, "between two renames")
    assert process.stdout.readline().strip() == "there"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert csulora.correct_folder(adapter, loaded, out).status == "skipped"
    assert builders.tree(out) == before


def test_a_batch_waits_for_a_call_at_work_on_one_of_its_folders(
    capsys, adapter, subspace, loaded, tmp_path, counted
):
    """The batch neither clears away what the call is writing nor writes beside it."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(csulora.correct_folder, adapter, loaded, out / adapter.name)
        while not counted:
            time.sleep(0.005)
        arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", out, "--resume")
        assert builders.run(capsys, *arguments).code == 0
        assert call.result().status == "corrected"
    assert builders.outputs(out) == [adapter.name]


def test_an_output_that_cannot_be_locked_is_still_recognised(adapter, loaded, tmp_path):
    out = tmp_path / "cache" / "out"
    csulora.correct_folder(adapter, loaded, out)
    if os.geteuid():
        out.parent.chmod(0o500)
    else:  # root may write anywhere; a lock that is no file cannot be opened by anybody
        (out.parent / ".out.lock").mkdir()
    try:
        assert csulora.correct_folder(adapter, loaded, out).status == "skipped"
        with pytest.raises(CsuloraError, match="cannot be written"):
            csulora.correct_folder(adapter, loaded, out, Correction(lambda_off=3))
    finally:
        out.parent.chmod(0o700)
