"""One folder asked for by many threads and processes at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
from builders import REPORT, WEIGHTS, change_weights, names

import csulora
from csulora import Correction, CsuloraError, ExistsError, UsageError, folder
from csulora.files import companions
from csulora.files.locks import locked


class Crowd:
    """Holds every correction back until so many calls have begun, and counts the corrections."""

    def __init__(self, patch):
        self.expected, self.begun, self.computed = 0, 0, 0
        self.inside = threading.Condition()
        look, compute = folder.identity, folder.correct_batch

        def looking(target):
            with self.inside:
                self.begun += 1
                self.inside.notify_all()
            return look(target)

        def computing(*arguments, **options):
            with self.inside:
                self.computed += 1
                # Each call looks once before it waits for the lock, and whoever has it once more.
                assert self.inside.wait_for(lambda: self.begun > self.expected, timeout=60)
            return compute(*arguments, **options)

        patch.setattr(folder, "identity", looking)
        patch.setattr(folder, "correct_batch", computing)


@pytest.fixture
def crowd(monkeypatch):
    return Crowd(monkeypatch)


@pytest.mark.parametrize(
    ("existing", "there"),
    [*((existing, False) for existing in folder.EXISTING), ("refresh", True), ("overwrite", True)],
)
def test_of_many_threads_one_does_the_work(adapter, loaded, out, crowd, existing, there):
    if there:
        csulora.correct_folder(adapter, loaded, out)
        change_weights(adapter)
    crowd.expected, crowd.begun, crowd.computed = 8, 0, 0

    def ask(_):
        return csulora.correct_folder(adapter, loaded, out, existing=existing)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(ask, range(8)))
    assert crowd.computed == 1
    assert sorted(o.status for o in outcomes) == ["corrected"] + ["skipped"] * 7
    assert len({json.dumps(o.report.to_dict()) for o in outcomes}) == 1
    assert names(out.parent) == ["in", "out", "subspace.safetensors"]


def test_threads_with_different_targets_do_not_wait_for_each_other(
    adapter, loaded, tmp_path, monkeypatch
):
    meeting = threading.Barrier(3, timeout=60)
    compute = folder.correct_batch

    def met(*arguments, **options):
        meeting.wait()  # breaks unless all three are inside at once
        return compute(*arguments, **options)

    monkeypatch.setattr(folder, "correct_batch", met)
    with ThreadPoolExecutor(3) as pool:
        targets = [tmp_path / f"out{i}" for i in range(3)]
        found = list(pool.map(lambda t: csulora.correct_folder(adapter, loaded, t), targets))
    assert [o.status for o in found] == ["corrected"] * 3


def test_of_different_wishes_each_is_met(adapter, loaded, out):
    """Threads that want different settings take turns, again and again; what stands is whole."""

    def ask(strength):
        return csulora.correct_folder(adapter, loaded, out, Correction(lambda_off=strength))

    wanted = [1.0, 2.0, 3.0] * 8
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(ask, wanted))
    assert [o.report.settings["lambda_off"] for o in outcomes] == wanted
    stands = json.loads((out / REPORT).read_text())["settings"]["lambda_off"]
    csulora.correct_folder(adapter, loaded, out.parent / "fresh", Correction(lambda_off=stands))
    assert builders.tree(out) == builders.tree(out.parent / "fresh")
    assert names(out.parent) == ["fresh", "in", "out", "subspace.safetensors"]


def test_a_lock_changes_hands_without_a_word(tmp_path):
    """Whoever holds it removes the file, which others may be opening at that moment."""
    inside = []

    def take(_):
        for _ in range(300):
            with locked(tmp_path / "x"):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(take, range(6)))
    assert not list(tmp_path.iterdir())


def test_overwrite_after_a_holder_that_failed_makes_it_anew(adapter, loaded, out):
    csulora.correct_folder(adapter, loaded, out)
    expected = builders.tree(out)
    (out / WEIGHTS).write_bytes(b"damaged")
    with ThreadPoolExecutor(1) as pool:
        with locked(out):
            call = pool.submit(csulora.correct_folder, adapter, loaded, out, existing="overwrite")
            time.sleep(0.3)
        assert call.result().status == "corrected"
    assert builders.tree(out) == expected


@pytest.mark.parametrize("existing", folder.EXISTING)
def test_a_folder_that_appears_meanwhile_is_not_replaced(
    adapter, loaded, out, monkeypatch, existing
):
    compute = folder.correct_batch

    def meanwhile(*arguments, **options):
        out.mkdir()
        (out / "thesis").write_text("")
        return compute(*arguments, **options)

    monkeypatch.setattr(folder, "correct_batch", meanwhile)
    with pytest.raises(ExistsError, match="already exists|did not write"):  # noqa: RUF043
        csulora.correct_folder(adapter, loaded, out, existing=existing)
    assert names(out) == ["thesis"]


def test_a_source_that_vanishes_is_not_sought_elsewhere(adapter, loaded, tmp_path, monkeypatch):
    """A relative path with one slash could be a hub id as well."""
    import huggingface_hub

    def never(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    look = folder.identity

    def vanish(target):
        if adapter.exists():
            adapter.rename(tmp_path / "elsewhere")
        return look(target)

    monkeypatch.setattr(folder, "identity", vanish)
    with pytest.raises(CsuloraError, match="no such"):
        csulora.correct_folder("in/lora", loaded, tmp_path / "out")


def test_only_adapters_are_ever_replaced(capsys, adapter, subspace, loaded, tmp_path):
    """A wrong path must not cost anybody a folder, a file or a link of another kind."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / ".git").mkdir(parents=True)
    (tmp_path / "folder" / ".git" / "HEAD").write_text("mine")
    (tmp_path / "empty").mkdir()
    csulora.correct_folder(adapter, loaded, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    before = builders.tree(tmp_path)
    assert csulora.correct_folder(adapter, loaded, tmp_path / "link").status == "skipped"
    new, _ = csulora.correct(csulora.LoraAdapter.load(adapter), loaded)
    for name in ("file", "folder", "link"):
        with pytest.raises(ExistsError):
            csulora.correct_folder(adapter, loaded, tmp_path / name, existing="overwrite")
        with pytest.raises(ExistsError):
            new.save(tmp_path / name, overwrite=True)
        call = ("correct", builders.write_adapter(tmp_path / "in" / name), "--out-dir", tmp_path)
        assert builders.run(capsys, *call, "--subspace", subspace, "--overwrite").code == 1
        shutil.rmtree(tmp_path / "in" / name)
    assert builders.tree(tmp_path) == before and (tmp_path / "link").is_symlink()
    outcome = csulora.correct_folder(adapter, loaded, tmp_path / "empty", existing="overwrite")
    assert outcome.status == "corrected"


@pytest.mark.parametrize("name", ["", ".", "/", "x/..", "a\0b"])
def test_names_that_no_output_can_have(adapter, loaded, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot be the name"):
        csulora.correct_folder(adapter, loaded, name, existing="overwrite")


def test_hidden_folders_of_others_are_left_alone(adapter, loaded, out):
    mine = {
        out.parent / ".out.csulora-20240131" / "results.csv": "1,2",
        out.parent / ".out.tmp-20240131" / "old" / "x": "1",
        out.parent / ".out.lock": "mine",
    }
    for path, text in mine.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert csulora.correct_folder(adapter, loaded, out).status == "corrected"
    assert {path: path.read_text() for path in mine} == mine


def test_saving_by_hand_beside_a_call_goes_through(adapter, loaded, out, monkeypatch):
    """`save` takes no lock of the folder, yet nobody takes what it is writing for a leftover."""
    new, report = csulora.correct(csulora.LoraAdapter.load(adapter), loaded)
    reached, go = threading.Event(), threading.Event()
    copy = companions.copy_file

    def slowly(*arguments, **options):
        if threading.current_thread().name.startswith("saving"):
            reached.set()
            assert go.wait(60)
        copy(*arguments, **options)

    monkeypatch.setattr(companions, "copy_file", slowly)
    with ThreadPoolExecutor(1, "saving") as saving, ThreadPoolExecutor(1) as asking:
        saved = saving.submit(new.save, out, report=report)
        assert reached.wait(60)
        call = asking.submit(csulora.correct_folder, adapter, loaded, out)
        time.sleep(0.2)
        go.set()
        assert saved.result() == []
        assert call.result().status == "skipped"
    assert names(out.parent) == ["in", "out", "subspace.safetensors"]


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


@pytest.mark.parametrize("option", ["--resume", "--overwrite", None])
def test_a_batch_takes_what_a_call_makes_meanwhile_for_its_own(
    capsys, adapter, subspace, loaded, tmp_path, monkeypatch, option
):
    """Both are at work on one folder; whoever is second finds the first one's output and keeps it."""
    out = tmp_path / "out"
    compute, calls = folder.correct_batch, []

    def meanwhile(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            outcome = csulora.correct_folder(adapter, loaded, out / adapter.name)
            assert outcome.status == "corrected"
        return compute(*arguments, **options)

    monkeypatch.setattr(folder, "correct_batch", meanwhile)
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", out, "--json")
    result = builders.run(capsys, *arguments, *filter(None, [option]))
    assert result.code == 0 and json.loads(result.out)["summary"]["skipped"] == 1
    assert builders.outputs(out) == [adapter.name]


def test_a_lock_that_cannot_be_had_fails_its_adapter_alone(capsys, adapter, subspace, tmp_path):
    other = builders.write_adapter(tmp_path / "in" / "other")
    out = tmp_path / "out"
    (out / f".{adapter.name}.csulora-lock").mkdir(parents=True)
    arguments = ("correct", adapter, other, "--subspace", subspace, "--out-dir", out)
    result = builders.run(capsys, *arguments)
    assert result.code == 1 and len(result.complaints) == 1
    assert f"{adapter.name}: cannot be written" in result.complaints[0]
    assert (out / "other").is_dir() and not (out / adapter.name).exists()


def test_an_output_that_cannot_be_locked_is_still_recognised(adapter, loaded, tmp_path):
    out = tmp_path / "cache" / "out"
    csulora.correct_folder(adapter, loaded, out)
    if os.geteuid():
        out.parent.chmod(0o500)
    else:  # root may write anywhere; a lock that is no file cannot be opened by anybody
        (out.parent / ".out.csulora-lock").mkdir()
    try:
        assert csulora.correct_folder(adapter, loaded, out).status == "skipped"
        with pytest.raises(CsuloraError, match="cannot be written"):
            csulora.correct_folder(adapter, loaded, out, Correction(lambda_off=3))
    finally:
        out.parent.chmod(0o700)
