"""Which implementation runs; that both mean the same is in kernels/test_by_triton.py."""

import os
import subprocess
import sys

import builders
import pytest
import torch

from csulora import UsageError
from csulora.pipeline.backend import pick_backend

CPU = torch.device("cpu")


def test_the_cpu_takes_torch():
    assert pick_backend("auto", CPU) == "torch" and pick_backend("torch", CPU) == "torch"
    with pytest.raises(UsageError, match="backend must be"):
        pick_backend("cuda", CPU)


def test_cuda_takes_triton(monkeypatch):
    import csulora_kernels

    monkeypatch.setattr(csulora_kernels, "unavailable", lambda device: None)
    assert pick_backend("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(csulora_kernels, "unavailable", lambda device: "no reason")
    assert pick_backend("auto", torch.device("cuda")) == "torch"
    with pytest.raises(UsageError, match="no reason"):
        pick_backend("triton", torch.device("cuda"))


def test_the_command_refuses_triton_in_one_line(adapter, subspace, out):
    """In a process of its own: in this one Triton may run under its interpreter."""
    command = [
        sys.executable, "-m", "csulora", "correct", adapter, "--subspace", subspace,
        "--out-dir", out, "--backend", "triton", "--device", "cpu",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=120
    )
    result = builders.Result(done.returncode, done.stdout, done.stderr)
    assert result.code == 2 and len(result.complaints) == 1
    assert "backend triton cannot run: Triton needs a CUDA device" in result.complaints[0]
    assert not out.exists()
