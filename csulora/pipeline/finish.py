"""From a solution to the adapter and its report: precision, type, balance and form, after any backend."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csulora.adapter import LoraAdapter, LoraModule
from csulora.errors import CsuloraError
from csulora.files.names import ends_with
from csulora.files.patterns import Pattern
from csulora.files.peft_config import FILE, portable_config
from csulora.files.peft_ranks import Rules, alpha_for_rank
from csulora.method import in_float64
from csulora.method.stages import Figures
from csulora.pipeline.memory import allocate, balance, fits_float16, store
from csulora.pipeline.plan import Member, Plan, other_model
from csulora.pipeline.solved import Pair, Solved
from csulora.report import Report, module_reports, rank_warnings, totals
from csulora.settings import Correction, Method, Realignment
from csulora.subspace import SafetySubspace
from csulora.text import listed
from csulora.version import MADE_BY

_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
# What gives the factors of members that float32 would spoil, by their position in the plan.
Careful = dict[int, in_float64.Attenuated | in_float64.Realigned]


def finish(plan: Plan, solved: Solved) -> tuple[LoraAdapter, Report]:
    """The corrected adapter and what was done to it.

    Raises CsuloraError where a result, or an energy, is out of range, and where there is nothing to
    correct or no configuration to say the result with.
    """
    if not plan.members:
        raise CsuloraError(
            "no module could be corrected: none of its tensors is a LoRA update on a linear weight: "
            f"{listed(plan.source.passed_through)}"
        )
    careful = _solve_in_float64(plan, solved)
    report = _report(plan, solved)
    portable_rank = plan.portable_rank
    memory = solved.memory or allocate(plan)
    modules: dict[str, LoraModule] = {}
    for i in solved.order:
        member, into = plan.members[i], memory[i]
        pair = _factors(plan, i, solved, careful, into if plan.only_rounds(member) else None)
        modules[member.name] = _module(plan, member, pair, portable_rank, into)
    ordered = {name: modules[name] for name in plan.source.modules}
    new = replace(plan.source, modules=ordered, made=_made(plan, report))
    return _with_config(plan, new), report


def report(plan: Plan, solved: Solved) -> Report:
    """What the correction would do, without doing it. Raises as `finish`."""
    _solve_in_float64(plan, solved)
    return _report(plan, solved)


def provenance(
    subspace: SafetySubspace, correction: Method, dtype: torch.dtype | None, portable: bool
) -> dict[str, dict[str, Any]]:
    """What, besides the source, determines a result, as the report states it."""
    return {
        "made_by": dict(MADE_BY),
        "settings": {
            **correction.to_dict(),
            "dtype": "keep" if dtype is None else str(dtype).removeprefix("torch."),
            "portable": portable,
        },
        "subspace": {
            "sha256": subspace.sha256,
            "base": subspace.origin.base,
            "aligned": subspace.origin.aligned,
            "rank": subspace.rank,
        },
    }


def _solve_in_float64(plan: Plan, solved: Solved) -> Careful:
    """Parts and cores of the members that need it; their figures, and those of members that are dropped,
    replace those in `solved`."""
    found: Careful = {}
    for i in solved.needs_float64.nonzero().flatten().tolist():
        found[i], figures = _in_float64(plan, plan.members[i])
        for whole, figure in zip(solved.figures, figures, strict=True):
            whole[i] = figure
    for i, member in enumerate(plan.members):
        if member.dropped:
            _nothing_left(solved.figures, i)
    return found


def _nothing_left(figures: Figures, i: int) -> None:
    """The figures of a member whose update is removed, in place."""
    figures.after[i] = figures.rank_error[i] = 0
    figures.relative_change[i] = float(figures.energy[i] > 0)


def _in_float64(
    plan: Plan, member: Member
) -> tuple[in_float64.Attenuated | in_float64.Realigned, Figures]:
    B, A, U, V = member.module.B, member.module.A, member.U, member.V
    if isinstance(member.correction, Correction):
        return in_float64.attenuate(B, A, U, V, member.correction)
    limit = plan.limits(member).storing
    return in_float64.realign(B, A, U, V, member.spectrum, member.correction, limit)


def _factors(plan: Plan, i: int, solved: Solved, careful: Careful, into: Pair | None) -> Pair:
    """B' and A' of a member in whatever type they were computed in."""
    member = plan.members[i]
    B, A = member.module.B, member.module.A
    if member.dropped:
        return torch.zeros_like(B), torch.zeros_like(A)
    if plan.stays(member) or (member.correction.is_identity and i not in careful):
        return B, A
    if i in careful:
        return careful[i].factors(member.rank)
    return solved.factors(i, into)


def _module(
    plan: Plan, member: Member, pair: Pair, portable_rank: int | None, into: Pair
) -> LoraModule:
    """The module in the form that is wanted, its factors in the memory and type kept for them."""
    old, (B, A) = member.module, pair
    rslora = bool(plan.source.config.get("use_rslora"))
    alpha = alpha_for_rank(old.alpha, old.rank, A.shape[0], rslora)
    new = LoraModule(A, B, alpha, old.scaling, old.embedding)
    if portable_rank is not None:
        new = new.portable(portable_rank)
        B, A = new.B, new.A
    if torch.float16 in (into[0].dtype, into[1].dtype) and not (
        _leaves_B(member, pair)
        and _holds(into[0], B.mT, as_stored=B is old.B)
        and _holds(into[1], A, as_stored=A is old.A)
    ):
        B, A = balance(B, A)
    store(member.name, B, A, into, scaled=_scaled(plan, member, B, into))
    return LoraModule(into[1], into[0], new.alpha, new.scaling, new.embedding)


def _scaled(plan: Plan, member: Member, B: Tensor, into: Pair) -> str:
    """Which factors were multiplied by a number that may be of any size."""
    if plan.portable:
        return "BA"
    if not isinstance(member.correction, Realignment):
        return ""
    # It divides by the scaling, and leaves the source's own B of form same.
    return "A" if B is member.module.B and B.dtype == into[0].dtype else "BA"


def _leaves_B(member: Member, pair: Pair) -> bool:
    """Whether the result is one of which B is to stay as it is, where that costs nothing."""
    realigned = isinstance(member.correction, Realignment) and pair[0] is member.module.B
    return member.correction.is_identity or realigned


def _holds(into: Tensor, rows: Tensor, *, as_stored: bool) -> bool:
    """Whether the type of `into` holds rows (r, d) of a factor without a change of gauge.

    as_stored: they are the source's own.
    """
    if into.dtype != torch.float16 or (as_stored and rows.dtype == into.dtype):
        return True
    return fits_float16(rows)


def _has_nothing_to_realign(member: Member) -> bool:
    """Whether the noise edge leaves a module out that has directions."""
    correction = member.correction
    if not isinstance(correction, Realignment) or correction.is_identity:
        return False
    S, edge, _ = member.spectrum
    return correction.edge and len(S) > 0 and bool(S[0] <= edge)


def _untargeted(plan: Plan) -> list[str]:
    """Modules that PEFT does not apply by `target_modules`, as far as that can be told."""
    targets, rules = plan.source.config.get("target_modules"), Rules(FILE, plan.source.config)
    names = {m.name: rules.names(m.name) for m in plan.members if not rules.parameters(m.name)}
    if isinstance(targets, list):
        ends = [str(target) for target in targets]
        return [m for m in names if not any(ends_with(n, end) for n in names[m] for end in ends)]
    if not isinstance(targets, str) or targets.lower() == "all-linear":
        return []
    try:
        whole = Pattern(FILE, "target_modules", {f"^({targets})$": 1}, 0)
        return [m for m in names if not any(map(whole, names[m]))]
    except CsuloraError:  # an expression that is not taken
        return []


def _uneven_experts(plan: Plan) -> list[str]:
    """Layers whose experts, each a module of its own, had one rank and have several in the result."""
    layers: dict[str, list[Member]] = {}
    for member in plan.members if not plan.portable else ():
        if found := _EXPERT.match(member.name):
            layers.setdefault(found[1], []).append(member)
    return [
        layer
        for layer, experts in layers.items()
        if len({m.rank for m in experts}) > 1 and len({m.module.rank for m in experts}) == 1
    ]


def _made(plan: Plan, report: Report) -> dict[str, Any]:
    """What the file will say of how it was made."""
    before = {"before": plan.source.made} if plan.source.made else {}
    made = {"settings": report.settings, "subspace": report.subspace, "source": report.source}
    return copy.deepcopy(made | before)


def _with_config(plan: Plan, adapter: LoraAdapter) -> LoraAdapter:
    """The new adapter, which still has its source's configuration, with its own."""
    before = {member.name: member.module.rank for member in plan.members}
    if plan.portable_rank is None:
        return replace(adapter, config=adapter.written_config(before))
    adapter = replace(adapter, config=portable_config(adapter.config, plan.portable_rank))
    return replace(adapter, config=adapter.written_config())


