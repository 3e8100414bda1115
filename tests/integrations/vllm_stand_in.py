"""The few things of vLLM that the hooks touch, for machines without it, and a guard that reads none."""

import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from csulora.serving.guard import Admitted, RefusedError

LORA = SimpleNamespace(max_lora_rank=64)


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
    """Admits any folder whose name does not begin with "bad", as one in a cache.

    trained: what its weights are by now, of which the entry's name tells. ready: paths of what it knows,
    by name.
    """

    mode: str = "correct"
    folders: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    damaged: set = field(default_factory=set)
    log_fails: bool = False
    trained: str = ""
    ready: dict = field(default_factory=dict)

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
        if Path(folder).name.startswith("bad") or self.trained == "-refused":
            raise RefusedError("damaged", "it is bad")
        own = Path(folder).parent == Path("/cache")
        path = Path("/cache") / (Path(folder).name + ("" if own else self.trained))
        return Admitted(path, "key", 8, "exact", "corrected")

    def recall(self, folder, name, *, max_rank=None):
        self.calls.append(("recall", str(folder), name, threading.current_thread().name))
        return Admitted(self.ready[name], "key", 8, "exact", "hit") if name in self.ready else None

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


def pretend(monkeypatch):
    """Put a package vllm with stand-ins in place, in which nothing is hooked yet."""

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
