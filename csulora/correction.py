"""Applying the method to an adapter in memory: `correct` and `decompose`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora import careful, packed, reference
from csulora.adapter import DTYPES, LoraAdapter, LoraModule, listed
from csulora.backend import pick_backend, pick_device
from csulora.errors import CsuloraError, UsageError
from csulora.factors import Place, allocate, balance, store
from csulora.names import match_modules
from csulora.peft_config import alpha_for_rank, portable_config
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
# Amplifications up to which float32 arithmetic keeps to 1e-5 and a half type to 2 of its ulp.
COMPUTING_LIMIT = 4.0
STORING_LIMIT = 3.0


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
    form = _Form.of(adapter, correction, dtype, portable)
    tasks = _tasks(adapter, subspace)
    memory = allocate({task.name: form.place(task) for task in tasks})
    modules: dict[str, LoraModule] = {}
    reports: dict[str, ModuleReport] = {}
    for group in _groups(tasks):
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
            modules[task.name] = _finish(task, B, A, form, into)
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
    groups = list(_groups(_tasks(adapter, subspace)))
    projections = [
        _project_group(group, [_single(task, place) for task in group]) for group in groups
    ]
    reports = []
    for correction in corrections:
        form = _Form.of(adapter, correction, None, False)
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
    groups: dict[torch.dtype, list[tuple[int, _Form, list[_Task]]]] = {}
    for i, adapter in enumerate(adapters):
        try:
            form, tasks = _Form.of(adapter, correction, dtype, portable), _tasks(adapter, subspace)
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
    form: _Form, tasks: list[_Task], found: packed.Corrected, subspace: SafetySubspace
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
        modules[task.name] = _finish(task, B, A, form, memory[task.name])
        figures = {name: getattr(found.cores, name)[i : i + 1] for name in reference.FIGURES}
        reports |= _group_reports([task], found.cores._replace(**figures), form)
    source, portable = form.source, form.portable_rank is not None
    return form.adapter(modules), _report(
        source, reports, origins(source, subspace, form.correction, form.dtype, portable)
    )


class _Task(NamedTuple):
    name: str
    target: str  # its name in the subspace
    module: LoraModule
    U: Tensor  # (d_out, k)
    V: Tensor  # (d_in, k)

    def update(self, subspace: SafetySubspace) -> packed.Update:
        transposed = self.U is not subspace.modules[self.target].U
        return packed.Update(self.name, self.target, transposed, self.module.B, self.module.A)


class _Form(NamedTuple):
    """The form in which the result is wanted: everything about it but its values."""

    source: LoraAdapter
    correction: Correction
    dtype: torch.dtype | None
    portable_rank: int | None

    @classmethod
    def of(
        cls, source: LoraAdapter, correction: Correction, dtype: torch.dtype | None, portable: bool
    ) -> _Form:
        form = cls(source, correction, dtype, None)
        if not portable:
            return form
        if source.extra:
            raise CsuloraError(
                f"the portable form cannot hold passed-through tensors: {listed(source.extra)}"
            )
        ranks = [form.rank(module) for module in source.modules.values()]
        if not ranks:
            raise CsuloraError("the portable form needs at least one module")
        return form._replace(portable_rank=max(ranks))

    def rank(self, module: LoraModule, *, padded: bool = True) -> int:
        """Rank of a module's result, before or after the portable form pads it."""
        if self.portable_rank is not None and padded:
            return self.portable_rank
        doubled = self.correction.rank == "exact" and not self.correction.is_identity
        return 2 * module.rank if doubled else module.rank

    def needs_care(
        self, group: list[_Task], held: Tensor, amplification: reference.Amplification
    ) -> Tensor:
        """Which modules of a group float32 would spoil, or their type would in an unbalanced form."""
        if self.correction.is_identity:
            return ~held
        types = (torch.float16, torch.bfloat16)
        half = [self.dtype in types or task.module.B.dtype in types for task in group]
        limit = torch.where(torch.tensor(half, device=held.device), STORING_LIMIT, COMPUTING_LIMIT)
        return ~held | (amplification.computing > COMPUTING_LIMIT) | (amplification.storing > limit)

    def working_type(self) -> torch.dtype:
        """Of the factors that kernels read and write: bfloat16 only where nothing is done to it later.

        float16 goes through float32, as its few exponents have to be evened out before rounding.
        """
        found = {X.dtype for m in self.source.modules.values() for X in (m.B, m.A)}
        plain = self.portable_rank is None and self.dtype in (None, torch.bfloat16)
        return torch.bfloat16 if plain and found == {torch.bfloat16} else torch.float32

    def place(self, task: _Task) -> Place:
        module = task.module
        r = self.rank(module)
        return Place(
            B=(module.B.shape[0], r),
            A=(r, module.A.shape[1]),
            B_dtype=self.dtype or module.B.dtype,
            A_dtype=self.dtype or module.A.dtype,
        )

    def adapter(self, modules: dict[str, LoraModule]) -> LoraAdapter:
        config = self.source.config
        if self.portable_rank is not None:
            config = portable_config(config, self.portable_rank)
        return replace(self.source, modules=modules, config=config)


