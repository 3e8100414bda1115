"""What every hook asks: under which path may this adapter be served?"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from csulora.adapter import HUB_PATTERNS
from csulora.errors import CsuloraError
from csulora.files.hub import resolve_source
from csulora.serving.guard import Guard, refusal_text

T = TypeVar("T")


@contextlib.contextmanager
def refusing(name: str, kind: type[Exception]) -> Iterator[None]:
    """Raise a refusal of the adapter `name` as an error of this kind, which tells clients why."""
    try:
        yield
    except CsuloraError as error:
        raise kind(refusal_text(name, error)) from None


class Admission:
    """Answers of a guard in the terms of vLLM's requests.

    All methods but the asynchronous ones block while an adapter is corrected. Corrections and the checks
    of requests have threads of their own: a check does not wait for the correction of another adapter.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.observing = guard.config.mode == "observe"
        self._served: set[str] = set()  # paths that the guard has admitted
        self._corrections = ThreadPoolExecutor(2, "csulora-correct")
        self._checks = ThreadPoolExecutor(4, "csulora-check")

    def path(self, given: str, name: str, max_rank: int | None) -> str:
        """Where the sound weights of an adapter lie, which is somewhere else than it is given.

        given: as `lora_path` of a request: a folder, or a hub id.

        Raises CsuloraError for a refused adapter.
        """
        if self.observing:
            return self._observed(given, name, max_rank)
        admitted = self.guard.admit(local_folder(given), name, max_rank=max_rank)
        self._served.add(str(admitted.path))
        return str(admitted.path)

    def _observed(self, given: str, name: str, max_rank: int | None) -> str:
        """The path as it is given, after the guard has looked at the adapter once."""
        if given not in self._served:
            self._served.add(given)
            with contextlib.suppress(CsuloraError):  # logged by the guard, and left to vLLM
                self.guard.admit(local_folder(given), name, max_rank=max_rank)
        return given

    def named(self, name: str, max_rank: int | None) -> str | None:
        """The same for a name in the configured folders; None for an unknown one."""
        folder = self.guard.find(name)
        return None if folder is None else self.path(str(folder), name, max_rank)

    def settle(self, request: Any, max_rank: int | None) -> None:
        """Let a `LoRARequest` name sound weights: checked, where its path was admitted before.

        Raises CsuloraError for a refused adapter.
        """
        if not self.known(request.lora_path):
            request.lora_path = self.path(request.lora_path, request.lora_name, max_rank)
        elif not self.observing:
            self.guard.check(request.lora_path, request.lora_name)

    def known(self, path: str) -> bool:
        """Whether this is a path that was admitted in this process."""
        return path in self._served

    async def correcting(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments), while other requests go on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._corrections, function, *arguments)

    async def settling(self, request: Any, max_rank: int | None) -> None:
        """`settle`, while other requests go on."""
        threads = self._checks if self.known(request.lora_path) else self._corrections
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(threads, self.settle, request, max_rank)


def local_folder(given: str) -> Path:
    """The folder that vLLM would read for a `lora_path`; a hub id is downloaded.

    Raises CsuloraError where there is none.
    """
    text = os.path.expanduser(given) if given.startswith("~") else given
    if os.path.isabs(text):
        return Path(text)
    if not os.path.exists(text) and os.environ.get("VLLM_USE_MODELSCOPE", "0") not in ("", "0"):
        raise CsuloraError(f"{text}: no such folder, and csulora takes nothing from ModelScope")
    return resolve_source(text, HUB_PATTERNS).absolute()
