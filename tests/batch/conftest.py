"""A small batch that many tests share."""

import builders
import pytest

from csulora.batch import steps


@pytest.fixture
def batch(tmp_path, subspace, monkeypatch):
    """Three adapters in a tree and the options to correct it; their files count as long unchanged."""
    monkeypatch.setattr(steps, "SETTLED_NS", 0)
    for i, name in enumerate(("t/a", "t/b", "c")):
        builders.write_adapter(tmp_path / "in" / name, seed=i)
    return (
        tmp_path / "in",
        ("--subspace", subspace, "--out-dir", tmp_path / "out"),
        tmp_path / "out",
    )
