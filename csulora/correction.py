"""Applying the method to adapters in memory: `correct`, `correct_batch`, `decompose`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from csulora.adapter import DTYPES, LoraAdapter
from csulora.errors import CsuloraError, UsageError
from csulora.pipeline import by_torch
from csulora.pipeline.backend import pick_device, pick_solver
from csulora.pipeline.finish import finish
from csulora.pipeline.finish import report as report_of
from csulora.pipeline.plan import Plan, other_model
from csulora.pipeline.solved import Solved
from csulora.report import Report
from csulora.settings import Correction, Method
from csulora.subspace import SafetySubspace


def correct(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Method | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    again: bool = False,
    strict_base: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> tuple[LoraAdapter, Report]:
    """The corrected adapter and what was done to it; the input is not changed.

    Args:
        correction: a `Correction` (CSULoRA) or a `Realignment`, `Correction()` if not given.
        dtype: of the new factors (float32, bfloat16, float16); None keeps each factor's own.
            Computation is in float32, the r x r systems in float64.
        portable: return the form that PEFT, vLLM, SGLang and LoRAX read alike.
        again: correct an adapter that was read from an output of csulora, instead of refusing it.
        strict_base: refuse an adapter whose configuration names neither model of the subspace, instead
            of a warning in the report.
        backend: "auto", "torch" or "triton". device: "auto", "cpu" or "cuda".

    Raises CsuloraError when modules do not match the subspace, shapes do not fit or a result does not
    fit the dtype; UsageError for an unknown option.
    """
    (result,) = correct_batch(
        [adapter],
        subspace,
        correction,
        dtype=dtype,
        portable=portable,
        again=again,
        strict_base=strict_base,
        backend=backend,
        device=device,
    )
    if isinstance(result, CsuloraError):
        raise result
    return result


def correct_batch(
    adapters: Sequence[LoraAdapter],
    subspace: SafetySubspace,
    correction: Method | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    again: bool = False,
    strict_base: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> list[tuple[LoraAdapter, Report] | CsuloraError]:
    """`correct` for each adapter, in order; one that cannot be corrected gives its error in its place.

    No bit of a result depends on the others. Triton takes those of one type, padded rank and padded
    number of directions in one launch a stage, so they must fit in the device's memory: four times their
    bytes, besides the subspace, which stays there with `subspace` for the next call.

    Raises UsageError for an unknown option.
    """
    correction = correction or Correction()
    check_dtype(dtype)
    chosen = pick_device(device)
    solve = pick_solver(backend, chosen)

    def planned(adapter: LoraAdapter) -> Plan | CsuloraError:
        try:
            _check_origin(adapter, subspace, again, strict_base)
            return Plan.of(adapter, subspace, correction, dtype, portable)
        except CsuloraError as error:
            return error

    plans = [planned(adapter) for adapter in adapters]
    solved = solve([plan for plan in plans if isinstance(plan, Plan)], chosen)
    return [_finished(plan, solved) if isinstance(plan, Plan) else plan for plan in plans]


def decompose(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Method | None = None,
    *,
    device: str = "auto",
) -> Report:
    """Relative energies of the adapter's blocks, without computing a corrected adapter.

    With a `correction`, the energies after are those it would leave; without, they equal those before.
    Raises as `correct` does.
    """
    correction = correction or Correction(0, 0, 0, 0)
    return decompose_each(adapter, subspace, [correction], device=device)[0]


def decompose_each(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    corrections: Sequence[Method],
    *,
    device: str = "auto",
) -> list[Report]:
    """`decompose` for several settings, for the price of one pass over the factors."""
    plans = [Plan.of(adapter, subspace, correction) for correction in corrections]
    # Projections do not depend on the strengths.
    members = [plans[0].members] if plans else []
    stacks = by_torch.project_members(members, pick_device(device))
    return [report_of(plan, *by_torch.solve_stacks([plan], stacks)) for plan in plans]


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise UsageError for a type that new factors cannot have."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be float32, bfloat16 or float16, not {dtype}")


def _check_origin(
    adapter: LoraAdapter, subspace: SafetySubspace, again: bool, strict_base: bool
) -> None:
    """Raise CsuloraError for an adapter that is not what it should be a correction of."""
    source = adapter.source
    if source is not None and source.corrected and not again:
        origin = adapter.made.get("source", {}).get("name")
        raise CsuloraError(
            f"{source.folder}: was corrected by csulora already; correct its source"
            f"{f', {origin!r},' if origin else ''} or it once more with again=True (--again)"
        )
    other = other_model(adapter.config, vars(subspace.origin)) if strict_base else None
    if other is not None:
        raise CsuloraError(other)


def _finished(
    plan: Plan, solved: Iterator[Solved | CsuloraError]
) -> tuple[LoraAdapter, Report] | CsuloraError:
    found = next(solved)
    if isinstance(found, CsuloraError):
        return found
    try:
        return finish(plan, found)
    except CsuloraError as error:
        return error
