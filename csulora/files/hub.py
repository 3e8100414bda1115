"""Local folders and hub ids."""

from __future__ import annotations

import concurrent.futures.thread as pools
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError, UsageError

TIMEOUT = 30.0  # seconds without a byte, after which a hub counts as silent
VARIABLE = "CSULORA_HUB_TIMEOUT"
REST = 300.0  # seconds for which a hub that could not be reached is not asked again
_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_CONNECTING = {"ConnectError", "ConnectTimeout", "ConnectionError"}  # of httpx, of requests


class _UnreachableError(Exception):
    """The hub cannot be reached."""


_last: tuple[float, str] | None = None  # when a hub could not be reached, and why


def resolve_source(name: str | os.PathLike[str], patterns: list[str]) -> Path:
    """A local folder as it is, or the local snapshot of a hub id, downloaded if need be.

    A hub that sends nothing for `TIMEOUT` seconds (or those of the environment variable
    CSULORA_HUB_TIMEOUT) is given up, and other ids then fail at once unless they are in its cache.
    Raises CsuloraError for what is neither here nor to be had.
    """
    text = os.fspath(name)
    if os.path.exists(text):
        return Path(text)
    if os.path.islink(text):
        raise CsuloraError(f"{text}: a link that leads nowhere")
    # Below a folder that is here a name is a path, mistyped.
    if not _ID.fullmatch(text) or ("/" in text and os.path.isdir(text.partition("/")[0])):
        raise CsuloraError(f"{text}: no such folder")
    limit = _limit()
    try:
        return Path(_snapshot(text, patterns, limit))
    except Exception as error:  # the hub client raises many kinds; each is one line for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CsuloraError(
            f"{text}: no such folder, and not to be had from the hub ({reason})"
        ) from None


def _limit() -> float:
    text = os.environ.get(VARIABLE) or str(TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError(f"{VARIABLE} must be a number of seconds above 0, not {text!r}")
    return seconds


def _snapshot(name: str, patterns: list[str], limit: float) -> str:
    """The folder of a snapshot; where the hub cannot be reached, that of an earlier download."""
    global _last
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    known = _last
    try:
        if known is not None and time.monotonic() - known[0] < REST:
            raise _UnreachableError(known[1])
        try:
            return _watched(lambda: snapshot_download(name, allow_patterns=patterns), name, limit)
        except Exception as error:
            if isinstance(error, _UnreachableError) or _is_connecting(error):
                _last = time.monotonic(), str(error)
            raise
    except _UnreachableError as error:
        try:
            return snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None


def _is_connecting(error: BaseException | None) -> bool:
    """Whether an error of the hub client comes of no connection, and not of none being wanted."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _CONNECTING:
            return "OfflineModeIsEnabled" not in names
        error = error.__cause__
    return False


def _watched(download: Callable[[], str], name: str, limit: float) -> str:
    """The result of a download in a thread of its own, left to itself once nothing more comes."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    result: list[Any] = []
    ended = threading.Event()

    def run() -> None:
        try:
            result.append(download())
        except BaseException as error:
            result.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    size, since = _size(folder), time.monotonic()
    while not ended.wait(min(1.0, limit / 4)):
        now = _size(folder)
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > limit:
            _forget_pools()
            raise _UnreachableError(f"{constants.ENDPOINT}: no answer in {limit:g} s")
    if isinstance(result[0], BaseException):
        raise result[0]
    return str(result[0])


def _size(folder: Path) -> int:
    """Bytes below a folder of the cache, while others write there."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
            except OSError:
                continue
    return total


def _forget_pools() -> None:
    """Keep the end of the process from waiting for a pool that a download left.

    Only threads that a daemon thread has started, as here, are daemons themselves.
    """
    queues: Any = getattr(pools, "_threads_queues", {})
    for thread in list(queues):
        if thread.daemon:
            queues.pop(thread, None)
