"""The guard in SGLang: hooks around the two functions by which a scheduler gets an adapter.

SGLang scales every update by lora_alpha / r and reads neither patterns nor the rsLoRA flag, so that only
the portable form means in it what it means in PEFT. It reads whatever weights lie in a folder; entries of
the guard's cache hold one file of them. Loading happens in the scheduler, while its requests wait.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from csulora.errors import CsuloraError
from csulora.integrations.hooks import Hook
from csulora.serving.config import from_environment
from csulora.serving.guard import Guard, RefusedError, refusal_text

MODULE = "sglang.srt.lora.lora_manager"
MANAGER = f"{MODULE}.LoRAManager"
# What the hooks count on, as SGLang 0.5.23 has it.
_TENSORS = ("tensors", "config_dict", "added_tokens_config")
EXPECTED = {
    name: Hook(MODULE, f"LoRAManager.{name}", ("self", *parameters))
    for name, parameters in {
        "init_state": ("max_lora_rank", "target_modules", "lora_paths"),
        "_load_lora_adapter": ("lora_ref",),
        "_load_lora_adapter_from_tensors": ("lora_ref", *_TENSORS),
        "create_lora_update_result": ("success", "error_message"),
    }.items()
}
REGISTER = Hook(
    "sglang.srt.plugins.hook_registry",
    "HookRegistry.register",
    ("target", "hook", "hook_type"),
    among=True,
)
logger = logging.getLogger("csulora.integrations.sglang")

# Passed where an adapter would be, to see that a call comes by the hooks. Were there none, it would be an
# adapter that is nowhere.
_PROBE = SimpleNamespace(lora_id="", lora_name="csulora", lora_path="/dev/null", pinned=False)


def install() -> None:
    """Register the guard's hooks with SGLang; called in every process of a server.

    Raises CsuloraError for a configuration that is missing or wrong, and for an SGLang that is not as
    expected: the caller has to end the process then, by SystemExit.
    """
    config = from_environment()
    if config is None or config.mode == "off":
        return
    for hook in EXPECTED.values():
        hook.function()
    register = REGISTER.function()
    around = importlib.import_module(REGISTER.module).HookType.AROUND
    hooks = Hooks(Guard(replace(config, portable=True)))
    for name, function in (
        ("init_state", hooks.init_state),
        ("_load_lora_adapter", hooks.load),
        ("_load_lora_adapter_from_tensors", hooks.load_from_tensors),
    ):
        register(f"{MANAGER}.{name}", function, around)


class Hooks:
    """What runs in place of each function; each gets it as `original`, and its arguments."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._starting: int | None = None  # max_lora_rank of a manager that has not kept it yet

    def init_state(
        self,
        original: Callable[..., None],
        manager: Any,
        max_lora_rank: int | None = None,
        target_modules: Any = None,
        lora_paths: Any = None,
    ) -> None:
        """The start of a manager, which loads the adapters that a server is started with.

        SGLang logs a hook that it cannot apply and goes on, and opening a guard takes memory that only
        schedulers need to spend: so both are looked after here.
        """
        try:
            self._guard.open()
            _check_hooked(manager)
        except CsuloraError as error:
            raise SystemExit(f"csulora: error: {error}") from None
        self._starting = max_lora_rank
        original(manager, max_lora_rank, target_modules, lora_paths)

    def load(self, original: Callable[..., Any], manager: Any, lora_ref: Any) -> Any:
        """Load an adapter from a folder."""
        if lora_ref is _PROBE:
            return _PROBE
        try:
            admitted = self._guard.admit(
                lora_ref.lora_path, lora_ref.lora_name, max_rank=self._max_rank(manager)
            )
            other = importlib.import_module("msgspec").structs.replace
            sound = other(lora_ref, lora_path=str(admitted.path))
        except Exception as error:  # it would go through the scheduler, and end it
            return _refused(manager, lora_ref, error)
        return original(manager, sound)

    def load_from_tensors(
        self,
        original: Callable[..., Any],
        manager: Any,
        lora_ref: Any,
        tensors: Any,
        config_dict: Any,
        added_tokens_config: Any = None,
    ) -> Any:
        """Load an adapter that a client sent as tensors."""
        if lora_ref is _PROBE:
            return _PROBE
        try:
            tensors, config_dict = self._guard.admit_tensors(
                tensors, config_dict, lora_ref.lora_name, max_rank=self._max_rank(manager)
            )
        except Exception as error:
            return _refused(manager, lora_ref, error)
        return original(manager, lora_ref, tensors, config_dict, added_tokens_config)

    def _max_rank(self, manager: Any) -> int | None:
        """The largest rank that the server takes; None where it takes what it is started with."""
        return getattr(manager, "max_lora_rank", self._starting)


def _refused(manager: Any, lora_ref: Any, error: Exception) -> Any:
    """What SGLang itself returns of an adapter that it cannot load: clients get 400 and the text."""
    if not isinstance(error, RefusedError):  # a guard has told of its own
        logger.error("csulora: %s is not served", lora_ref.lora_name, exc_info=error)
        error = RefusedError("unforeseen", f"{type(error).__name__}: {error}")
    text = refusal_text(str(lora_ref.lora_name), error)
    return manager.create_lora_update_result(success=False, error_message=text)


def _check_hooked(manager: Any) -> None:
    """Raise CsuloraError where a call would not come by the hooks."""
    for name, arguments in (
        ("_load_lora_adapter", (_PROBE,)),
        ("_load_lora_adapter_from_tensors", (_PROBE, {}, {}, None)),
    ):
        try:
            answer = getattr(manager, name)(*arguments)
        except Exception:  # of the function itself, which knows no probe
            answer = None
        if answer is not _PROBE:
            raise CsuloraError(
                f"SGLang is not guarded: its hook on {MANAGER}.{name} was not applied"
            )