def _tasks(adapter: LoraAdapter, subspace: SafetySubspace) -> list[_Task]:
    where = str(subspace.path or "subspace")
    matches = match_modules(adapter.modules, subspace.modules.keys(), where)
    flipped = bool(adapter.config.get("fan_in_fan_out")) and any(
        _is_flipped(module, subspace.modules[matches[name]])
        for name, module in adapter.modules.items()
    )
    return [
        _Task(
            name,
            matches[name],
            module.detached(),
            *_bases(name, module, matches[name], subspace, flipped),
        )
        for name, module in adapter.modules.items()
    ]


def _is_flipped(module: LoraModule, found: ModuleSubspace) -> bool:
    """Whether only U and V in each other's place fit the update, as when the adapter knows that its
    weights are stored as (d_in, d_out) and the estimate did not."""
    shape = (module.B.shape[0], module.A.shape[1])
    return not found.fan_in_fan_out and shape != shape[::-1] == (found.U.shape[0], found.V.shape[0])


def _bases(
    name: str, module: LoraModule, target: str, subspace: SafetySubspace, flipped: bool
) -> tuple[Tensor, Tensor]:
    """U and V of a module, in the orientation of its update."""
    found: ModuleSubspace = subspace.modules[target]
    shape = (module.B.shape[0], module.A.shape[1])
    U, V = found.U, found.V
    # The singular vectors of the transposed matrix are the same two bases in the other order. A square
    # module does not tell; it is stored like the others.
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


def _single(task: _Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """B and A of a module in float32 on the device, converted once for both passes over them."""
    return task.module.B.to(device, torch.float32), task.module.A.to(device, torch.float32)


def _project_group(
    group: list[_Task], factors: list[tuple[Tensor, Tensor]]
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
        name = group[int(finite.int().argmin())].name
        raise CsuloraError(f"{name}: NaN, or factors whose squares overflow float32")
    return stacked, (squares > SMALLEST_SQUARE).all(-1)


def _solve_carefully(
    group: list[_Task], cores: reference.Cores, which: Tensor, form: _Form
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
    task: _Task,
    pair: tuple[Tensor, Tensor],
    projection: reference.Projection,
    cores: reference.Cores,
    form: _Form,
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


def _finish(
    task: _Task, B: Tensor, A: Tensor, form: _Form, into: tuple[Tensor, Tensor]
) -> LoraModule:
    """The module in the form that is wanted, its factors in the memory and type kept for them."""
    module = task.module
    alpha = module.alpha
    if A.shape[0] != module.rank:
        flag = bool(form.source.config.get("use_rslora"))
        alpha = alpha_for_rank(alpha, module.rank, A.shape[0], flag)
    new = LoraModule(A=A, B=B, alpha=alpha, scaling=module.scaling)
    if form.portable_rank is not None:
        new = new.portable(form.portable_rank)
    B, A = new.B, new.A
    if torch.float16 in (into[0].dtype, into[1].dtype) and not form.correction.is_identity:
        B, A = balance(B, A)
    store(task.name, B, A, into, scaled=form.portable_rank is not None)
    return replace(new, B=into[0], A=into[1])


def _group_reports(
    group: list[_Task], cores: reference.Cores, form: _Form
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
