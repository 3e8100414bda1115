"""Commands that are told to end, by Ctrl-C, SIGTERM or SIGHUP, once and twice."""

import json
import os
import signal
import subprocess
import sys
import time

import builders
import forked

SLOW = """
sync = os.fsync
def slow(descriptor):
    time.sleep({})
    sync(descriptor)
os.fsync = slow
"""
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
MANY = 100


def test_signals_end_a_run_whole(tmp_path, subspace):
    for i in range(MANY):
        builders.write_adapter(tmp_path / "in" / f"n{i:03}", seed=i % 3)
    cases = {}
    for signals in (["SIGTERM"], ["SIGHUP"], ["SIGINT", "SIGTERM"], ["SIGTERM", "SIGTERM"]):
        out = tmp_path / " ".join(signals)
        argv = ["correct", tmp_path / "in", "--subspace", subspace, "--out-dir", out, "--json"]
        cases[out.name] = {"argv": argv, "setup": SLOW.format(0.04 * len(signals)), "entries": 12}
        cases[out.name] |= {"folder": str(out), "signals": signals}
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    out = tmp_path / "nohup"
    argv = ["correct", tmp_path / "in" / "n00*", "--subspace", subspace, "--out-dir", out, "--json"]
    cases["nohup"] = {"argv": argv, "setup": ignored + SLOW.format(0.01), "entries": 2}
    cases["nohup"] |= {"folder": str(out), "signals": ["SIGHUP"]}
    results = forked.run_all(cases)
    for key, result in results.items():
        if key == "nohup":
            continue
        first, *_, last = *key.split(), *key.split()
        said = {name: "interrupted" if name == "SIGINT" else name for name in CODES}
        assert result["code"] == CODES[last], result
        assert "Traceback" not in result["err"]
        assert f"csulora: {said[first]}: finishing what is in memory" in result["err"]
        assert result["err"].endswith(f"csulora: {said[last]}; finished outputs are complete\n")
        names = builders.outputs(tmp_path / key)
        assert 0 < len(names) < MANY and not [name for name in names if name.startswith(".")]
        assert len(builders.journal_lines(tmp_path / key)) == 1 + len(names)
        if " " not in key:
            found = json.loads(result["out"])["summary"]
            assert found["failures"] == {"not started": MANY - len(names)}
            assert found["corrected"] == len(names)
    assert results["nohup"]["code"] == 0
    assert json.loads(results["nohup"]["out"])["summary"]["corrected"] == 10


def test_signals_end_an_estimate_without_a_trace(tmp_path, pair):
    cases = {}
    for name in CODES:
        place = tmp_path / name
        argv = ["estimate", *pair, "--out", place / "s.safetensors", "--rank", 4]
        cases[name] = {"argv": argv, "setup": SLOW.format(30)}
        cases[name] |= {"folder": str(place), "signals": [name]}
    for name, result in forked.run_all(cases).items():
        assert result["code"] == CODES[name], result
        assert result["err"].endswith("; finished outputs are complete\n")
        assert "Traceback" not in result["err"] and result["out"] == ""
        assert not list((tmp_path / name).iterdir())


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    argv = [sys.executable, "-m", "csulora", "inspect", "a", "--subspace", "s"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, env=environment, text=True) as process:
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert (process.returncode, said) == (
        130,
        "csulora: interrupted; finished outputs are complete\n",
    )
