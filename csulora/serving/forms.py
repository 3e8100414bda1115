"""Which form an adapter is corrected in, so that its rank is one that the server takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from csulora.adapter import LoraAdapter
from csulora.pipeline.plan import Plan
from csulora.serving.config import ServingConfig
from csulora.serving.refused import RefusedError
from csulora.settings import Correction, Method
from csulora.subspace import SafetySubspace
from csulora_kernels import Form

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank can be


def ranks(adapter: LoraAdapter, subspace: SafetySubspace, config: ServingConfig) -> dict[Form, int]:
    """The largest rank of the result in each form. Raises CsuloraError where adapter and subspace
    do not fit."""
    found: dict[Form, int] = {}
    for form in get_args(Form):
        # A strength that keeps to a budget changes no rank, unless it is 0, and takes long to find.
        method = replace(config.method, form=form, budget=None)
        plan = Plan.of(adapter, subspace, method, config.dtype, config.portable)
        found[form] = max((member.rank for member in plan.members), default=0)
    return found


def pick(
    found: Mapping[Form, int], config: ServingConfig, max_rank: int | None
) -> tuple[Method, int]:
    """The settings to correct an adapter with, and the largest rank of the result.

    found: of `ranks`.

    A form that the configuration fixes stays; otherwise it is exact where its rank fits, else same, and
    for realignment same, which keeps the rank.

    Raises RefusedError where no form fits.
    """
    form: Form = config.method.form
    if not config.fixed_form and isinstance(config.method, Correction):
        form = "exact" if max_rank is None or found["exact"] <= max_rank else "same"
    if max_rank is not None and found[form] > max_rank:
        raise RefusedError(
            "rank", f"its rank in the form {form} is {found[form]}, and the server takes {max_rank}"
        )
    return replace(config.method, form=form), found[form]
