"""Whether a guard stands in a running server: it is asked to load an adapter that must be refused.

The adapter is a canary. A stock server loads it, since servers do not compare the rank in a configuration
with that of the tensors, and take modules that their model does not have; for any guard it contradicts
itself. It is harmless where it is loaded: B is zero.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from csulora.errors import CsuloraError, UsageError
from csulora.files.folders import writing
from csulora.files.json import json_bytes
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import write_bytes
from csulora.files.safetensors import write_safetensors
from csulora.output import WEIGHTS
from csulora.serving.guard import refusal_text
from csulora.text import one_line

Stack = Literal["vllm", "sglang"]
# Where each stack loads and unloads adapters.
ENDPOINTS = {
    "vllm": ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    "sglang": ("/load_lora_adapter", "/unload_lora_adapter"),
}
# The last part is one that the models of all stacks have; no model has the whole of it.
MODULE = "csulora_canary.layers.0.self_attn.o_proj"
RANK = 2  # of the tensors; the configuration says 1

_NAME = "csulora-canary"
_ANSWER = 1 << 20  # bytes that are read of an answer


@dataclass(frozen=True)
class Probe:
    """What a server did with the canary.

    found: "guarded", if it was refused with csulora's text; "loaded"; "refused", by something else; or
        "silent", where there was no answer. text: a sentence about it.
    """

    url: str
    found: Literal["guarded", "loaded", "refused", "silent"]
    text: str

    @property
    def ok(self) -> bool:
        """Whether a guard stands there."""
        return self.found == "guarded"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"url": self.url, "ok": self.ok, "found": self.found, "text": self.text}


class _SilentError(Exception):
    """There was no answer."""


def ask(
    url: str,
    stack: Stack = "vllm",
    *,
    api_key: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    timeout: float = 60.0,
) -> Probe:
    """Ask a running server to load the canary; if it does, it is told to unload it again.

    url: of the server, without the path of an endpoint. api_key: sent as a bearer token.
    folder: where the canary is written for the moment, which the server must be able to read; None: a
        temporary folder. timeout: seconds to wait for each answer.

    Raises UsageError for a url that is none, CsuloraError where the canary cannot be written.
    """
    base = _checked(url)
    load, unload = ENDPOINTS[stack]
    # A name of its own, or the last try's canary would be "already loaded".
    name = f"{_NAME}-{secrets.token_hex(4)}"
    with _canary(folder) as path:
        try:
            asked = {"lora_name": name, "lora_path": str(path)}
            status, answer = _post(base + load, asked, api_key, timeout)
        except _SilentError as silent:
            return Probe(url, "silent", f"no answer ({silent})")
        if 200 <= status < 300:
            left = _unload(base + unload, name, api_key, timeout)
            return Probe(
                url,
                "loaded",
                "loaded an adapter that csulora refuses: no guard stands there, or its mode is "
                f"observe or off; {left}",
            )
    if refusal_text(name, CsuloraError("")).strip() in answer:
        return Probe(url, "guarded", f"refused the canary ({status}: {answer})")
    return Probe(url, "refused", _not_by_us(status, answer, stack))


def _checked(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{url!r}: must be the address of a server, such as http://localhost:8000")
    return url.rstrip("/")


@contextlib.contextmanager
def _canary(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The canary in a folder of its own that other users, as servers often are, can read."""
    where = Path(tempfile.gettempdir() if folder is None else folder).absolute()
    with (
        writing(where),
        tempfile.TemporaryDirectory(prefix=f"{_NAME}-", dir=where) as temporary,
    ):
        path = Path(temporary)
        path.chmod(0o755)
        tensors = {
            f"base_model.model.{MODULE}.lora_A.weight": torch.ones(RANK, 8),
            f"base_model.model.{MODULE}.lora_B.weight": torch.zeros(8, RANK),
        }
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "target_modules": [MODULE.rpartition(".")[2]],
            "bias": "none",
        }
        write_safetensors(path / WEIGHTS, tensors, {"format": "pt"}, mode=0o644)
        write_bytes(path / CONFIG, json_bytes(config), mode=0o644)
        yield path


def _unload(url: str, name: str, api_key: str | None, timeout: float) -> str:
    """What became of a canary that was loaded."""
    try:
        status, answer = _post(url, {"lora_name": name}, api_key, timeout)
    except _SilentError as silent:
        status, answer = 0, f"no answer: {silent}"
    if 200 <= status < 300:
        return "it was unloaded again"
    return f"{name} is still loaded, which does no harm ({answer})"


def _not_by_us(status: int, answer: str, stack: Stack) -> str:
    text = f"the adapter was not loaded, but not by csulora ({status}: {answer})"
    if status in (301, 302, 303, 307, 308):
        return f"{text}; give the address that it leads to"
    if status in (401, 403):
        return f"{text}; --api-key-env names the variable with the server's key"
    if status == 404:
        switch = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if stack == "vllm" else "--enable-lora"
        return (
            f"{text}; the server needs {switch} to be asked, and must be able to read the canary's "
            "folder (--canary-dir)"
        )
    return f"{text}; whether a guard stands there is not known"


def _post(
    url: str, content: dict[str, str], api_key: str | None, timeout: float
) -> tuple[int, str]:
    """Status, and the answer on one line. Goes through no proxy, and follows nothing elsewhere."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())
    try:
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.status, _text(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _text(error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SilentError(
            getattr(error, "reason", None) or error or type(error).__name__
        ) from None


class _Stay(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _text(answer: Any) -> str:
    """The message in an answer of vLLM or SGLang, else all of it."""
    body = answer.read(_ANSWER).decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        if isinstance(found, dict):
            error = found.get("error")
            inner = error.get("message") if isinstance(error, dict) else error
            message = inner or found.get("error_message") or found.get("message")
            body = message if isinstance(message, str) else body
    return one_line(body)
