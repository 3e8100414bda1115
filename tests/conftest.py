"""Fixtures on disk that many tests share; the builders behind them are in builders.py."""

import os

# Read once, when the hub client is imported: a path that does not exist must never become a download.
os.environ["HF_HUB_OFFLINE"] = "1"

import builders
import pytest
import torch

from csulora import SafetySubspace

# Tiny matrices: a second thread only waits, and waits long where cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start
# Where there is no GPU, Triton interprets: chosen before any test can import it, as PEFT does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    if "exhaustive" not in config.getoption("-m"):
        skip = pytest.mark.skip(reason="runs by -m exhaustive")
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(skip)


@pytest.fixture
def subspace(tmp_path):
    return builders.write_subspace(tmp_path / "subspace.safetensors")


@pytest.fixture
def loaded(subspace):
    return SafetySubspace.load(subspace)


@pytest.fixture
def adapter(tmp_path):
    return builders.write_adapter(tmp_path / "in" / "lora")


@pytest.fixture
def pair(tmp_path):
    return builders.checkpoint_pair(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def batch(capsys, adapter, subspace, tmp_path):
    """Two finished outputs, and how they were asked for."""
    builders.write_adapter(tmp_path / "in" / "other", seed=1)
    call = (tmp_path / "in", "--subspace", subspace, "--out-dir", tmp_path / "out")
    assert builders.run_correct(capsys, *call).code == 0
    return call
