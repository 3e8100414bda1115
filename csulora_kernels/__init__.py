"""CSULoRA on packed adapters: three kernel launches for all modules of all adapters of a batch.

Imports torch alone; Triton is imported by the first call that needs it.
"""

from csulora_kernels.api import Result, correct, project, recompose, solve
from csulora_kernels.displacement import displacement_product
from csulora_kernels.layout import Basis, Table, empty_like, pack, pack_basis
from csulora_kernels.settings import FORMS, GRANULARITIES, Form, Granularity, Penalties, Shares
from csulora_kernels.tiles import MAX_RANK, Tiles, choose, padded_directions, padded_rank
from csulora_kernels.workspace import (
    Cores,
    Projection,
    Shift,
    Spectrum,
    Workspace,
    unavailable,
    workspace,
)

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
    "Shares",
    "Shift",
    "Spectrum",
    "Table",
    "Tiles",
    "Workspace",
    "choose",
    "correct",
    "displacement_product",
    "empty_like",
    "pack",
    "pack_basis",
    "padded_directions",
    "padded_rank",
    "project",
    "recompose",
    "solve",
    "unavailable",
    "workspace",
]
