"""As much of SGLang as loads an adapter, written after its release 0.5.23, for machines without it.

What counts is kept: every weights file of a folder is read, the scale is lora_alpha / r, and whatever
goes wrong becomes a result that says so.
"""

import ast
import dataclasses
import importlib.util
import json
import logging
import sys
import types
from enum import Enum
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar

import torch
from safetensors.torch import load_file

MANAGER = "sglang.srt.lora.lora_manager"
REGISTRY = "sglang.srt.plugins.hook_registry"


@dataclasses.dataclass(frozen=True)
class Ref:
    lora_id: str
    lora_name: str
    lora_path: str
    pinned: bool = False


@dataclasses.dataclass
class Output:
    success: bool
    error_message: str = ""
    loaded_adapters: dict = dataclasses.field(default_factory=dict)


class Adapter:
    """Configuration and tensors as SGLang holds them."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors

    def update(self, module):
        """dW of a module, scaled as SGLang scales it."""
        A, B = (self.tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        return self.config["lora_alpha"] / self.config["r"] * (B.double() @ A.double())


def folder_tensors(path):
    """Everything that SGLang's loader reads from a folder."""
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        found |= load_file(file)
    return found


class LoRAManager:
    """The functions that the guard hooks, and those that call them."""

    def __init__(self, max_lora_rank=None, lora_paths=None):
        self.init_state(max_lora_rank=max_lora_rank, target_modules=None, lora_paths=lora_paths)

    def init_state(self, max_lora_rank=None, target_modules=None, lora_paths=None):
        self.loras, self.lora_refs = {}, {}
        for ref in lora_paths or ():
            result = self._load_lora_adapter(ref)
            if not result.success:
                raise RuntimeError(
                    f"Failed to load LoRA adapter {ref.lora_name}: {result.error_message}"
                )
        ranks = [lora.config["r"] for lora in self.loras.values()]
        self.max_lora_rank = max(ranks, default=0) if max_lora_rank is None else max_lora_rank

    def create_lora_update_result(self, success, error_message=""):
        loaded = {ref.lora_name: ref.lora_path for ref in self.lora_refs.values()}
        return Output(success, error_message, loaded)

    def load_lora_adapter(self, lora_ref):
        return self._load_lora_adapter(lora_ref)

    def load_lora_adapter_from_tensors(
        self, lora_ref, tensors, config_dict, added_tokens_config=None
    ):
        return self._load_lora_adapter_from_tensors(
            lora_ref, tensors, config_dict, added_tokens_config
        )

    def _load_lora_adapter(self, lora_ref):
        try:
            config = json.loads((Path(lora_ref.lora_path) / "adapter_config.json").read_text())
            return self._keep(lora_ref, config, folder_tensors(lora_ref.lora_path))
        except Exception as error:
            return self.create_lora_update_result(success=False, error_message=str(error))

    def _load_lora_adapter_from_tensors(
        self, lora_ref, tensors, config_dict, added_tokens_config=None
    ):
        try:
            return self._keep(lora_ref, config_dict, dict(tensors))
        except Exception as error:
            return self.create_lora_update_result(success=False, error_message=str(error))

    def _keep(self, lora_ref, config, tensors):
        if hasattr(self, "max_lora_rank") and config["r"] > self.max_lora_rank:
            raise ValueError(f"rank {config['r']} is incompatible with --max-lora-rank")
        self.loras[lora_ref.lora_id] = Adapter(config, tensors)
        self.lora_refs[lora_ref.lora_id] = lora_ref
        return self.create_lora_update_result(success=True)


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    """Registers by name and applies later, as SGLang does; what cannot be applied is passed over."""

    hooks: ClassVar[list] = []

    @classmethod
    def register(cls, target, hook, hook_type):
        cls.hooks.append((target, hook))

    @classmethod
    def apply_hooks(cls):
        for target, hook in cls.hooks:
            place, _, name = target.rpartition(".")
            owner = resolve_name(place)
            setattr(owner, name, cls._around(getattr(owner, name), hook))

    @staticmethod
    def _around(original, hook):
        @wraps(original)
        def wrapper(*args, **kwargs):
            return hook(original, *args, **kwargs)

        return wrapper

    @classmethod
    def reset(cls):
        cls.hooks.clear()


