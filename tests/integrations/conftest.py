"""What the tests of several integrations share."""

import pytest
import vllm_stand_in


@pytest.fixture
def vllm(monkeypatch):
    """A package vllm with stand-ins, in which nothing is hooked yet."""
    return vllm_stand_in.pretend(monkeypatch)
