"""The hooks in the processes that read adapters: what cannot be read again, and what stands in for it."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm_stand_in import Request, StubGuard, hooked

from csulora import CsuloraError
from csulora.serving import counters
from csulora.serving.guard import Guard, RefusedError


def test_the_worker_refuses_a_first_load_and_never_a_later_one(vllm, tmp_path):
    guard = StubGuard(cache=tmp_path)
    worker = hooked(guard).Worker()
    with pytest.raises(CsuloraError, match="csulora refused b: it is bad"):
        worker._load_adapter(Request("b", 2, str(tmp_path / "bad")))
    request = Request("a", 1, str(tmp_path / "good"))
    assert worker._load_adapter(request) == ("weights", "/cache/good")
    assert worker._load_adapter(request) == ("weights", "/cache/good")
    assert guard.calls[-1] == ("again", "/cache/good", "a")
    worker.fails = OSError("the disk is gone")
    assert worker._load_adapter(request) == ("zeros", 1, 8)
    worker.fails = None
    guard.damaged.add("/cache/good")
    assert worker._load_adapter(request) == ("zeros", 1, 8)
    assert worker._load_adapter(Request("a", 1, "/cache/other")) == ("weights", "/cache/other")


@pytest.fixture
def clock(monkeypatch):
    """Time for the worker's hooks, in which a pause takes as long as it is."""
    from csulora.integrations.vllm import worker

    time = SimpleNamespace(now=100.0, monotonic=lambda: time.now)
    time.sleep = lambda seconds: setattr(time, "now", time.now + seconds)
    monkeypatch.setattr(worker, "time", time)
    return time


def evicted(guard):
    """A worker that has loaded an adapter and evicted it, and the request for it."""
    worker, request = hooked(guard).Worker(), Request("a", 1, "/given/good")
    worker.add_adapter(request)
    assert worker.holds.pop(1) == ("weights", "/cache/good")
    guard.calls.clear()
    return worker, request


def decided(guard, *kinds):
    return [call for call in guard.calls if call[0] in kinds]


@pytest.mark.parametrize("of", ["guard", "vllm"])
def test_a_passing_error_is_passed_by_a_second_try(vllm, clock, tmp_path, of):
    guard = StubGuard(cache=tmp_path)
    worker, request = evicted(guard)
    if of == "vllm":
        worker.fails, worker.failures = OSError(5, "Input/output error"), 1
    else:
        again = guard.again

        def once(path, name):
            guard.again = again
            raise RefusedError("unforeseen", "OSError: no descriptor is free")

        guard.again = once
    assert worker.add_adapter(request) and worker.holds == {1: ("weights", "/cache/good")}
    assert decided(guard, "zeroed", "restored") == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_fails", [False, True])
def test_zeros_go_when_the_adapter_can_be_read(vllm, clock, tmp_path, log_fails):
    """Before, they stayed until the adapter was evicted."""
    guard = StubGuard(cache=tmp_path, log_fails=log_fails)
    worker, request = evicted(guard)
    worker.fails = OSError(5, "Input/output error")
    worker.add_adapter(request)
    begun = clock.now
    for _ in range(5):  # steps
        worker.add_adapter(request)
        assert worker.holds == {1: ("zeros", 1, 8)}
    assert len(decided(guard, "again")) == 2 and clock.now == begun
    clock.sleep(1.1)
    worker.add_adapter(request)
    worker.fails = None
    worker.add_adapter(request)
    assert worker.holds == {1: ("zeros", 1, 8)} and len(decided(guard, "again")) == 3
    clock.sleep(1.1)
    worker.add_adapter(request)
    assert worker.holds == {1: ("weights", "/cache/good")}
    text = "[Errno 5] Input/output error"
    assert decided(guard, "zeroed") == [("zeroed", "/cache/good", "a", text)]
    assert decided(guard, "restored") == [("restored", "/cache/good", "a")]
    guard.calls.clear()
    worker.add_adapter(request)
    assert guard.calls == []


def test_a_guard_counts_zeros_once_although_its_log_fails(monkeypatch):
    counted = []
    monkeypatch.setattr(counters, "add", lambda name, reason="": counted.append(name))
    guard = Guard(SimpleNamespace(cache=Path("/nowhere"), cache_bytes=None, audit=None))
    guard._audit = SimpleNamespace(line=lambda *a, **b: pytest.fail("of a log"))
    with pytest.raises(pytest.fail.Exception):
        guard.zeroed("/cache/good", "a", OSError())
    assert counted == ["zeroed"]