def _report(plan: Plan, solved: Solved) -> Report:
    padded = plan.portable_rank
    ranks = [(m.module.rank, padded or m.rank, m.U.shape[1]) for m in plan.members]
    scalings = [member.module.scaling for member in plan.members]
    modules = module_reports([m.name for m in plan.members], solved.figures, scalings, ranks)
    total = totals(modules)
    warnings = []
    if plan.correction.method == "csulora":
        # Realignment's own form of rank r is not that of another.
        warnings += rank_warnings(total, modules)
    elif total.relative_change > 1:
        warnings.append(
            f"the result differs from the adapter by {total.relative_change:.3g} times its norm: what "
            "alignment did is large beside the adapter"
        )
    if not modules:
        warnings.append("no module could be corrected: every tensor was passed through")
    empty = [name for name, module in modules.items() if module.subspace_rank == 0]
    if empty:
        warnings.append(
            f"base and aligned are equal on {len(empty)} module(s), so their whole update counts as "
            f"off-subspace: {', '.join(empty[:3])}"
        )
    quiet = [m.name for m in plan.members if _has_nothing_to_realign(m)]
    if quiet:
        warnings.append(
            f"nothing of what alignment did stands out of noise on {len(quiet)} module(s), which are "
            f"left as they are (edge off would take all directions): {', '.join(quiet[:3])}"
        )
    if plan.left_out:
        warnings.append(
            f"the portable form goes without the adapter's copy of base weights: {listed(plan.left_out)}"
        )
    if plan.portable and (untargeted := _untargeted(plan)):
        warnings.append(
            f"target_modules names {len(modules) - len(untargeted)} of {len(modules)} modules, which are "
            f"all that PEFT applies, where servers apply the others, too: {listed(untargeted)}"
        )
    if uneven := _uneven_experts(plan):
        warnings.append(
            f"the experts of {listed(uneven)} have different ranks now; with transformers 5 PEFT stacks "
            "them, and then cannot load the result: use the portable form"
        )
    made = provenance(plan.subspace, plan.correction, plan.dtype, plan.portable)
    other = other_model(plan.source.config, made["subspace"])
    if other is not None:
        warnings.append(other)
    if plan.source.made:
        warnings.append("the adapter had been corrected before")
    source = plan.source.source
    return Report(
        modules=modules,
        totals=total,
        made_by=made["made_by"],
        settings=made["settings"],
        subspace=made["subspace"],
        source={} if source is None else source.to_dict(),
        passed_through=sorted(plan.source.passed_through),
        warnings=[*warnings, *plan.notes, *solved.notes],
        strength=plan.strength,
    )
