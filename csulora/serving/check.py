"""What a server would do with adapter folders, before it is started."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csulora.errors import CsuloraError
from csulora.files.json import read_json
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.peft_config import FILE as CONFIG
from csulora.serving.canary import Stack
from csulora.serving.config import Mode, ServingConfig
from csulora.serving.forms import MAX_RANKS
from csulora.serving.guard import Admitted, Guard
from csulora.serving.refused import RefusedError
from csulora.subspace import SafetySubspace

# Reasons that a larger rank may mend.
_OF_RANK = ("rank", "rank error")
_SAVED_BY_VLLM = {"classifier", "score"}


@dataclass(frozen=True)
class Finding:
    """What a server would do with one adapter.

    rank, form, how: as in `Admitted`, of what is served; 0 and empty where it is refused.
    needs: the smallest max_lora_rank that takes it, None where none does.
    reason: short code of a refusal, as in `RefusedError`, or "stack" for one of the stack's own; error:
        its text. Both empty where it is served.
    """

    folder: Path
    rank: int = 0
    form: str = ""
    how: str = ""
    needs: int | None = None
    reason: str = ""
    error: str = ""

    @property
    def served(self) -> bool:
        """Whether it would be served with the given max_lora_rank."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "served": self.served,
            "form": self.form,
            "rank": self.rank,
            "how": self.how,
            "max_lora_rank": self.needs,
            "reason": self.reason,
            "error": self.error,
        }


def server_config(config: ServingConfig, stack: Stack) -> ServingConfig:
    """A configuration as a server of this stack would use it when it protects."""
    mode: Mode = "require" if config.mode == "require" else "correct"
    # SGLang reads no scaling but lora_alpha / r, so its guard knows no other form.
    return replace(config, mode=mode, portable=config.portable or stack == "sglang")


def check_folder(
    folder: Path,
    subspace: SafetySubspace,
    config: ServingConfig,
    *,
    stack: Stack = "vllm",
    max_rank: int | None = None,
) -> Finding:
    """Let a guard decide about an adapter folder, with a cache that is thrown away.

    config: of `server_config`. max_rank: the server's max_lora_rank; None: that of the configuration,
    else no limit. Raises CsuloraError where no guard can stand.
    """
    with tempfile.TemporaryDirectory(prefix="csulora-serve-check-") as cache:
        guard = Guard(replace(config, cache=Path(cache), cache_bytes=None, audit=None))
        guard.open(subspace)
        try:
            admitted = guard.admit(folder, folder.name, max_rank=max_rank)
        except RefusedError as error:
            if error.reason == "cache":  # says nothing of the server's
                raise CsuloraError(str(error)) from None
            needs = _smallest(guard, folder, stack) if error.reason in _OF_RANK else None
            return Finding(folder, needs=needs, reason=error.reason, error=str(error))
        objection = _objection(admitted, stack)
        if objection is not None:
            return Finding(folder, reason="stack", error=objection)
        needs = _smallest(guard, folder, stack)
        return Finding(folder, admitted.rank, admitted.form, admitted.how, needs)


def smallest(findings: list[Finding]) -> int | None:
    """The smallest max_lora_rank that takes all that any takes; None where there are none."""
    return max((one.needs for one in findings if one.needs is not None), default=None)


def _smallest(guard: Guard, folder: Path, stack: Stack) -> int | None:
    """Of an adapter. Reads it no second time, and corrects it at most once in the other form."""
    for limit in MAX_RANKS if stack == "vllm" else range(1, MAX_RANKS[-1] + 1):
        try:
            guard.admit(folder, folder.name, max_rank=limit)
        except RefusedError as error:
            if error.reason not in _OF_RANK:
                return None
            continue
        return limit
    return None


def _objection(admitted: Admitted, stack: Stack) -> str | None:
    """Why a stack refuses what csulora would give it; None where it does not."""
    config = read_json(admitted.path / CONFIG, CONFIG_LIMIT)
    return _of_vllm(config) if stack == "vllm" else _of_sglang(config)


def _of_vllm(config: Mapping[str, Any]) -> str | None:
    saved = config.get("modules_to_save") or []
    if not set(saved) <= _SAVED_BY_VLLM:
        return f"vLLM refuses modules_to_save {saved!r}"
    for field in ("use_dora", "lora_bias"):
        if config.get(field):
            return f"vLLM refuses {field}"
    if config.get("bias", "none") != "none":
        return f"vLLM refuses bias {config['bias']!r}"
    return None


def _of_sglang(config: Mapping[str, Any]) -> str | None:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return f"SGLang takes no pattern as target_modules: {targets!r}"
    if config.get("use_dora"):
        return "SGLang refuses use_dora"
    return None
