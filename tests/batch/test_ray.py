"""The Ray engine on a local cluster of two nodes: same bytes, lost workers, adapters that kill them."""

import json
import os
import signal
import subprocess
import sys
import time

import builders
import pytest

from csulora import SafetySubspace, correct_many
from csulora.batch import ray_engine

ray = pytest.importorskip("ray", reason="needs csulora[ray]")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.slow

# Loaded by every Python process of the cluster: opening a file below "poison" ends it, but not before
# the rest of its shard is written. Opening one below "slow" takes its time.
POISON = """
import os, sys, time

def hook(event, arguments):
    if event == "open" and "/slow/" in str(arguments[0]):
        time.sleep(0.5)
    if event == "open" and "/poison/" in str(arguments[0]):
        time.sleep(0.5)
        os._exit(1)

sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    (place / "sitecustomize.py").write_text(POISON)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(place) + (os.pathsep + before if before else "")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def many(tmp_path, subspace):
    """Forty adapters, the subspace, and what the local engine makes of them."""
    for i in range(40):
        builders.write_adapter(tmp_path / "in" / f"t{i % 3}" / f"n{i:02}", seed=i)
    loaded = SafetySubspace.load(subspace)
    correct_many([tmp_path / "in"], loaded, tmp_path / "local")
    return tmp_path / "in", loaded, builders.tree(tmp_path / "local")


def workers():
    """Processes of Ray workers below this one, by what they call themselves."""
    parents, found = {}, []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as stat:
                    parents[int(entry.name)] = int(stat.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry.name}/cmdline", "rb") as line:
                    if line.read().startswith(b"ray::_Worker"):
                        found.append(int(entry.name))
            except OSError:
                continue

    def ours(process):
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return [process for process in found if ours(process)]


def test_same_bytes_as_the_local_engine_then_resume(capsys, many, address, subspace, tmp_path):
    source, _, expected = many
    out = tmp_path / "out"
    arguments = (source, "--subspace", subspace, "--out-dir", out, "--json")
    on_ray = ("--engine", "ray", "--ray-address", address)
    result = builders.run(capsys, "correct", *arguments, *on_ray)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    names = [os.path.basename(entry["adapter"]) for entry in found["adapters"]]
    assert names == [f"n{i:02}" for i in sorted(range(40), key=lambda i: (i % 3, i))]
    assert builders.tree(out) == expected
    again = builders.run(capsys, "correct", *arguments, "--resume")
    assert json.loads(again.out)["summary"]["skipped"] == 40


def test_strengths_of_modules_and_budgets_go_to_the_workers(capsys, address, subspace, tmp_path):
    for i in range(3):
        builders.write_adapter(tmp_path / "in" / f"n{i}", seed=i)
    common = (tmp_path / "in", "--subspace", subspace, "--budget", "change=0.2")
    common = (*common, "--strength-for", "self_attn.*=0", "--strength-for", "q_proj=1")
    for engine in (("local",), ("ray", "--ray-address", address)):
        call = ("correct", *common, "--out-dir", tmp_path / engine[0], "--engine", *engine)
        assert builders.run(capsys, *call).code == 0
    assert builders.tree(tmp_path / "ray") == builders.tree(tmp_path / "local")


def test_a_killed_worker_costs_nothing(many, address, tmp_path, monkeypatch):
    source, subspace, expected = many
    killed = []

    def kill(outcome, done, total):
        if not killed:
            killed.extend(workers()[:1])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(ray_engine, "LARGEST_SHARD", 3)
    out = tmp_path / "out"
    outcomes = correct_many(
        [source], subspace, out, engine="ray", ray_address=address, jobs=2, on_done=kill
    )
    assert killed
    assert {outcome.status for outcome in outcomes} == {"corrected"}, outcomes
    assert builders.tree(out) == expected
    lines = (out / builders.JOURNAL).read_text().splitlines()
    assert len(lines) == 41


def test_a_stopped_worker_is_given_up(many, address, tmp_path, monkeypatch):
    """To Ray a process that does not run is alive; its locks are held as well."""
    source, subspace, expected = many
    stopped = []

    hand_out = ray_engine.RayEngine._hand_out

    def stop(engine):
        """The first worker that gets work is stopped over it."""
        hand_out(engine)
        if not stopped and engine._in_hand:
            worker, _ = next(iter(engine._in_hand.values()))
            stopped.append(engine._processes[worker][1])
            os.kill(stopped[0], signal.SIGSTOP)

    monkeypatch.setattr(ray_engine.RayEngine, "_hand_out", stop)
    for name, value in {"LARGEST_SHARD": 3, "SILENCE": 1, "PATIENCE": 1, "LOOK": 0.2}.items():
        monkeypatch.setattr(ray_engine, name, value)
    ended, kill = [], ray_engine.RayEngine._kill
    monkeypatch.setattr(
        ray_engine.RayEngine, "_kill", lambda *given: ended.append(given) or kill(*given)
    )
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    outcomes = correct_many([source], subspace, out, engine="ray", ray_address=address, jobs=2)
    assert stopped and len(ended) == 1
    assert {outcome.status for outcome in outcomes} == {"corrected"}, outcomes
    assert builders.tree(out) == expected
    assert signal.getsignal(signal.SIGTERM) is before  # Ray has its own


def test_a_busy_worker_is_not_given_up(many, address, tmp_path, monkeypatch):
    """It answers beside its work, however long that takes."""
    source, subspace, _ = many
    (source / "t1" / "slow").mkdir()
    builders.write_adapter(source / "t1" / "slow" / "a")
    for name, value in {"SILENCE": 0.2, "PATIENCE": 2, "LOOK": 0.1}.items():
        monkeypatch.setattr(ray_engine, name, value)
    only = [source / "t1" / "slow" / "a"]
    out = tmp_path / "out"
    (outcome,) = correct_many(
        only, subspace, out, engine="ray", ray_address=address, jobs=1, batch_bytes=1
    )
    assert outcome.status == "corrected", outcome


def test_a_signal_ends_a_run_on_ray(many, address, subspace, tmp_path):
    """What Ray prints then is neither a stack nor in the results."""
    source, _, _ = many
    out = tmp_path / "out"
    arguments = ["correct", source, "--subspace", subspace, "--out-dir", out, "--json"]
    arguments += ["--engine", "ray", "--ray-address", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "csulora", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not out.exists() or len(os.listdir(out)) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    text, complaints = process.communicate(timeout=60)
    assert process.returncode == 143, complaints
    assert complaints.endswith("SIGTERM; finished outputs are complete\n")
    assert "***" not in complaints and "Traceback" not in complaints
    assert len(json.loads(text)["adapters"]) == 40
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("existing", ["refuse", "overwrite"])
def test_an_adapter_that_kills_its_workers_fails_alone(many, address, tmp_path, existing):
    source, subspace, expected = many
    builders.write_adapter(source / "t1" / "poison")
    outcomes = correct_many(
        [source],
        subspace,
        tmp_path / "out",
        engine="ray",
        ray_address=address,
        jobs=2,
        existing=existing,
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert [(outcome.kind, outcome.adapter) for outcome in failed] == [
        ("lost worker", str(source / "t1" / "poison"))
    ]
    assert builders.tree(tmp_path / "out") == expected


def test_no_cluster_at_the_address(capsys, many, subspace, tmp_path):
    source, _, _ = many
    arguments = (source, "--subspace", subspace, "--out-dir", tmp_path / "out")
    on_ray = ("--engine", "ray", "--ray-address", "not an address")
    result = builders.run(capsys, "correct", *arguments, *on_ray)
    assert (result.code, len(result.complaints)) == (2, 1), result.err
    assert "not an address" in result.complaints[0]
    assert not (tmp_path / "out").exists()
