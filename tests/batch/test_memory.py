"""However many adapters there are, only a few are in memory."""

import random
import subprocess
import sys
import time

import builders
import pytest
from builders import WEIGHTS

from csulora.batch import steps

# --- memory ---------------------------------------------------------------------------------------


def test_no_more_than_the_budget_is_in_memory(tmp_path, subspace, monkeypatch):
    import threading

    from csulora import SafetySubspace, correct_many
    from csulora.batch.local import HELD

    for i in range(30):
        builders.write_adapter(tmp_path / "in" / f"n{i:02}")
    size = (tmp_path / "in" / "n00" / WEIGHTS).stat().st_size
    held, most, lock = 0, 0, threading.Lock()
    read, write = steps.read, steps.write

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

    monkeypatch.setattr(steps, "read", reading)
    monkeypatch.setattr(steps, "write", writing)
    loaded = SafetySubspace.load(subspace)
    for budget, expected in ((1, 1), (2 * HELD * size, 2), (3 * HELD * size, 3)):
        most = 0
        out = tmp_path / f"out{budget}"
        correct_many([tmp_path / "in"], loaded, out, batch_bytes=budget)
        assert most == expected


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number(tmp_path, subspace):
    for i in range(1200):
        builders.write_adapter(tmp_path / "in" / f"t{i // 120}" / f"n{i:04}")
    peaks = []
    for place in ("in/t0", "in"):
        arguments = ["correct", tmp_path / place, "--subspace", subspace, "--out-dir"]
        out = tmp_path / "out" / str(len(peaks))
        done = subprocess.run(
            [sys.executable, builders.HERE / "batch" / "peak.py", *map(str, (*arguments, out))],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks
