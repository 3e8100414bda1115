"""The hooks' own logic, on stand-ins for the few things of vLLM that they touch."""

import asyncio
import logging
import os
import sys
import threading
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from csulora import CsuloraError
from csulora.serving import counters
from csulora.serving.guard import Admitted, Guard, RefusedError

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
    log_fails: bool = False

    cache: Path = Path("/nowhere")

    @property
    def config(self):
        return SimpleNamespace(mode=self.mode, cache=self.cache)

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
        if str(path) in self.damaged:
            raise RefusedError("damaged", "it is damaged")
        return Path(path)

    def zeroed(self, path, name, error):
        self.calls.append(("zeroed", str(path), name, str(error)))
        if self.log_fails:
            raise ValueError("of a log")

    def restored(self, path, name):
        self.calls.append(("restored", str(path), name))
        if self.log_fails:
            raise ValueError("of a log")


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

    def process_inputs(self, request_id, prompt, lora_request=None, salt=None):
        self._validate_lora(lora_request)
        return SimpleNamespace(lora_request=lora_request, cache_salt=salt)


class Worker:
    """As WorkerLoRAManager."""

    lora_config = LORA
    embedding_modules = ()

    def __init__(self):
        self._adapter_manager = SimpleNamespace(
            create_dummy_lora=lambda lora_id, rank, modules: ("zeros", lora_id, rank)
        )
        self.fails = None
        self.failures = 1000  # reads that fail, of those to come
        self.holds = {}

    def _load_adapter(self, lora_request):
        if self.fails is not None and self.failures:
            self.failures -= 1
            raise self.fails
        return ("weights", lora_request.lora_path)

    def remove_adapter(self, adapter_id):
        return self.holds.pop(adapter_id, None) is not None


class LRUWorker(Worker):
    """As LRUCacheWorkerLoRAManager."""

    def add_adapter(self, lora_request):
        if lora_request.lora_int_id not in self.holds:
            self.holds[lora_request.lora_int_id] = self._load_adapter(lora_request)
        return True


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
    worker = fresh(Worker)
    lru = type("LRUWorker", (worker,), {"add_adapter": LRUWorker.add_adapter})
    module("vllm.lora.worker_manager", WorkerLoRAManager=worker, LRUCacheWorkerLoRAManager=lru)
    module("vllm.distributed")
    groups = module(
        "vllm.distributed.parallel_state",
        get_tp_group=lambda: SimpleNamespace(world_size=1),
        get_pp_group=lambda: SimpleNamespace(world_size=1),
    )
    top.groups = groups
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
        Worker=sys.modules["vllm.lora.worker_manager"].LRUCacheWorkerLoRAManager,
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
def test_zeros_never_stand_in_for_a_part_of_the_workers(vllm, clock, tmp_path, which, monkeypatch):
    """Each worker reads by itself: one with zeros and one with weights would be a half of an adapter."""
    monkeypatch.setattr(vllm.groups, which, lambda: SimpleNamespace(world_size=2))
    guard = StubGuard(cache=tmp_path)
    worker, request = evicted(guard)
    worker.fails, worker.failures = OSError(24, "Too many open files"), 60
    worker.add_adapter(request)
    assert worker.holds.pop(1) == ("weights", "/cache/good") and 2 < clock.now - 100 < 5
    worker.failures = 1000
    with pytest.raises(CsuloraError, match=r"csulora: a cannot be read again: .*open files"):
        worker.add_adapter(request)
    assert worker.holds == {} and decided(guard, "zeroed") == []


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