def _module(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    module.__path__ = []
    return module


def _fresh(manager):
    """The same class once more, so that what is hooked in one test is not in the next."""
    return type(manager.__name__, manager.__bases__, dict(vars(manager)))


def pretend(monkeypatch):
    """Modules of SGLang by their names, all of them stand-ins; the module of the manager is returned."""
    manager = _module(MANAGER, LoRAManager=_fresh(LoRAManager))
    HookRegistry.reset()
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, _module(name))
    registry = _module(REGISTRY, HookRegistry=HookRegistry, HookType=HookType)
    monkeypatch.setitem(sys.modules, REGISTRY, registry)
    monkeypatch.setitem(sys.modules, MANAGER, manager)
    structs = types.SimpleNamespace(replace=dataclasses.replace)
    monkeypatch.setitem(sys.modules, "msgspec", _module("msgspec", structs=structs))
    return manager


def real_functions():
    """The functions of SGLang's own LoRAManager by name, as syntax trees; its module does not import
    where there is no GPU."""
    place = Path(importlib.util.find_spec("sglang.srt.lora").submodule_search_locations[0])
    tree = ast.parse((place / "lora_manager.py").read_text())
    (found,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LoRAManager"
    )
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


class _Reading:
    """In place of SGLang's LoRAAdapter, which needs the layers of a model."""

    def __init__(self, uid, config, base_hf_config, load_config, lora_backend, base_model=None):
        self.config = config.hf_config
        self.path = config.path
        self.embedding_layers = {}

    def initialize_weights(self):
        self.tensors = folder_tensors(self.path)

    def initialize_weights_from_tensors(self, tensors):
        self.tensors = dict(tensors)

    update = Adapter.update


# Taken from SGLang's own class, word for word.
TAKEN = (
    "create_lora_update_result",
    "_load_lora_adapter",
    "_load_lora_adapter_from_tensors",
    "validate_new_adapter",
    "load_lora_weights",
    "load_lora_weights_from_tensors",
    "init_lora_adapters",
)


def with_real_functions(monkeypatch):
    """SGLang's own registry, configuration and references, and its own text of what loads adapters."""
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_registry import LoRARef

    content = {
        "torch": torch,
        "logger": logging.getLogger("stand-in"),
        "LoRAConfig": LoRAConfig,
        "LoRARef": LoRARef,
        "LoRAAdapter": _Reading,
        "LoRAUpdateOutput": Output,
        "warn_if_adapter_targets_embeddings": lambda **_: None,
    }
    body = [real_functions()[name] for name in TAKEN]
    names = ast.parse("from typing import Dict, List, Optional").body
    exec(compile(ast.Module([*names, *body], []), MANAGER, "exec"), content)

    def init_state(self, max_lora_rank=None, target_modules=None, lora_paths=None):
        self.init_lora_adapters(lora_paths)
        ranks = [config.r for config in self.configs.values()]
        self.max_lora_rank = max(ranks, default=0) if max_lora_rank is None else max_lora_rank

    def init(self, max_lora_rank=None, lora_paths=None):
        self.base_hf_config = types.SimpleNamespace(vocab_size=32)
        self.load_config = self.lora_backend = self.base_model = None
        self.speculative_algorithm, self.attn_dp_enabled = None, False
        self.max_loras_per_batch = 8
        self.init_state(max_lora_rank=max_lora_rank, target_modules=None, lora_paths=lora_paths)

    own = {"__init__": init, "init_state": init_state}
    own |= {
        name: getattr(LoRAManager, name)
        for name in ("load_lora_adapter", "load_lora_adapter_from_tensors")
    }
    manager = _module(
        MANAGER, LoRAManager=type("LoRAManager", (), own | {name: content[name] for name in TAKEN})
    )
    monkeypatch.setitem(sys.modules, MANAGER, manager)
    return manager
