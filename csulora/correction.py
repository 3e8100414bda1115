"""Applying the method to an adapter in memory: `correct` and `decompose`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csulora import careful, packed, reference
from csulora.adapter import DTYPES, LoraAdapter, LoraModule
from csulora.backend import pick_backend, pick_device
from csulora.errors import CsuloraError, UsageError
from csulora.factors import allocate
from csulora.report import (
    ModuleReport,
    Report,
    module_reports,
    rank_warnings,
    settings_dict,
    totals,
)
from csulora.settings import Correction
from csulora.subspace import SafetySubspace
from csulora.tasks import Form, Task, finish, groups_of, tasks_of


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
    place = pick_device(device)
    if pick_backend(backend, place) == "triton":
        (result,) = _correct_packed([adapter], subspace, correction, dtype, portable, place)
        if isinstance(result, CsuloraError):
            raise result
        return result
    form = Form.of(adapter, correction, dtype, portable)
    tasks = tasks_of(adapter, subspace)
    memory = allocate({task.name: form.place(task) for task in tasks})
    modules: dict[str, LoraModule] = {}
    reports: dict[str, ModuleReport] = {}
    for group in groups_of(tasks):
        factors = [_single(task, place) for task in group]
        projection, held = _project_group(group, factors)
        cores, amplification = reference.solve_with_amplification(projection, correction)
        spoiled = _solve_carefully(group, cores, form.needs_care(group, held, amplification), form)
        reports |= _group_reports(group, cores, form)
        # The last first: its basis is the one that is still in the cache.
        rows = list(zip(group, factors, projection.unbind(), cores.unbind(), strict=True))
        for task, pair, coordinates, core in reversed(rows):
            into = memory[task.name]
            if task.name in spoiled and not correction.is_identity:
                B, A = careful.recompose(*spoiled[task.name], form.rank(task.module, padded=False))
            else:
                B, A = _recompose(task, pair, coordinates, core, form, into)
            modules[task.name] = finish(task, B, A, form, into)
    return form.adapter({name: modules[name] for name in adapter.modules}), _report(
        adapter,
        {name: reports[name] for name in adapter.modules},
        origins(adapter, subspace, correction, dtype, portable),
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

    Triton takes all of them in one launch a stage, so all must fit in the device's memory: four times
    their bytes, besides the subspace, which stays there with `subspace` for the next call.

    Raises UsageError for an unknown option.
    """
    correction = correction or Correction()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    place = pick_device(device)
    if pick_backend(backend, place) == "triton":
        return _correct_packed(adapters, subspace, correction, dtype, portable, place)
    results: list[tuple[LoraAdapter, Report] | CsuloraError] = []
    options: dict[str, Any] = {"dtype": dtype, "portable": portable, "device": device}
    for adapter in adapters:
        try:
            results.append(correct(adapter, subspace, correction, backend="torch", **options))
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
    groups = list(groups_of(tasks_of(adapter, subspace)))
    projections = [
        _project_group(group, [_single(task, place) for task in group]) for group in groups
    ]
    reports = []
    for correction in corrections:
        form = Form.of(adapter, correction, None, False)
        found: dict[str, ModuleReport] = {}
        for group, (projection, held) in zip(groups, projections, strict=True):
            cores, amplification = reference.solve_with_amplification(projection, correction)
            _solve_carefully(group, cores, form.needs_care(group, held, amplification), form)
            found |= _group_reports(group, cores, form)
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


def _correct_packed(
    adapters: Sequence[LoraAdapter],
    subspace: SafetySubspace,
    correction: Correction,
    dtype: torch.dtype | None,
    portable: bool,
    device: torch.device,
) -> list[tuple[LoraAdapter, Report] | CsuloraError]:
    """`correct_batch` by the Triton kernels; adapters of one working type go together."""
    results: dict[int, tuple[LoraAdapter, Report] | CsuloraError] = {}
    groups: dict[torch.dtype, list[tuple[int, Form, list[Task]]]] = {}
    for i, adapter in enumerate(adapters):
        try:
            form, tasks = Form.of(adapter, correction, dtype, portable), tasks_of(adapter, subspace)
            widest = max((task.module.rank for task in tasks), default=0)
            if widest > packed.MAX_RANK or not tasks:
                options: dict[str, Any] = {"dtype": dtype, "portable": portable}
                done, report = correct(
                    adapter, subspace, correction, backend="torch", device=str(device), **options
                )
                note = [f"rank {widest} is above {packed.MAX_RANK}: corrected by torch, not Triton"]
                results[i] = done, replace(report, warnings=report.warnings + note * bool(tasks))
            else:
                groups.setdefault(form.working_type(), []).append((i, form, tasks))
        except CsuloraError as error:
            results[i] = error
    for work, members in groups.items():
        batch = [[task.update(subspace) for task in tasks] for _, _, tasks in members]
        found = packed.correct_updates(batch, subspace, correction, work, device)
        for (i, form, tasks), one in zip(members, found, strict=True):
            try:
                results[i] = (
                    one if isinstance(one, CsuloraError) else _unpack(form, tasks, one, subspace)
                )
            except CsuloraError as error:
                results[i] = error
    return [results[i] for i in range(len(adapters))]


