"""What the tests of several integrations share."""

from types import SimpleNamespace

import pytest
import vllm_stand_in

from csulora import estimate


@pytest.fixture
def vllm(monkeypatch):
    """A package vllm with stand-ins, in which nothing is hooked yet."""
    return vllm_stand_in.pretend(monkeypatch)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """By kind: `base` and `aligned`, folders of checkpoints, and the `subspace` of all their weights."""
    tiny = pytest.importorskip("tiny_models")
    found = {}
    for kind in tiny.LINEAR:
        folder = tmp_path_factory.mktemp(kind)
        tiny.save_pair(kind, folder)
        everything = [
            *tiny.LINEAR[kind],
            *(["embed_tokens", "lm_head"] if kind == "llama" else ["wte"]),
        ]
        subspace = estimate(folder / "base", folder / "aligned", rank=6, modules=everything)
        found[kind] = SimpleNamespace(
            kind=kind, base=folder / "base", aligned=folder / "aligned", subspace=subspace
        )
    return found


@pytest.fixture
def llama(worlds):
    return worlds["llama"]
