"""The hooks' own logic, on stand-ins for the few things of vLLM that they touch."""

import asyncio
import logging
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from csulora import CsuloraError
from csulora.serving import counters
from csulora.serving.guard import Admitted, RefusedError

LORA = SimpleNamespace(max_lora_rank=64)


def test_a_stand_in_is_used_only_where_it_is_put(vllm):
    assert sys.modules["vllm"] is vllm


@dataclass
class Request:
    """As vllm.lora.request.LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class ValidationError(Exception):
    pass


class UnprocessableError(Exception):
    pass


@dataclass
class StubGuard:
    """Admits any folder whose name does not begin with "bad", as one in a cache."""

    mode: str = "correct"
    folders: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    damaged: set = field(default_factory=set)

    @property
    def config(self):
        return SimpleNamespace(mode=self.mode)

    def find(self, name):
        if ".." in name:
            raise RefusedError("outside", "the name leaves the folders")
        return self.folders.get(name)

    def admit(self, folder, name, *, max_rank=None):
        self.calls.append(("admit", str(folder), name, max_rank, threading.current_thread().name))
        if Path(folder).name.startswith("bad"):
            raise RefusedError("damaged", "it is bad")
        path = Path("/cache") / Path(folder).name
        return Admitted(path, "key", 8, "exact", "corrected")

    def check(self, path, name):
        self.calls.append(("check", str(path), name))
        if str(path) in self.damaged:
            raise RefusedError("damaged", "it is damaged")

    def again(self, path, name):
        self.calls.append(("again", str(path), name))
        return None if str(path) in self.damaged else Path(path)


class Models:
    """As OpenAIServingModels."""

    def __init__(self, engine_client, base_model_paths, *, lora_modules=None):
        self.engine_client = engine_client
        self.lora_resolvers = ["stock"]
        self.lora_requests = {}

    async def load_lora_adapter(self, request, base_model_name=None):
        self.lora_requests[request.lora_name] = Request(
            request.lora_name, 1, request.lora_path, load_inplace=True
        )
        return "Success"


class AsyncLLM:
    def __init__(self, lora_config=LORA):
        self.vllm_config = SimpleNamespace(lora_config=lora_config)
        self.seen = []

    async def add_lora(self, lora_request):
        self.seen.append(lora_request.lora_path)
        return True

    async def add_request(self, request_id, prompt, params, arrival_time=None, lora_request=None):
        self.seen.append(lora_request and lora_request.lora_path)
        return "queue"


class InputProcessor:
    lora_config = LORA

    def _validate_lora(self, lora_request):
        return None


class Worker:
    """As WorkerLoRAManager."""

    lora_config = LORA
    embedding_modules = ()

    def __init__(self):
        self._adapter_manager = SimpleNamespace(
            create_dummy_lora=lambda lora_id, rank, modules: ("zeros", lora_id, rank)
        )
        self.fails = None

    def _load_adapter(self, lora_request):
        if self.fails is not None:
            raise self.fails
        return ("weights", lora_request.lora_path)


class Manager:
    """As LoRAModelManager."""

    def create_dummy_lora(self, lora_id, rank, embedding_modules=None):
        return None


class LoadRequest(SimpleNamespace):
    def model_copy(self, update):
        return LoadRequest(**(vars(self) | update))


def fresh(kind):
    """A class of its own, which a test may spoil."""
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (), own)


@pytest.fixture
def vllm(monkeypatch):
    """A package vllm with stand-ins, in which nothing is hooked yet."""

    def module(name, **values):
        made = types.ModuleType(name)
        made.__path__ = []
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    for name in [name for name in sys.modules if name.startswith("csulora.integrations.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    top = module("vllm")
    for name in ("lora", "entrypoints", "entrypoints.openai", "v1", "v1.engine"):
        module(f"vllm.{name}")
    module("vllm.entrypoints.openai.models")
    module("vllm.entrypoints.serve", create_error_response=lambda **values: values)
    module("vllm.entrypoints.serve.instrumentator")
    module(
        "vllm.exceptions",
        VLLMValidationError=ValidationError,
        VLLMUnprocessableEntityError=UnprocessableError,
    )
    module("vllm.lora.request", LoRARequest=Request)
    module("vllm.lora.resolver", LoRAResolver=object)
    module("vllm.entrypoints.openai.models.serving", OpenAIServingModels=fresh(Models))
    module("vllm.v1.engine.async_llm", AsyncLLM=fresh(AsyncLLM))
    module("vllm.v1.engine.input_processor", InputProcessor=fresh(InputProcessor))
    module("vllm.lora.worker_manager", WorkerLoRAManager=fresh(Worker))
    module("vllm.lora.model_manager", LoRAModelManager=fresh(Manager))
    structs = SimpleNamespace(replace=lambda request, **new: Request(**(vars(request) | new)))
    module("msgspec", structs=structs)
    return top


def hooked(guard):
    """The stand-ins with front and worker in place, and what they ask."""
    from csulora.integrations.vllm import front, worker
    from csulora.integrations.vllm.admission import Admission

    admission = Admission(guard)
    front.install(admission)
    worker.install(admission)
    return SimpleNamespace(
        Models=sys.modules["vllm.entrypoints.openai.models.serving"].OpenAIServingModels,
        AsyncLLM=sys.modules["vllm.v1.engine.async_llm"].AsyncLLM,
        InputProcessor=sys.modules["vllm.v1.engine.input_processor"].InputProcessor,
        Worker=sys.modules["vllm.lora.worker_manager"].WorkerLoRAManager,
    )


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
    ((_, folder, name, rank, thread),) = guard.calls
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
    assert [call[0] for call in guard.calls] == ["admit", "check"]
    guard.damaged.add("/cache/good")
    with pytest.raises(ValidationError, match="csulora refused a: it is damaged"):
        ask()
    with pytest.raises(ValidationError, match="csulora refused a: it is damaged"):
        front._validate_lora(request)
    assert engine.seen == ["/cache/good"]


def test_requests_of_the_base_model_are_not_looked_at(vllm):
    guard = StubGuard()
    kinds = hooked(guard)
    asyncio.run(kinds.AsyncLLM().add_request("1", [1], None))
    kinds.InputProcessor()._validate_lora(None)
    assert guard.calls == []


def test_the_worker_refuses_a_first_load_and_never_a_later_one(vllm, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(counters, "add", lambda name, reason="": counted.append(name))
    guard = StubGuard()
    worker = hooked(guard).Worker()
    with pytest.raises(CsuloraError, match="csulora refused b: it is bad"):
        worker._load_adapter(Request("b", 2, str(tmp_path / "bad")))
    request = Request("a", 1, str(tmp_path / "good"))
    assert worker._load_adapter(request) == ("weights", "/cache/good")
    assert worker._load_adapter(request) == ("weights", "/cache/good")
    assert guard.calls[-1] == ("again", "/cache/good", "a")
    worker.fails = OSError("the disk is gone")
    assert worker._load_adapter(request) == ("zeros", 1, 8) and counted == ["zeroed"]
    worker.fails = None
    guard.damaged.add("/cache/good")
    assert worker._load_adapter(request) == ("zeros", 1, 8)
    assert worker._load_adapter(Request("a", 1, "/cache/other")) == ("weights", "/cache/other")


def test_what_vllm_says_of_a_first_load_comes_through(vllm, tmp_path):
    worker = hooked(StubGuard()).Worker()
    worker.fails = ValueError("LoRA rank 128 is greater than max_lora_rank 64.")
    with pytest.raises(ValueError, match="LoRA rank 128"):
        worker._load_adapter(Request("a", 1, str(tmp_path / "good")))


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
    assert [call[0] for call in guard.calls] == ["admit"]


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
