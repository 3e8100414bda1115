"""CSULoRA on packed adapters: three kernel launches for all modules of all adapters of a batch.

Every name that computes is imported when it is first asked for, and torch with it; Triton by the first call
that needs it.
"""

from typing import TYPE_CHECKING

from csulora_kernels.later import later
from csulora_kernels.settings import FORMS, GRANULARITIES, Form, Granularity, Penalties, Shares

if TYPE_CHECKING:  # as _LATER has them, for type checkers and editors
    from csulora_kernels.api import Result, correct, project, recompose, solve
    from csulora_kernels.buffers import (
        Cores,
        Projection,
        Shift,
        Spectrum,
        Workspace,
        unavailable,
        workspace,
    )
    from csulora_kernels.displacement import displacement_product
    from csulora_kernels.layout import Basis, Table, empty_like, pack, pack_basis
    from csulora_kernels.tiles import MAX_RANK, Tiles, choose, padded_directions, padded_rank

_LATER = {  # a public name: the module it comes from
    "MAX_RANK": "csulora_kernels.tiles",
    "Basis": "csulora_kernels.layout",
    "Cores": "csulora_kernels.buffers",
    "Projection": "csulora_kernels.buffers",
    "Result": "csulora_kernels.api",
    "Shift": "csulora_kernels.buffers",
    "Spectrum": "csulora_kernels.buffers",
    "Table": "csulora_kernels.layout",
    "Tiles": "csulora_kernels.tiles",
    "Workspace": "csulora_kernels.buffers",
    "choose": "csulora_kernels.tiles",
    "correct": "csulora_kernels.api",
    "displacement_product": "csulora_kernels.displacement",
    "empty_like": "csulora_kernels.layout",
    "pack": "csulora_kernels.layout",
    "pack_basis": "csulora_kernels.layout",
    "padded_directions": "csulora_kernels.tiles",
    "padded_rank": "csulora_kernels.tiles",
    "project": "csulora_kernels.api",
    "recompose": "csulora_kernels.api",
    "solve": "csulora_kernels.api",
    "unavailable": "csulora_kernels.buffers",
    "workspace": "csulora_kernels.buffers",
}

__getattr__, __dir__ = later(__name__, _LATER)

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
