"""What is to be done: each module of an adapter with its bases and strengths, and the form wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csulora.adapter import LoraAdapter, LoraModule
from csulora.errors import CsuloraError
from csulora.files.layouts import match_layouts
from csulora.files.names import SEE_LIKE, ends_with, model_name
from csulora.files.peft_config import FILE
from csulora.files.peft_ranks import Rules, check_alphas
from csulora.files.peft_tensors import PREFIX
from csulora.files.safetensors import is_finite
from csulora.files.turned import by_stack, cannot_be_told, may_be_turned, stack_of
from csulora.method.budget import Update, strength_within
from csulora.method.precision import Limits, limits
from csulora.method.realign import Spectrum
from csulora.settings import Correction, Method, Realignment
from csulora.strengths import OwnStrength
from csulora.subspace import ModuleSubspace, SafetySubspace
from csulora.text import listed


class Member(NamedTuple):
    """One module of an adapter, its bases in the orientation of its update, and its strengths."""

    name: str  # as the adapter calls it
    target: str  # as the subspace calls it
    transposed: bool  # U and V of the subspace have changed places
    module: LoraModule
    U: Tensor  # (d_out, k)
    V: Tensor  # (d_in, k)
    known: ModuleSubspace  # what the bases were taken from
    correction: Method  # names no patterns, and in a plan no budget
    dropped: bool = False  # its update is removed; the strengths of its correction are 0 then

    @property
    def spectrum(self) -> Spectrum:
        """What realignment has to know of D, for the scaling of this update."""
        return self.known.spectrum(self.module.scaling)

    @property
    def rank(self) -> int:
        """Rank of the result, before the portable form pads it."""
        r, k = self.module.rank, self.U.shape[1]
        return r if self.correction.is_identity else self.correction.result_rank(r, k)


class Plan(NamedTuple):
    """An adapter's modules as they are to be corrected: everything about the result but its values."""

    source: LoraAdapter
    subspace: SafetySubspace
    correction: Method
    dtype: torch.dtype | None  # of the new factors, None: each factor's own
    portable: bool
    members: tuple[Member, ...]  # in the order of the adapter's modules
    left_out: tuple[str, ...] = ()  # tensors of the adapter that the portable form goes without
    strength: float | None = None  # that was found for the budget of the correction
    notes: tuple[str, ...] = ()  # warnings for the report

    @classmethod
    def of(
        cls,
        source: LoraAdapter,
        subspace: SafetySubspace,
        correction: Method,
        dtype: torch.dtype | None = None,
        portable: bool = False,
    ) -> Plan:
        """The plan, with the strength that a budget allows: the only thing in it that is computed.

        Raises CsuloraError where adapter and subspace, or adapter and form, do not fit together, where a
        pattern of `strength_for` matches no module and where a budget cannot be kept to.
        """
        embeddings = [name for name, module in source.modules.items() if module.embedding]
        if portable and embeddings:
            raise CsuloraError(
                f"the portable form cannot hold LoRA on embeddings: {listed(embeddings)}"
            )
        scaled = portable or correction.budget is not None or isinstance(correction, Realignment)
        if scaled and source.config.get("alpha_pattern"):
            check_alphas(FILE, source.config, {n: m.rank for n, m in source.modules.items()})
        left_out = base_copies(source) if portable else ()
        kept = {name: X for name, X in source.passed_through.items() if name not in left_out}
        if portable and kept:
            raise CsuloraError(
                f"the portable form cannot hold passed-through tensors: {listed(kept)}; correct "
                "this adapter without --portable and with --pass-through, which copies them uncorrected"
            )
        source = replace(source, passed_through=kept) if left_out else source
        if portable and not source.modules:
            raise CsuloraError("the portable form needs at least one module")
        members = _members(source, subspace, correction)
        plan = cls(source, subspace, correction, dtype, portable, members, left_out)
        return plan if correction.budget is None else plan._within(correction.budget)

    def _within(self, budget: Mapping[str, float]) -> Plan:
        """The plan with the strength that the budget allows for all members without one of their own."""
        ((kind, limit),) = budget.items()
        for m in self.members:
            if not (is_finite(m.module.B) and is_finite(m.module.A)):
                raise CsuloraError(f"{m.name}: NaN or Inf in its factors")
        found = strength_within([_update(m) for m in self.members], kind, limit)
        stated = f"the budget {kind}={limit:g}"
        if found.reached > limit:
            raise CsuloraError(
                f"{stated} cannot be kept to: strengths of single modules"
                f"{' or lambda_aligned' * isinstance(self.correction, Correction)} alone make it "
                f"{found.reached:.4g} at strength {found.strength:g}"
            )
        notes = []
        if math.isinf(found.strength) and kind == "change":
            notes.append(f"{stated} is beyond reach: at strength inf it is {found.reached:.4g}")
        if found.strength == 0 and kind == "change":
            notes.append(f"{stated} is kept to by strength 0 alone: the adapter is left as it is")
        if found.strength == 0 and kind == "off":
            notes.append(f"{stated} is kept to by strength 0: it is {found.reached:.4g} before")
        members = tuple(
            m._replace(correction=m.correction.with_strength(found.strength)) if _is_free(m) else m
            for m in self.members
        )
        return self._replace(members=members, strength=found.strength, notes=tuple(notes))

    @property
    def portable_rank(self) -> int | None:
        """The one rank of all modules in the portable form."""
        return max(member.rank for member in self.members) if self.portable else None

    def limits(self, member: Member) -> Limits:
        """How much of rounding a member bears, see `csulora.method.precision`."""
        read = member.module.B.dtype, member.module.A.dtype
        found = limits(member.correction, read=read, written=self.dtypes(member))
        return found._replace(storing=math.inf) if self.stays(member) else found

    def stays(self, member: Member) -> bool:
        """Whether the result holds a member's factors as they are."""
        B, A = member.module.B, member.module.A
        same_form = not self.portable and self.dtypes(member) == (B.dtype, A.dtype)
        return same_form and member.correction.is_identity

    def only_rounds(self, member: Member) -> bool:
        """Whether new factors are as computed but for their type: neither scaled nor balanced."""
        return not self.portable and torch.float16 not in self.dtypes(member)

    def dtypes(self, member: Member) -> tuple[torch.dtype, torch.dtype]:
        """Types of a member's new B and A."""
        return self.dtype or member.module.B.dtype, self.dtype or member.module.A.dtype


