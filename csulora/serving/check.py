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
from csulora.serving.borrowed import BorrowedCache
from csulora.serving.canary import Stack
from csulora.serving.config import Mode, ServingConfig
from csulora.serving.forms import MAX_RANKS
from csulora.serving.guard import Admitted, Guard
from csulora.serving.refused import RefusedError
from csulora.subspace import SafetySubspace

# Reasons that another rank may mend; by "not corrected", where the cache has the other form.
_OF_RANK = ("rank", "rank error", "not corrected")
_SAVED_BY_VLLM = ("classifier", "score")
_REFUSED_BY_VLLM = (
    *("use_dora", "lora_bias", "alora_invocation_tokens"),
    *("layer_replication", "use_bdlora", "use_qalora"),
)
_INITS_OF_VLLM = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # besides true and false


@dataclass(frozen=True)
class Finding:
    """What a server would do with one adapter.

    rank, form, how: as in `Admitted`, of what is served; 0 and empty where it is refused.
    needs: the smallest max_lora_rank that takes it, None where none does.
    reason: short code of a refusal, as in `RefusedError`, or "stack" for one of the stack's own; error:
        its text. Both empty where it is served.
    warnings: as in `Admitted`.
    """

    folder: Path
    rank: int = 0
    form: str = ""
    how: str = ""
    needs: int | None = None
    reason: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()

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
            "warnings": list(self.warnings),
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

    In mode "require" it has what the configuration's has, since that decides there.

    config: of `server_config`. max_rank: the server's max_lora_rank; None: that of the configuration,
    else no limit. Raises CsuloraError where no guard can stand.
    """
    with tempfile.TemporaryDirectory(prefix="csulora-serve-check-") as temporary:
        root = Path(temporary)
        cache = BorrowedCache(root, config.cache) if config.mode == "require" else None
        guard = Guard(replace(config, cache=root, cache_bytes=None, audit=None), cache=cache)
        guard.open(subspace)
        try:
            admitted = guard.admit(folder, folder.name, max_rank=max_rank)
        except RefusedError as error:
            if error.reason == "cache":  # says nothing of the server's
                raise CsuloraError(str(error)) from None
            needs = _smallest(guard, folder, stack) if error.reason in _OF_RANK else None
            return Finding(folder, needs=needs, reason=error.reason, error=str(error))
        limit = guard.config.max_lora_rank if max_rank is None else max_rank
        objection = _objection(admitted, stack, limit)
        needs = _smallest(guard, folder, stack)
        if objection is not None:
            return Finding(folder, needs=needs, reason="stack", error=objection)
        served = admitted.rank, admitted.form, admitted.how
        return Finding(folder, *served, needs, warnings=admitted.warnings)


def smallest(findings: list[Finding]) -> int | None:
    """The smallest max_lora_rank that takes all that any takes; None where there are none."""
    return max((one.needs for one in findings if one.needs is not None), default=None)


def _smallest(guard: Guard, folder: Path, stack: Stack) -> int | None:
    """Of an adapter. Reads it no second time, and corrects it at most once in the other form."""
    for limit in MAX_RANKS if stack == "vllm" else range(1, MAX_RANKS[-1] + 1):
        try:
            admitted = guard.admit(folder, folder.name, max_rank=limit)
        except RefusedError as error:
            if error.reason not in _OF_RANK:
                return None
            continue
        if _objection(admitted, stack, None) is not None:
            return None
        if _objection(admitted, stack, limit) is None:
            return limit
    return None


def _objection(admitted: Admitted, stack: Stack, max_rank: int | None) -> str | None:
    """Why a stack refuses what csulora would give it; None where it does not."""
    config = read_json(admitted.path / CONFIG, CONFIG_LIMIT)
    return of_vllm(config, max_rank) if stack == "vllm" else _of_sglang(config)


def of_vllm(config: Mapping[str, Any], max_rank: int | None) -> str | None:
    """Why a vLLM with this max_lora_rank refuses a configuration, whatever the tensors; None where it
    does not. After `vllm.lora.peft_helper.PEFTHelper` of 0.32 and 0.33."""
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)):
            return f"vLLM needs a number as {field}"
    if "target_modules" not in config:
        return "vLLM needs target_modules"
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, (list, str)) or not all(name in _SAVED_BY_VLLM for name in saved):
        return f"vLLM refuses modules_to_save {saved!r}"
    for field in _REFUSED_BY_VLLM:
        if config.get(field):
            return f"vLLM refuses {field}"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS_OF_VLLM:
        return f"vLLM refuses init_lora_weights {init!r}"
    if config.get("bias", "none") != "none":
        return f"vLLM refuses bias {config['bias']!r}"
    return _rank_objection(config["r"], config.get("rank_pattern") or {}, max_rank)


def _rank_objection(r: float, pattern: Any, max_rank: int | None) -> str | None:
    """The largest rank of a configuration counts in vLLM, also where no module has it."""
    if not isinstance(pattern, dict) or not all(isinstance(n, int) for n in pattern.values()):
        return "vLLM needs integers in rank_pattern"
    if not min(stated := [r, *pattern.values()]) > 0:
        return "vLLM needs positive ranks"
    if max_rank is not None and max(stated) > max_rank:
        return f"its configuration says rank {max(stated)}, and the server takes {max_rank}"
    return None


def _of_sglang(config: Mapping[str, Any]) -> str | None:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return f"SGLang takes no pattern as target_modules: {targets!r}"
    if config.get("use_dora"):
        return "SGLang refuses use_dora"
    return None
