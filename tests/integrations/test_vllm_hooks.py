"""The hooks' own logic, on stand-ins for the few things of vLLM that they touch."""

import asyncio
import logging
import os
import sys
import threading
from pathlib import Path

import pytest
from vllm_stand_in import (
    LoadRequest,
    Request,
    StubGuard,
    UnprocessableError,
    ValidationError,
    hooked,
)

from csulora import CsuloraError


def test_a_stand_in_is_used_only_where_it_is_put(vllm):
    assert sys.modules["vllm"] is vllm


SPOILED = {
    "another parameter": ("Worker", "_load_adapter", lambda self, lora_request, more: None),
    "no such parameter": ("AsyncLLM", "add_request", None),
    "no coroutine": ("AsyncLLM", "add_lora", lambda self, lora_request: None),
    "no function": ("InputProcessor", "_validate_lora", "absent"),
    "order": ("Manager", "create_dummy_lora", lambda self, rank, lora_id, modules: None),
}
PLACES = {
    "Worker": "vllm.lora.worker_manager:WorkerLoRAManager",
    "AsyncLLM": "vllm.v1.engine.async_llm:AsyncLLM",
    "InputProcessor": "vllm.v1.engine.input_processor:InputProcessor",
    "Manager": "vllm.lora.model_manager:LoRAModelManager",
}


@pytest.mark.parametrize("way", SPOILED)
def test_a_vllm_that_is_not_as_expected_is_no_start(vllm, way):
    kind, name, function = SPOILED[way]
    module, _, owner = PLACES[kind].partition(":")
    cls = getattr(sys.modules[module], owner)
    if function == "absent":
        delattr(cls, name)
    elif function is None:

        async def without(self, request_id):
            return None

        setattr(cls, name, without)
    else:
        setattr(cls, name, function)
    with pytest.raises(CsuloraError) as caught:
        hooked(StubGuard())
    assert f"{module}.{owner}.{name}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_is_gone_is_no_start(vllm, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.lora.worker_manager", None)
    with pytest.raises(CsuloraError, match=r"cannot guard this server: vllm\.lora"):
        hooked(StubGuard())


def test_the_endpoint_hands_on_the_corrected_path_and_clears_the_flag(vllm, tmp_path):
    guard = StubGuard()
    kinds = hooked(guard)
    models = kinds.Models(kinds.AsyncLLM(), [])
    request = LoadRequest(lora_name="a", lora_path=str(tmp_path / "good"), load_inplace=True)
    assert asyncio.run(models.load_lora_adapter(request)) == "Success"
    loaded = models.lora_requests["a"]
    assert (loaded.lora_path, loaded.load_inplace) == ("/cache/good", False)
    assert request.lora_path == str(tmp_path / "good")
    ((_, folder, name, rank, thread),) = [call for call in guard.calls if call[0] == "admit"]
    assert (folder, name, rank) == (str(tmp_path / "good"), "a", 64)
    assert thread != threading.main_thread().name


def test_the_endpoint_refuses_with_422(vllm, tmp_path):
    kinds = hooked(StubGuard())
    models = kinds.Models(kinds.AsyncLLM(), [])
    request = LoadRequest(lora_name="a", lora_path=str(tmp_path / "bad"), load_inplace=False)
    answer = asyncio.run(models.load_lora_adapter(request))
    assert answer["status_code"] == 422 and answer["message"] == "csulora refused a: it is bad"
    assert models.lora_requests == {}


@pytest.mark.parametrize("path", ["no/such-id-of/a-hub", "no-such-folder"])
def test_a_hub_id_that_cannot_be_had_is_refused(vllm, path):
    kinds = hooked(StubGuard())
    models = kinds.Models(kinds.AsyncLLM(), [])
    request = LoadRequest(lora_name="a", lora_path=path, load_inplace=False)
    answer = asyncio.run(models.load_lora_adapter(request))
    assert answer["status_code"] == 422 and "no such folder" in answer["message"]


