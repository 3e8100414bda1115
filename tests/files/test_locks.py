"""Locks and processes that are forked while they are held."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import builders
import pytest
import torch

from csulora.files.folders import whole_folder
from csulora.files.locks import locked, open_locked, release
from csulora.serving.leases import shared_lock


@contextlib.contextmanager
def forked():
    """A process that lives on with copies of all that is open."""
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_lock_ends_though_a_process_was_forked_that_lives_on(tmp_path):
    with contextlib.ExitStack() as ends:
        with locked(tmp_path / "out"), shared_lock(tmp_path / "shared", alone=True):
            kept = open_locked(tmp_path / "kept")
            os.link(tmp_path / ".out.csulora-lock", tmp_path / "same")
            with whole_folder(tmp_path / "new", overwrite=False) as temporary:
                folder = os.open(temporary.parent / "lock", os.O_RDONLY)
                (temporary / "file").write_text("")
                ends.enter_context(forked())
        release(kept)
        for name in ("same", "shared", "kept"):
            release(open_locked(tmp_path / name))  # BlockingIOError where it is held
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)


FORK = """
import os, sys, torch
torch.set_num_threads(2)
import csulora
subspace = csulora.SafetySubspace.load(sys.argv[1])
if not os.fork():
    torch.linspace(0, 1, 2_000_000).sum()
    csulora.correct_folder(sys.argv[2], subspace, sys.argv[3])
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_process_that_has_loaded_a_subspace_can_be_forked(tmp_path):
    shapes = {"q_proj": (600, 1200)}
    tensors = builders.subspace_tensors(shapes, rank=64)
    assert min(X.numel() for X in tensors.values() if X.dim() == 2) > 32768
    subspace = builders.write_subspace(tmp_path / "subspace.safetensors", tensors)
    adapter = builders.write_adapter(tmp_path / "lora", shapes=shapes)
    command = [sys.executable, "-c", FORK, subspace, adapter, tmp_path / "out"]
    variables = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.stdout == "0\n", found.stderr
    assert torch.isfinite(builders.effective(tmp_path / "out")["q_proj"]).all()
