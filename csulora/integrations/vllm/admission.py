"""What every hook asks: under which path may this adapter be served?"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from csulora.adapter import HUB_PATTERNS
from csulora.errors import CsuloraError
from csulora.files.hub import resolve_source
from csulora.serving.guard import Guard, refusal_text
from csulora.serving.recent import Recent

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

    All methods but the asynchronous ones block while an adapter is corrected. Corrections, downloads and
    the checks of requests have threads of their own: a check waits for no correction of another adapter,
    and a correction for no hub.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.observing = guard.config.mode == "observe"
        self._served: Recent[str, bool] = Recent()  # paths that the guard has admitted
        self._corrections = ThreadPoolExecutor(2, "csulora-correct")
        self._downloads = ThreadPoolExecutor(4, "csulora-download")
        self._checks = ThreadPoolExecutor(4, "csulora-check")

    def path(self, given: str, name: str, max_rank: int | None) -> str:
        """Where the sound weights of an adapter lie, which is somewhere else than it is given.

        given: as `lora_path` of a request: a folder, or a hub id.

        Raises CsuloraError for a refused adapter.
        """
        return self._admitted(self._folder(given), given, name, max_rank)

    def _folder(self, given: str) -> Path | None:
        """The folder to look at, which may have to be downloaded; None where nobody has to look."""
        if not self.observing:
            return local_folder(given)
        if not self.known(given):
            with contextlib.suppress(CsuloraError):  # vLLM will say so
                return local_folder(given)
        return None

    def _admitted(self, folder: Path | None, given: str, name: str, max_rank: int | None) -> str:
        """`path` of an adapter that lies in `folder`; when observing the path as it is given."""
        if folder is None:
            return given
        if self.observing:
            self._served.set(given, True)
            with contextlib.suppress(CsuloraError):  # logged by the guard, and left to vLLM
                self.guard.admit(folder, name, max_rank=max_rank)
            return given
        path = str(self.guard.admit(folder, name, max_rank=max_rank).path)
        self._served.set(path, True)
        return path

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
        else:
            self.guard.check(request.lora_path, request.lora_name)

    def known(self, path: str) -> bool:
        """Whether this is a path that was admitted in this process."""
        return self._served.get(path) is not None

    async def finding(self, name: str, max_rank: int | None) -> str | None:
        """`named`, while other requests go on."""
        return await _within(self._corrections, self.named, name, max_rank)

    async def admitting(self, given: str, name: str, max_rank: int | None) -> str:
        """`path`, while other requests go on."""
        if is_here(given):
            return await _within(self._corrections, self.path, given, name, max_rank)
        folder = await _within(self._downloads, self._folder, given)
        return await _within(self._corrections, self._admitted, folder, given, name, max_rank)

    async def settling(self, request: Any, max_rank: int | None) -> None:
        """`settle`, while other requests go on."""
        if self.known(request.lora_path):
            await _within(self._checks, self.settle, request, max_rank)
        else:
            path = await self.admitting(request.lora_path, request.lora_name, max_rank)
            request.lora_path = path


async def _within(threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def is_here(given: str) -> bool:
    """Whether vLLM takes a `lora_path` for a folder, and not for a hub id."""
    text = os.path.expanduser(given) if given.startswith("~") else given
    return os.path.isabs(text) or os.path.exists(text)


def local_folder(given: str) -> Path:
    """The folder that vLLM would read for a `lora_path`; a hub id is downloaded.

    Raises CsuloraError where there is none.
    """
    text = os.path.expanduser(given) if given.startswith("~") else given
    if os.path.isabs(text):
        return Path(text)
    if not is_here(text) and os.environ.get("VLLM_USE_MODELSCOPE", "0") not in ("", "0"):
        raise CsuloraError(f"{text}: no such folder, and csulora takes nothing from ModelScope")
    return resolve_source(text, HUB_PATTERNS).absolute()