@pytest.mark.parametrize("mode", ["correct", "observe"])
@pytest.mark.parametrize("way", ["endpoint", "request"])
def test_a_slow_hub_holds_up_no_other_adapter(vllm, tmp_path, monkeypatch, way, mode):
    from csulora.integrations.vllm import admission

    answers = threading.Event()

    def resolve_source(text, patterns):
        if text.startswith("hub/") and not answers.wait(60):
            pytest.fail("the hub was waited for")
        return Path(text)

    monkeypatch.setattr(admission, "resolve_source", resolve_source)
    kinds = hooked(StubGuard(mode=mode, folders={"named": tmp_path / "named"}))
    engine = kinds.AsyncLLM()
    models = kinds.Models(engine, [])

    def asked(name, path):
        if way == "endpoint":
            request = LoadRequest(lora_name=name, lora_path=path, load_inplace=False)
            return models.load_lora_adapter(request)
        return engine.add_request(name, [1], None, lora_request=Request(name, 1, path))

    async def all_of_them():
        slow = [asyncio.ensure_future(asked(f"{i}", f"hub/{i}")) for i in range(8)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(asked("local", str(tmp_path / "good")), 30)
        await asyncio.wait_for(models.lora_resolvers[0].resolve_lora("base", "named"), 30)
        assert not any(one.done() for one in slow)
        answers.set()
        return await asyncio.gather(*slow)

    try:
        assert len(asyncio.run(all_of_them())) == 8
    finally:
        answers.set()


@pytest.mark.parametrize("way", ["endpoint", "request", "name"])
def test_corrections_hold_up_nothing_that_is_known(vllm, tmp_path, way):
    guard = StubGuard(folders={"known": tmp_path / "known"}, ready={"known": Path("/cache/known")})
    kinds = hooked(guard)
    engine = kinds.AsyncLLM()
    models = kinds.Models(engine, [])
    resolver, made, admit = models.lora_resolvers[0], threading.Event(), guard.admit

    def slow(folder, name, *, max_rank=None):
        if not made.wait(60):
            pytest.fail("the correction was waited for")
        return admit(folder, name, max_rank=max_rank)

    guard.admit = slow

    async def known():
        path = str(tmp_path / "known")
        if way == "endpoint":
            request = LoadRequest(lora_name="known", lora_path=path, load_inplace=False)
            await models.load_lora_adapter(request)
            return models.lora_requests["known"].lora_path
        if way == "request":
            await engine.add_request("x", [1], None, lora_request=Request("known", 1, path))
            return engine.seen[-1]
        return (await resolver.resolve_lora("base", "known")).lora_path

    async def all_of_them():
        requests = [Request(f"{i}", i, str(tmp_path / f"{i}")) for i in range(4)]
        new = [asyncio.ensure_future(engine.add_lora(request)) for request in requests]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(resolver.resolve_lora("base", "unknown"), 30) is None
        assert await asyncio.wait_for(known(), 30) == "/cache/known"
        assert not any(one.done() for one in new)
        made.set()
        await asyncio.gather(*new)

    try:
        asyncio.run(all_of_them())
    finally:
        made.set()
    threads = {call[-1].rpartition("_")[0] for call in guard.calls if call[0] == "admit"}
    assert threads == {"csulora-correct"}
    assert {call[-1].rpartition("_")[0] for call in guard.calls if call[0] == "recall"} == {
        "csulora-check"
    }


def test_nothing_comes_from_another_hub_than_vllm_would_ask(vllm, monkeypatch):
    from csulora.integrations.vllm.admission import local_folder

    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    with pytest.raises(CsuloraError, match="ModelScope"):
        local_folder("some/adapter")


def test_local_folders_are_found_as_vllm_finds_them(vllm, tmp_path, monkeypatch):
    from csulora.integrations.vllm.admission import local_folder

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("here") == local_folder("~/here") == tmp_path / "here"
    assert local_folder("/nowhere/at/all") == Path("/nowhere/at/all")


def test_the_resolver_comes_first_and_never_answers_none_for_a_refused_adapter(vllm, tmp_path):
    guard = StubGuard(folders={"good": tmp_path / "good", "bad": tmp_path / "bad"})
    kinds = hooked(guard)
    resolver, stock = kinds.Models(kinds.AsyncLLM(), []).lora_resolvers
    assert stock == "stock"
    found = asyncio.run(resolver.resolve_lora("base", "good"))
    assert (found.lora_name, found.lora_path) == ("good", "/cache/good")
    assert asyncio.run(resolver.resolve_lora("base", "unknown")) is None
    for name, text in (("bad", "it is bad"), ("../x", "the name leaves the folders")):
        with pytest.raises(UnprocessableError, match="csulora refused") as caught:
            asyncio.run(resolver.resolve_lora("base", name))
        assert str(caught.value) == f"csulora refused {name}: {text}"


def test_a_server_without_adapters_gets_no_resolver(vllm):
    kinds = hooked(StubGuard())
    assert kinds.Models(kinds.AsyncLLM(lora_config=None), []).lora_resolvers == ["stock"]


def test_what_another_resolver_found_is_corrected_before_the_engine_has_it(vllm, tmp_path):
    kinds = hooked(StubGuard())
    engine = kinds.AsyncLLM()
    request = Request("a", 1, str(tmp_path / "good"))
    asyncio.run(engine.add_lora(request))
    assert engine.seen == [request.lora_path] == ["/cache/good"]
    with pytest.raises(UnprocessableError, match="csulora refused b: it is bad"):
        asyncio.run(engine.add_lora(Request("b", 2, str(tmp_path / "bad"))))
    assert len(engine.seen) == 1


@pytest.mark.parametrize("positional", [True, False])
def test_every_request_is_checked(vllm, tmp_path, positional):
    guard = StubGuard()
    kinds = hooked(guard)
    engine, front = kinds.AsyncLLM(), kinds.InputProcessor()
    request = Request("a", 1, str(tmp_path / "good"))

    def ask():
        if positional:
            return asyncio.run(engine.add_request("1", [1], None, None, request))
        return asyncio.run(engine.add_request("1", [1], None, lora_request=request))

    assert ask() == "queue" and engine.seen == ["/cache/good"]
    front._validate_lora(request)
    assert [call[0] for call in guard.calls] == ["recall", "admit", "check"]
    guard.damaged.add("/cache/good")
    with pytest.raises(ValidationError, match="csulora refused a: it is damaged"):
        ask()
    with pytest.raises(ValidationError, match="csulora refused a: it is damaged"):
        front._validate_lora(request)
    assert engine.seen == ["/cache/good"]


@pytest.mark.parametrize("way", ["engine", "one by one"])
def test_a_request_that_is_used_again_after_training_has_the_new_weights(vllm, tmp_path, way):
    """The hooks put the corrected path into the request itself."""
    guard = StubGuard()
    kinds = hooked(guard)
    engine, front = kinds.AsyncLLM(), kinds.InputProcessor()
    names = ("a", "b")  # of the same content at first, and so with one entry
    requests = {n: Request(n, i, str(tmp_path / n / "good"), True) for i, n in enumerate(names)}

    def served(name):
        request = requests[name]
        if way == "engine":
            asyncio.run(engine.add_request("1", [1], None, lora_request=request))
        front._validate_lora(request)
        return request.lora_path

    assert [served(name) for name in names] == ["/cache/good"] * 2
    for step in ("-1", "-2", "-2"):
        guard.trained = step
        assert [served(name) for name in names] == [f"/cache/good{step}"] * 2
    for name in names:
        assert {Path(c[1]).parent for c in guard.calls if c[2] == name} == {tmp_path / name}
    guard.trained = "-refused"
    with pytest.raises(ValidationError, match="it is bad"):
        served("a")
    # Without the flag what was admitted is served on, as vLLM reads nothing anew.
    requests["a"].load_inplace = False
    assert served("a") == "/cache/good-2" and guard.calls[-1][0] == "check"


def test_what_came_from_a_hub_is_not_asked_for_again(vllm, tmp_path, monkeypatch):
    from csulora.integrations.vllm import admission

    asked = []
    monkeypatch.setattr(
        admission, "resolve_source", lambda text, _: asked.append(text) or tmp_path / "good"
    )
    guard = StubGuard()
    front, request = hooked(guard).InputProcessor(), Request("a", 1, "hub/good", True)
    for _ in range(2):
        front._validate_lora(request)
    assert asked == ["hub/good"] and [call[0] for call in guard.calls] == ["admit", "check"]


def test_requests_of_the_base_model_are_not_looked_at(vllm):
    guard = StubGuard()
    kinds = hooked(guard)
    asyncio.run(kinds.AsyncLLM().add_request("1", [1], None))
    kinds.InputProcessor()._validate_lora(None)
    assert guard.calls == []


def test_observing_changes_nothing(vllm, tmp_path):
    guard = StubGuard(mode="observe", folders={"bad": tmp_path / "bad"})
    kinds = hooked(guard)
    raw = str(tmp_path / "bad")
    models = kinds.Models(kinds.AsyncLLM(), [])
    request = LoadRequest(lora_name="a", lora_path=raw, load_inplace=False)
    assert asyncio.run(models.load_lora_adapter(request)) == "Success"
    assert models.lora_requests["a"].lora_path == raw
    assert asyncio.run(models.lora_resolvers[0].resolve_lora("base", "bad")).lora_path == raw
    kinds.InputProcessor()._validate_lora(Request("a", 1, raw))
    assert kinds.Worker()._load_adapter(Request("a", 1, raw)) == ("weights", raw)
    # After the first look, each request asks whether the files are still those.
    calls = [call[0] for call in guard.calls if call[0] != "recall"]
    assert calls == ["admit", "check"]


def test_a_process_says_that_it_is_guarded_before_and_after_vllm_sets_up_its_log(
    vllm, capsys, monkeypatch
):
    from csulora.integrations.vllm.installation import _say

    own, of_vllm = logging.getLogger("csulora"), logging.getLogger("vllm")
    monkeypatch.setattr(own, "parent", own.parent)
    _say("first")
    assert capsys.readouterr().err == "first\n"
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    monkeypatch.setattr(of_vllm, "handlers", [handler])
    monkeypatch.setattr(of_vllm, "level", logging.INFO)
    monkeypatch.setattr(of_vllm, "propagate", False)
    logging.getLogger("csulora.serving")._cache.clear()
    own._cache.clear()
    _say("second")
    logging.getLogger("csulora.serving").info("third")
    assert told == ["second", "third"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("before", [None, "", "MY_,OTHER_", "CSULORA_"])
def test_the_configuration_goes_to_workers_that_ray_starts(vllm, monkeypatch, tmp_path, before):
    from csulora.integrations.vllm.installation import _share_with_ray

    copied = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSULORA_CONFIG", "serving.toml")
    monkeypatch.delenv(copied, raising=False)
    if before is not None:
        monkeypatch.setenv(copied, before)
    for _ in range(2):  # the processes of a server inherit it
        _share_with_ray()
        assert os.environ["CSULORA_CONFIG"] == str(tmp_path / "serving.toml")
        prefixes = os.environ[copied].split(",")
        assert sorted(prefixes) == sorted({*filter(None, (before or "").split(",")), "CSULORA_"})