def base_copies(source: LoraAdapter) -> tuple[str, ...]:
    """What PEFT's `save_embedding_layers` adds for a LoRA on the output head: the base weight.

    PEFT never trains it, and servers have it; its shape is that of the update, which has to fit the base.
    """
    heads = (name for name in source.modules if ends_with(name, "lm_head"))
    copies = (f"{PREFIX}{name}.base_layer.weight" for name in heads)
    return tuple(name for name in copies if name in source.passed_through)


def other_model(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """What is to be said of an adapter whose configuration names neither model of the subspace.

    Names are all there is to go by: an adapter of another model can have the same shapes.
    origin: `base` and `aligned`, as a report has them under `subspace`.
    """
    stated = config.get("base_model_name_or_path")
    pair = [str(origin[key]) for key in ("base", "aligned") if origin.get(key)]
    if not isinstance(stated, str) or not model_name(stated) or not pair:
        return None
    if model_name(stated).lower() in {model_name(name).lower() for name in pair}:
        return None
    return (
        f"the adapter was trained on {stated}, by its configuration, but the subspace is that of "
        f"{' and '.join(pair)}"
    )


def _members(
    adapter: LoraAdapter, subspace: SafetySubspace, correction: Method
) -> tuple[Member, ...]:
    where = str(subspace.path or "subspace")
    matches = match_layouts(adapter.modules, subspace.modules.keys(), where, SEE_LIKE)
    turned = _turned(adapter, subspace, matches)
    heads = _heads_of_tied(adapter)
    strengths = correction.own_strengths([*adapter.modules])
    _check_parameters(adapter, subspace, matches)
    return tuple(
        _member(
            name,
            module,
            matches[name],
            subspace,
            name in turned,
            _settings(name, heads.get(name), strengths, correction),
            strengths.get(name) == "drop",
        )
        for name, module in adapter.modules.items()
    )


def _settings(
    name: str,
    head: str | None,
    strengths: Mapping[str, OwnStrength],
    correction: Method,
) -> Method:
    """What a module is corrected with; head: with which it shares its factors."""
    own = strengths.get(name)
    settings = correction.for_module(own)
    if head is None:
        return settings
    if own != strengths.get(head):
        raise CsuloraError(
            f"{name}: shares its factors with {head}, so that strength_for must give both the same"
        )
    return _turned_over(name, settings)


def _turned_over(name: str, correction: Method) -> Method:
    """What does to a transposed update what `correction` does to the update."""
    if isinstance(correction, Correction):
        left, right = correction.lambda_right, correction.lambda_left
        return replace(correction, lambda_left=left, lambda_right=right)
    if correction.is_identity:
        return correction
    raise CsuloraError(
        f"{name}: shares its factors with the output head, whose inputs are its outputs, and "
        "realignment is about inputs; use method csulora, or strength 0 for both"
    )


def _heads_of_tied(adapter: LoraAdapter) -> dict[str, str]:
    """The output head of each embedding whose update is the head's turned over, as PEFT's
    `ensure_weight_tying` has it: PEFT loads the head's factors for both, so that left and right have to
    mean the same sides.

    Raises CsuloraError where the file has others for the embedding.
    """
    found: dict[str, str] = {}
    if not _ties(adapter):
        return found
    for name, module in adapter.modules.items():
        if not module.embedding:
            continue
        heads = [other for other, head in adapter.modules.items() if _may_be_tied(module, head)]
        same = [other for other in heads if _is_tied(module, adapter.modules[other])]
        if same:
            found[name] = same[0]
        elif heads:
            raise CsuloraError(
                f"{name}: ensure_weight_tying is set, with which PEFT loads the factors of {heads[0]} "
                "for it, but the file has others for it, as of a model that was trained in 16 bits; load "
                "the adapter with PEFT and save it again, or set ensure_weight_tying to false in "
                f"{FILE} if the model does not tie the two"
            )
    return found


def _ties(adapter: LoraAdapter) -> bool:
    """Whether PEFT ties embeddings and heads on loading, in a model that does: it looks for two names."""
    targets = adapter.config.get("target_modules")
    names = [str(X) for X in targets] if isinstance(targets, list) else adapter.modules
    named = any(ends_with(name, end) for name in names for end in ("embed_tokens", "lm_head"))
    return bool(adapter.config.get("ensure_weight_tying")) and named


def _may_be_tied(module: LoraModule, head: LoraModule) -> bool:
    """Whether a module's weight has the shape of an embedding's as it is stored."""
    shape = module.A.shape[1], module.B.shape[0]
    return not head.embedding and (head.B.shape[0], head.A.shape[1]) == shape


def _is_tied(module: LoraModule, head: LoraModule) -> bool:
    return torch.equal(module.A, head.B.mT) and torch.equal(module.B, head.A.mT)


def _check_parameters(
    adapter: LoraAdapter, subspace: SafetySubspace, matches: Mapping[str, str]
) -> None:
    """Raise CsuloraError for a weight of `target_parameters` whose rows are no outputs.

    PEFT adds B A to it as it is stored, whatever kind of layer it belongs to.
    """
    if not adapter.config.get("target_parameters"):
        return
    rules = Rules(FILE, adapter.config)
    for name, module in adapter.modules.items():
        if module.embedding or not any(X.endswith(".weight") for X in rules.parameters(name)):
            continue
        if subspace.modules[matches[name]].fan_in_fan_out or may_be_turned(name):
            raise CsuloraError(
                f"{name}: target_parameters names its weight, which is that of an embedding or a Conv1D "
                "layer and stored as (d_in, d_out), so that B A is its update turned over; this cannot "
                "be corrected; train it by target_modules"
            )


def _turned(adapter: LoraAdapter, subspace: SafetySubspace, matches: Mapping[str, str]) -> set[str]:
    """Modules of which U and V go into each other's place, as `fan_in_fan_out` is set and the subspace
    does not know.

    Raises CsuloraError for a square module of which nothing tells.
    """
    if not adapter.config.get("fan_in_fan_out"):
        return set()
    oblong: dict[str, bool] = {}
    square = []
    for name, module in adapter.modules.items():
        found = subspace.modules[matches[name]]
        if module.embedding or found.fan_in_fan_out or ends_with(name, "lm_head"):
            continue  # known; a head is linear everywhere
        if module.B.shape[0] == module.A.shape[1]:
            square.append(name)
        else:
            oblong[name] = _is_turned(module, found)
    # An estimate that told some to be stored that way told the others, too.
    knows = any(found.fan_in_fan_out for found in subspace.modules.values())
    stacks = by_stack(oblong)
    for name in square:
        seen = stacks.get(stack_of(name), {})
        if len(seen) == 2 or not (seen or knows):
            raise CsuloraError(cannot_be_told(f"{name}: its weight", seen, flag=True))
        oblong[name] = True in seen
    return {name for name, turned in oblong.items() if turned}


def _is_turned(module: LoraModule, found: ModuleSubspace) -> bool:
    """Whether U and V in each other's place fit an oblong update, as when the adapter knows that its
    weights are stored as (d_in, d_out) and the estimate did not."""
    return (module.A.shape[1], module.B.shape[0]) == (found.U.shape[0], found.V.shape[0])


def _member(
    name: str,
    module: LoraModule,
    target: str,
    subspace: SafetySubspace,
    turned: bool,
    correction: Method,
    dropped: bool,
) -> Member:
    found = subspace.modules[target]
    shape = (module.B.shape[0], module.A.shape[1])
    U, V = found.U, found.V
    # The singular vectors of the transposed matrix are the same two bases in the other order.
    transposed = turned or (module.embedding and not found.fan_in_fan_out)
    if transposed:
        U, V = V, U
    if (U.shape[0], V.shape[0]) != shape:
        raise CsuloraError(
            f"{subspace.path or 'subspace'}: {target} is {U.shape[0]} x {V.shape[0]}, but the adapter "
            f"updates {name} with {shape[0]} x {shape[1]}; was the subspace estimated for another model?"
        )
    return Member(name, target, transposed, module.detached(), U, V, found, correction, dropped)


def _is_free(member: Member) -> bool:
    """Whether the strength that a budget allows is for this member."""
    return member.correction.budget is not None


def _update(member: Member) -> Update:
    """A member as `csulora.method.budget` wants it."""
    B, A, U, V = (X.cpu() for X in (member.module.B, member.module.A, member.U, member.V))
    free = _is_free(member)
    return Update(B, A, U, V, member.spectrum, member.correction, free, member.dropped)
