"""What is to be done to each module of an adapter, and the form in which the result is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from csulora import packed, reference
from csulora.adapter import LoraAdapter, LoraModule, listed
from csulora.errors import CsuloraError
from csulora.factors import Place, balance, store
from csulora.names import match_modules
from csulora.peft_config import alpha_for_rank, portable_config
from csulora.settings import Correction
from csulora.subspace import ModuleSubspace, SafetySubspace

# Amplifications up to which float32 arithmetic keeps to 1e-5 and a half type to 2 of its ulp.
COMPUTING_LIMIT = 4.0
STORING_LIMIT = 3.0


class Task(NamedTuple):
    """One module of an adapter and its bases, in the orientation of its update."""

    name: str
    target: str  # its name in the subspace
    module: LoraModule
    U: Tensor  # (d_out, k)
    V: Tensor  # (d_in, k)

    def update(self, subspace: SafetySubspace) -> packed.Update:
        transposed = self.U is not subspace.modules[self.target].U
        return packed.Update(self.name, self.target, transposed, self.module.B, self.module.A)


class Form(NamedTuple):
    """The form in which the result is wanted: everything about it but its values."""

    source: LoraAdapter
    correction: Correction
    dtype: torch.dtype | None
    portable_rank: int | None

    @classmethod
    def of(
        cls, source: LoraAdapter, correction: Correction, dtype: torch.dtype | None, portable: bool
    ) -> Form:
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
        self, group: list[Task], held: Tensor, amplification: reference.Amplification
    ) -> Tensor:
        """Which modules of a group float32 would spoil, or their type would in an unbalanced form."""
        if self.correction.is_identity:
            return ~held
        types = (torch.float16, torch.bfloat16)
        half = [
            self.dtype in types or task.module.B.dtype in types or task.module.A.dtype in types
            for task in group
        ]
        limit = torch.where(torch.tensor(half, device=held.device), STORING_LIMIT, COMPUTING_LIMIT)
        return ~held | (amplification.computing > COMPUTING_LIMIT) | (amplification.storing > limit)

    def working_type(self) -> torch.dtype:
        """Of the factors that kernels read and write: bfloat16 only where nothing is done to it later.

        float16 goes through float32, as its few exponents have to be evened out before rounding.
        """
        found = {X.dtype for m in self.source.modules.values() for X in (m.B, m.A)}
        plain = self.portable_rank is None and self.dtype in (None, torch.bfloat16)
        return torch.bfloat16 if plain and found == {torch.bfloat16} else torch.float32

    def place(self, task: Task) -> Place:
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


def tasks_of(adapter: LoraAdapter, subspace: SafetySubspace) -> list[Task]:
    """The modules of an adapter with their bases; CsuloraError where the two do not fit together."""
    where = str(subspace.path or "subspace")
    matches = match_modules(adapter.modules, subspace.modules.keys(), where)
    flipped = bool(adapter.config.get("fan_in_fan_out")) and any(
        _is_flipped(module, subspace.modules[matches[name]])
        for name, module in adapter.modules.items()
    )
    return [
        Task(
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


def groups_of(tasks: list[Task]) -> Iterator[list[Task]]:
    """Modules whose r x r systems can be solved in one call: equal rank and subspace rank."""
    groups: dict[tuple[int, int], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.module.rank, task.U.shape[1]), []).append(task)
    yield from groups.values()


def finish(task: Task, B: Tensor, A: Tensor, form: Form, into: tuple[Tensor, Tensor]) -> LoraModule:
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
