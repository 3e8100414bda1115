"""CSULoRA on packed adapters: three kernel launches for all modules of all adapters of a batch.

Imports torch alone; Triton is imported by the first call that needs it.
"""

from csulora_kernels.api import (
    Cores,
    Projection,
    Result,
    Workspace,
    correct,
    project,
    recompose,
    solve,
    unavailable,
    workspace,
)
from csulora_kernels.displacement import displacement_product
from csulora_kernels.layout import (
    FORMS,
    GRANULARITIES,
    Basis,
    Form,
    Granularity,
    Penalties,
    Table,
    empty_like,
    pack,
    pack_basis,
)
from csulora_kernels.tiles import MAX_RANK, Tiles, choose

__all__ = [
    "FORMS",
    "GRANULARITIES",
    "MAX_RANK",
    "Basis",
    "Cores",
    "Form",
    "Granularity",
    "Penalties",
    "Projection",
    "Result",
    "Table",
    "Tiles",
    "Workspace",
    "choose",
    "correct",
    "displacement_product",
    "empty_like",
    "pack",
    "pack_basis",
    "project",
    "recompose",
    "solve",
    "unavailable",
    "workspace",
]
