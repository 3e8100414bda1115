"""Repair the safety of LoRA adapters after training, in closed form (CSULoRA, arXiv 2605.30640).

What corrects one adapter in memory is imported here; what works on checkpoints, folders, batches and
sweeps is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from csulora.adapter import LoraAdapter, LoraModule, Source, identify
from csulora.correction import correct, correct_batch, decompose
from csulora.errors import ChangedError, CsuloraError, DiskFullError, ExistsError, UsageError
from csulora.outcome import Outcome
from csulora.report import ModuleReport, Report, Totals
from csulora.settings import Correction, Realignment
from csulora.subspace import ModuleSubspace, Origin, SafetySubspace
from csulora.version import VERSION

if TYPE_CHECKING:  # as _LATER has them, for type checkers and editors
    from csulora import baselines, geometry, sweep
    from csulora.batch import correct_many
    from csulora.estimation import estimate
    from csulora.folder import correct_folder
    from csulora.verification import Verification, verify

__version__ = VERSION

_LATER = {  # a public name: the module it comes from, or is
    "Verification": "csulora.verification",
    "baselines": "csulora.baselines",
    "correct_folder": "csulora.folder",
    "correct_many": "csulora.batch",
    "estimate": "csulora.estimation",
    "geometry": "csulora.geometry",
    "sweep": "csulora.sweep",
    "verify": "csulora.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value  # the next look-up finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LATER.keys())


__all__ = [
    "ChangedError",
    "Correction",
    "CsuloraError",
    "DiskFullError",
    "ExistsError",
    "LoraAdapter",
    "LoraModule",
    "ModuleReport",
    "ModuleSubspace",
    "Origin",
    "Outcome",
    "Realignment",
    "Report",
    "SafetySubspace",
    "Source",
    "Totals",
    "UsageError",
    "Verification",
    "baselines",
    "correct",
    "correct_batch",
    "correct_folder",
    "correct_many",
    "decompose",
    "estimate",
    "geometry",
    "identify",
    "sweep",
    "verify",
]
