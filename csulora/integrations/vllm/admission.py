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
from csulora.serving.guard import Admitted, Guard, refusal_text
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
    checks have threads of their own: a check, of a request or of a name, and what is known already wait
    for no correction of another adapter, and a correction for no hub.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.observing = guard.config.mode == "observe"
        self._served: Recent[str, bool] = Recent()  # paths that the guard has admitted
        # The folders that they came from, by name too: adapters of the same content share a path.
        self._given: Recent[tuple[str, str], str] = Recent()
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
        return self._noted(self.guard.admit(folder, name, max_rank=max_rank), given, name)

    def _recalled(
        self, folder: Path | None, given: str, name: str, max_rank: int | None
    ) -> str | None:
        """`_admitted` where the guard knows the adapter, None where it has to be read."""
        if folder is None:
            return given
        found = self.guard.recall(folder, name, max_rank=max_rank)
        return None if found is None else self._noted(found, given, name)

    def _noted(self, admitted: Admitted, given: str, name: str) -> str:
        """The path to serve an adapter from, which is `known` from now on."""
        path = str(admitted.path)
        self._served.set(path, True)
        if path != given and is_here(given):
            self._given.set((name, path), given)
        return path

    def settle(self, request: Any, max_rank: int | None) -> None:
        """Let a `LoRARequest` name sound weights: checked, where its path was admitted before.

        Raises CsuloraError for a refused adapter.
        """
        new = self._to_admit(request)
        if new is None:
            self.guard.check(request.lora_path, request.lora_name)
        else:
            request.lora_path = self.path(new, request.lora_name, max_rank)

    def _to_admit(self, request: Any) -> str | None:
        """The path of a `LoRARequest` as it was given, None where what lies there is admitted already.

        With `load_inplace` a request that is used again is for the weights that lie there now. What came
        from a hub is not asked for again.
        """
        path = request.lora_path
        if not self.known(path):
            return path
        return self._given.get((request.lora_name, path)) if request.load_inplace else None

    def known(self, path: str) -> bool:
        """Whether this is a path that was admitted in this process."""
        return self._served.get(path) is not None

    async def finding(self, name: str, max_rank: int | None) -> str | None:
        """`admitting` a name in the configured folders; None for an unknown one."""
        folder = await _within(self._checks, self.guard.find, name)
        return None if folder is None else await self.admitting(str(folder), name, max_rank)

    async def admitting(self, given: str, name: str, max_rank: int | None) -> str:
        """`path`, while other requests go on."""
        threads = self._checks if is_here(given) else self._downloads
        folder = await _within(threads, self._folder, given)
        adapter = folder, given, name, max_rank
        path = await _within(self._checks, self._recalled, *adapter)
        if path is None:
            path = await _within(self._corrections, self._admitted, *adapter)
        return path

    async def settling(self, request: Any, max_rank: int | None) -> None:
        """`settle`, while other requests go on."""
        new = self._to_admit(request)
        if new is None:
            await _within(self._checks, self.settle, request, max_rank)
        else:
            request.lora_path = await self.admitting(new, request.lora_name, max_rank)


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
