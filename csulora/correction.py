"""Applying the method to an adapter in memory: `correct` and `decompose`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora import reference
from csulora.adapter import DTYPES, LoraAdapter, LoraModule
from csulora.backend import check_backend, pick_device
from csulora.errors import CsuloraError, UsageError
from csulora.names import match_modules
from csulora.peft_config import alpha_for_rank
from csulora.report import (
    ModuleReport,
    Report,
    module_reports,
    rank_warnings,
    settings_dict,
    totals,
)
from csulora.settings import Correction
from csulora.subspace import ModuleSubspace, SafetySubspace

# Far enough above the smallest float32 that a sum of squares keeps its digits.
SMALLEST_SQUARE = 1e-30


def correct(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Correction | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> tuple[LoraAdapter, Report]:
    """The corrected adapter and what was done to it; the input is not changed.

    Args:
        correction: strengths and choices, `Correction()` if not given.
        dtype: of the new factors (float32, bfloat16, float16); None keeps each factor's own.
            Computation is in float32, the r x r systems in float64.
        portable: return the form that PEFT, vLLM, SGLang and LoRAX read alike.
        backend: "auto", "torch" or "triton". device: "auto", "cpu" or "cuda".

    Raises CsuloraError when modules do not match the subspace, shapes do not fit or a result does not
    fit the dtype; UsageError for an unknown option.
    """
    correction = correction or Correction()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    check_backend(backend)
    place = pick_device(device)
    tasks = _tasks(adapter, subspace)
    modules: dict[str, LoraModule] = {}
    reports: dict[str, ModuleReport] = {}
    for group in _groups(tasks):
        solved = _solve_group(group, correction, place)
        reports |= _group_reports(group, solved, correction)
        for i, task in enumerate(group):
            modules[task.name] = _recompose(task, solved, i, adapter, correction, place)
    corrected = replace(adapter, modules={name: modules[name] for name in adapter.modules})
    if portable:
        corrected = corrected.portable()
    corrected = _cast(corrected, adapter, dtype)
    reports = {name: reports[name] for name in adapter.modules}
    if portable:
        rank = next(iter(corrected.modules.values())).rank
        reports = {name: replace(r, rank_out=rank) for name, r in reports.items()}
    return corrected, _report(
        adapter, reports, origins(adapter, subspace, correction, dtype, portable)
    )


def correct_batch(
    adapters: Sequence[LoraAdapter],
    subspace: SafetySubspace,
    correction: Correction | None = None,
    *,
    dtype: torch.dtype | None = None,
    portable: bool = False,
    backend: str = "auto",
    device: str = "auto",
) -> list[tuple[LoraAdapter, Report] | CsuloraError]:
    """`correct` for each adapter, in order; one that cannot be corrected gives its error in its place.

    Raises UsageError for an unknown option.
    """
    results: list[tuple[LoraAdapter, Report] | CsuloraError] = []
    for adapter in adapters:
        try:
            results.append(
                correct(
                    adapter,
                    subspace,
                    correction,
                    dtype=dtype,
                    portable=portable,
                    backend=backend,
                    device=device,
                )
            )
        except UsageError:
            raise
        except CsuloraError as error:
            results.append(error)
    return results


def decompose(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Correction | None = None,
    *,
    device: str = "auto",
) -> Report:
    """Relative energies of the adapter's blocks, without computing a corrected adapter.

    With a `correction`, the energies after are those it would leave; without, they equal those before.
    Raises as `correct` does.
    """
    correction = correction or Correction(0, 0, 0, 0)
    return sweep(adapter, subspace, [correction], device=device)[0]


def sweep(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    corrections: list[Correction],
    *,
    device: str = "auto",
) -> list[Report]:
    """`decompose` for several settings, for the price of one pass over the factors."""
    place = pick_device(device)
    groups = list(_groups(_tasks(adapter, subspace)))
    projections = [_project_group(group, place) for group in groups]
    reports = []
    for correction in corrections:
        found: dict[str, ModuleReport] = {}
        for group, projection in zip(groups, projections, strict=True):
            cores = reference.solve(projection, correction)
            found |= _group_reports(group, _Solved(projection, cores), correction)
        ordered = {name: found[name] for name in adapter.modules}
        reports.append(_report(adapter, ordered, origins(adapter, subspace, correction)))
    return reports


def origins(
    adapter: LoraAdapter,
    subspace: SafetySubspace,
    correction: Correction,
    dtype: torch.dtype | None = None,
    portable: bool = False,
) -> dict[str, dict[str, Any]]:
    """What determines a result: settings, subspace and source, as the report states them."""
    source = adapter.source
    return {
        "settings": {
            **settings_dict(correction),
            "dtype": "keep" if dtype is None else str(dtype).removeprefix("torch."),
            "portable": portable,
        },
        "subspace": {
            "sha256": subspace.sha256,
            "base": subspace.origin.base,
            "aligned": subspace.origin.aligned,
            "rank": max(module.S.shape[0] for module in subspace.modules.values()),
        },
        "source": {}
        if source is None
        else {"name": source.name, "sha256": source.sha256, "config_sha256": source.config_sha256},
    }


class _Task(NamedTuple):
    name: str
    module: LoraModule
    U: Tensor  # (d_out, k)
    V: Tensor  # (d_in, k)


class _Solved(NamedTuple):
    projection: reference.Projection  # stacked over the modules of a group
    cores: reference.Cores


def _tasks(adapter: LoraAdapter, subspace: SafetySubspace) -> list[_Task]:
    where = str(subspace.path or "subspace")
    matches = match_modules(adapter.modules, subspace.modules.keys(), where)
    flipped = bool(adapter.config.get("fan_in_fan_out"))
    return [
        _Task(name, module, *_bases(name, module, matches[name], subspace, flipped))
        for name, module in adapter.modules.items()
    ]


def _bases(
    name: str, module: LoraModule, target: str, subspace: SafetySubspace, flipped: bool
) -> tuple[Tensor, Tensor]:
    """U and V of a module, in the orientation of its update."""
    found: ModuleSubspace = subspace.modules[target]
    shape = (module.B.shape[0], module.A.shape[1])
    U, V = found.U, found.V
    # The adapter knows that its weights are (d_in, d_out), the estimate did not: the singular vectors
    # of the transposed matrix are the same two bases in the other order.
    if flipped and not found.fan_in_fan_out and (V.shape[0], U.shape[0]) == shape:
        U, V = V, U
    if (U.shape[0], V.shape[0]) != shape:
        raise CsuloraError(
            f"{subspace.path or 'subspace'}: {target} is {U.shape[0]} x {V.shape[0]}, but the adapter "
            f"updates {name} with {shape[0]} x {shape[1]}; was the subspace estimated for another model?"
        )
    return U, V


def _groups(tasks: list[_Task]) -> Iterator[list[_Task]]:
    """Modules whose r x r systems can be solved in one call: equal rank and subspace rank."""
    groups: dict[tuple[int, int], list[_Task]] = {}
    for task in tasks:
        groups.setdefault((task.module.rank, task.U.shape[1]), []).append(task)
    yield from groups.values()


def _project_group(group: list[_Task], device: torch.device) -> reference.Projection:
    """Stacked projections of a group: each module's factors are read once, one at a time.

    Factors can be as small as 1e-30 where alpha makes up for it: a sum of squares that vanished would
    pass the update off as zero, and so as nothing to correct. Such modules are projected in float64.
    """
    rows = [_project(task, device, task.U.dtype) for task in group]
    stacked = _stack(rows)
    squares = torch.cat([G.diagonal(dim1=-2, dim2=-1) for G in (stacked.G_B, stacked.G_A)], dim=-1)
    finite = torch.isfinite(squares).all(-1)
    if not bool(finite.all()):
        name = group[int(finite.int().argmin())].name
        raise CsuloraError(f"{name}: NaN, or factors whose squares overflow float32")
    held = (squares > SMALLEST_SQUARE).all(-1).tolist()
    if all(held):
        return stacked
    return _stack(
        reference.Projection(*(X.double() for X in row))
        if enough
        else _project(task, device, torch.float64)
        for task, row, enough in zip(group, rows, held, strict=True)
    )


def _project(task: _Task, device: torch.device, dtype: torch.dtype) -> reference.Projection:
    tensors = (task.module.B, task.module.A, task.U, task.V)
    return reference.project(*(X.to(device, dtype) for X in tensors))


def _stack(rows: Iterable[reference.Projection]) -> reference.Projection:
    return reference.Projection(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _solve_group(group: list[_Task], correction: Correction, device: torch.device) -> _Solved:
    projection = _project_group(group, device)
    return _Solved(projection, reference.solve(projection, correction))


def _recompose(
    task: _Task,
    solved: _Solved,
    index: int,
    adapter: LoraAdapter,
    correction: Correction,
    device: torch.device,
) -> LoraModule:
    module = task.module
    if correction.is_identity:
        return module
    projection, cores = solved.projection.at(index), solved.cores.at(index)
    B, A = reference.recompose(
        module.B.to(device),
        module.A.to(device),
        task.U.to(device),
        task.V.to(device),
        projection,
        cores,
    )
    alpha = alpha_for_rank(
        module.alpha, module.rank, A.shape[0], bool(adapter.config.get("use_rslora"))
    )
    return LoraModule(A=A.cpu(), B=B.cpu(), alpha=alpha, scaling=module.scaling)


def _group_reports(
    group: list[_Task], solved: _Solved, correction: Correction
) -> dict[str, ModuleReport]:
    rank = group[0].module.rank
    doubled = correction.rank == "exact" and not correction.is_identity
    ranks = (rank, 2 * rank if doubled else rank, group[0].U.shape[1])
    names = [task.name for task in group]
    return module_reports(names, solved.cores, [t.module.scaling for t in group], ranks)


def _cast(adapter: LoraAdapter, original: LoraAdapter, dtype: torch.dtype | None) -> LoraAdapter:
    modules = {}
    for name, module in adapter.modules.items():
        old = original.modules[name]
        A, B = module.A, module.B
        A_dtype, B_dtype = dtype or old.A.dtype, dtype or old.B.dtype
        if torch.float16 in (A_dtype, B_dtype) and A is not old.A:
            B, A = _balance(B.float(), A.float())
        A, B = A.to(A_dtype), B.to(B_dtype)
        for side, X in (("A", A), ("B", B)):
            # bfloat16 and float32 reach as far as the computation did.
            if X.dtype == torch.float16 and not bool(torch.isfinite(X).all()):
                raise CsuloraError(
                    f"{name}: the corrected lora_{side} does not fit {X.dtype}; "
                    "choose --dtype bfloat16 or float32"
                )
        modules[name] = replace(module, A=A, B=B)
    return replace(adapter, modules=modules)


def _balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Even out the two factors' magnitudes column by column, by powers of two.

    float16 has few exponents: parts of a small B fall among its subnormal numbers and lose digits.
    Powers of two leave the product, and every digit of the result, as they are.
    """
    left, right = B.abs().amax(0), A.abs().amax(1)
    usable = (left > 0) & (right > 0)
    shift = torch.where(usable, (0.5 * (right / left).log2()).round(), torch.zeros_like(left))
    return B * torch.exp2(shift), A * torch.exp2(-shift)[:, None]


def _report(
    adapter: LoraAdapter, modules: dict[str, ModuleReport], origin: dict[str, dict[str, Any]]
) -> Report:
    total = totals(modules)
    warnings = rank_warnings(total, modules)
    if not modules:
        warnings.append("no module could be corrected: every tensor was passed through")
    empty = [name for name, module in modules.items() if module.subspace_rank == 0]
    if empty:
        warnings.append(
            f"base and aligned are equal on {len(empty)} module(s), so their whole update counts as "
            f"off-subspace: {', '.join(empty[:3])}"
        )
    return Report(
        modules=modules,
        totals=total,
        passed_through=sorted(adapter.extra),
        warnings=warnings,
        **origin,
    )