def _unpack(
    form: Form, tasks: list[Task], found: packed.Corrected, subspace: SafetySubspace
) -> tuple[LoraAdapter, Report]:
    """The adapter and report that `correct` returns, from the factors that the kernels wrote."""
    memory = allocate({task.name: form.place(task) for task in tasks})
    care = form.needs_care(tasks, found.held, found.amplification)
    spoiled = _solve_carefully(tasks, found.cores, care, form)
    modules: dict[str, LoraModule] = {}
    reports: dict[str, ModuleReport] = {}
    for i, task in enumerate(tasks):
        if found.factors is None:
            B, A = task.module.B, task.module.A
        elif task.name in spoiled:
            B, A = careful.recompose(*spoiled[task.name], form.rank(task.module, padded=False))
        else:
            B, A = found.factors[i]
        modules[task.name] = finish(task, B, A, form, memory[task.name])
        figures = {name: getattr(found.cores, name)[i : i + 1] for name in reference.FIGURES}
        reports |= _group_reports([task], found.cores._replace(**figures), form)
    source, portable = form.source, form.portable_rank is not None
    return form.adapter(modules), _report(
        source, reports, origins(source, subspace, form.correction, form.dtype, portable)
    )


def _single(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """B and A of a module in float32 on the device, converted once for both passes over them."""
    return task.module.B.to(device, torch.float32), task.module.A.to(device, torch.float32)


def _project_group(
    group: list[Task], factors: list[tuple[Tensor, Tensor]]
) -> tuple[reference.Projection, Tensor]:
    """Stacked projections of a group, and for each module whether float32 held its squares.

    Factors can be as small as 1e-30 where alpha makes up for it: a sum of squares that vanished would
    pass the update off as zero, and so as nothing to correct.
    """
    rows = [
        reference.project(B, A, task.U.to(B), task.V.to(B))
        for task, (B, A) in zip(group, factors, strict=True)
    ]
    stacked = reference.Projection(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
    squares = torch.cat([G.diagonal(dim1=-2, dim2=-1) for G in (stacked.G_B, stacked.G_A)], dim=-1)
    finite = torch.isfinite(squares).all(-1)
    if not bool(finite.all()):
        raise careful.overflow(group[int(finite.int().argmin())].name)
    return stacked, (squares > careful.SMALLEST_SQUARE).all(-1)


def _solve_carefully(
    group: list[Task], cores: reference.Cores, which: Tensor, form: Form
) -> dict[str, tuple[careful.Parts, reference.Cores]]:
    """Parts and cores in float64 of the modules that need it; their figures replace those in `cores`."""
    found = {}
    for i in which.nonzero().flatten().tolist():
        task, device = group[i], cores.energy.device
        module = task.module
        parts = careful.split(*(X.to(device) for X in (module.B, module.A, task.U, task.V)))
        solved = careful.solve(parts, form.correction)
        for name in reference.FIGURES:
            getattr(cores, name)[i] = getattr(solved, name)
        found[task.name] = parts, solved
    return found


def _recompose(
    task: Task,
    pair: tuple[Tensor, Tensor],
    projection: reference.Projection,
    cores: reference.Cores,
    form: Form,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The module's new factors in float32, in the memory kept for them if that will do."""
    if form.correction.is_identity:
        return task.module.B, task.module.A
    B, A = pair
    there = form.portable_rank is None and all(
        X.dtype == torch.float32 and X.device == B.device for X in into
    )
    U, V = task.U.to(B), task.V.to(B)
    return reference.recompose(B, A, U, V, projection, cores, into if there else None)


def _group_reports(
    group: list[Task], cores: reference.Cores, form: Form
) -> dict[str, ModuleReport]:
    module = group[0].module
    ranks = (module.rank, form.rank(module), group[0].U.shape[1])
    names = [task.name for task in group]
    return module_reports(names, cores, [t.module.scaling for t in group], ranks)


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