@pytest.mark.parametrize("which", ["get_tp_group", "get_pp_group"])
def test_a_worker_among_others_tries_longer(vllm, clock, tmp_path, which, monkeypatch):
    """Each worker reads by itself: one with zeros and one with weights would be a half of an adapter."""
    monkeypatch.setattr(vllm.groups, which, lambda: SimpleNamespace(world_size=2))
    guard = StubGuard(cache=tmp_path)
    worker, request = evicted(guard)
    worker.fails, worker.failures = OSError(24, "Too many open files"), 30
    worker.add_adapter(request)
    assert worker.holds.pop(1) == ("weights", "/cache/good") and 1 < clock.now - 100 < 2
    worker.failures = 1000
    worker.add_adapter(request)
    assert worker.holds == {1: ("zeros", 1, 8)} and len(decided(guard, "zeroed")) == 1


def test_no_request_goes_on_from_a_prefix_of_zeros(vllm, clock, tmp_path):
    guard = StubGuard(cache=tmp_path)
    worker, request = evicted(guard)
    front = sys.modules["vllm.v1.engine.input_processor"].InputProcessor()

    other = replace(request)

    def salt(given=None, lora=other):
        return front.process_inputs("1", [1], lora_request=lora, salt=given).cache_salt

    def some_zeros():
        worker.fails, worker.failures, worker.holds = OSError(), 2, {}
        worker.add_adapter(request)
        clock.sleep(2)
        worker.add_adapter(request)
        assert worker.holds == {1: ("weights", "/cache/good")}

    def much_later(seconds):
        os.utime(tmp_path / "zeros", (time.time() - seconds,) * 2)

    assert (salt(), salt("own")) == (None, "own")
    some_zeros()
    while_zeros_may_stand = [salt(), salt(), salt("own"), salt("own")]
    much_later(4000)
    later = [salt(), salt("own"), salt("other")]
    assert later == [salt(), salt("own"), salt("other")]
    some_zeros()
    again = [salt(), salt("own")]
    much_later(3000)
    salts = [None, "own", *while_zeros_may_stand, *later, *again, salt(), salt("own")]
    assert len(set(salts)) == len(salts)
    assert (salt(None, None), salt("own", None)) == (None, "own")


def test_a_cache_that_is_gone_ends_no_step(vllm, clock, tmp_path):
    guard = StubGuard(cache=tmp_path / "gone")
    worker, request = evicted(guard)
    worker.fails, worker.failures = OSError(), 2
    worker.add_adapter(request)
    clock.sleep(2)
    worker.add_adapter(request)
    assert worker.holds == {1: ("weights", "/cache/good")}


def test_a_worker_alone_reads_what_lies_in_the_folder_by_now(vllm, clock, tmp_path):
    """With no hook in front the path is the raw one."""
    guard = StubGuard(cache=tmp_path)
    worker = hooked(guard).Worker()
    request = Request("a", 1, "/given/good", load_inplace=True)
    assert worker._load_adapter(request) == ("weights", "/cache/good")
    guard.trained = "-2"
    assert worker._load_adapter(request) == ("weights", "/cache/good-2")
    assert worker._load_adapter(replace(request, load_inplace=False))[1] == "/cache/good-2"
    guard.trained = "-refused"
    assert worker._load_adapter(request) == ("zeros", 1, 8)  # it never raises in a step
    assert decided(guard, "zeroed") == [("zeroed", "/cache/good-2", "a", "it is bad")]
    guard.trained = "-3"
    assert worker._load_adapter(request) == ("weights", "/cache/good-3")


def test_a_corrected_path_is_only_checked_again(vllm, tmp_path):
    guard = StubGuard(cache=tmp_path)
    worker = hooked(guard).Worker()
    request = Request("a", 1, "/cache/good", load_inplace=True)
    for _ in range(2):
        assert worker._load_adapter(request) == ("weights", "/cache/good")
    assert [call[0] for call in guard.calls] == ["admit", "again"]


def test_what_a_worker_remembers_is_bounded(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr("csulora.serving.recent.SIZE", 3)
    worker = hooked(StubGuard(cache=tmp_path)).Worker()
    for i in range(9):
        worker._load_adapter(Request("a", 1, f"/cache/{i}"))
    assert len(worker._csulora.paths._values) == 3


def test_what_vllm_says_of_a_first_load_comes_through(vllm, tmp_path):
    worker = hooked(StubGuard()).Worker()
    worker.fails = ValueError("LoRA rank 128 is greater than max_lora_rank 64.")
    with pytest.raises(ValueError, match="LoRA rank 128"):
        worker._load_adapter(Request("a", 1, str(tmp_path / "good")))
