"""Repair the safety of LoRA adapters after training, in closed form (CSULoRA, arXiv 2605.30640).

What computes or reads files is imported when it is first asked for, and torch with it.
"""

from typing import TYPE_CHECKING

from csulora.errors import ChangedError, CsuloraError, DiskFullError, ExistsError, UsageError
from csulora.settings import Correction, Realignment
from csulora.version import VERSION
from csulora_kernels.later import later

if TYPE_CHECKING:  # as _LATER has them, for type checkers and editors
    from csulora import baselines, geometry, sweep
    from csulora.adapter import LoraAdapter, LoraModule, Source, identify
    from csulora.batch import correct_many
    from csulora.correction import correct, correct_batch, decompose
    from csulora.estimation import estimate
    from csulora.folder import correct_folder
    from csulora.outcome import Outcome
    from csulora.report import ModuleReport, Report, Totals
    from csulora.subspace import ModuleSubspace, Origin, SafetySubspace
    from csulora.verification import Verification, verify

__version__ = VERSION

_LATER = {  # a public name: the module it comes from, or is
    "LoraAdapter": "csulora.adapter",
    "LoraModule": "csulora.adapter",
    "ModuleReport": "csulora.report",
    "ModuleSubspace": "csulora.subspace",
    "Origin": "csulora.subspace",
    "Outcome": "csulora.outcome",
    "Report": "csulora.report",
    "SafetySubspace": "csulora.subspace",
    "Source": "csulora.adapter",
    "Totals": "csulora.report",
    "Verification": "csulora.verification",
    "baselines": "csulora.baselines",
    "correct": "csulora.correction",
    "correct_batch": "csulora.correction",
    "correct_folder": "csulora.folder",
    "correct_many": "csulora.batch",
    "decompose": "csulora.correction",
    "estimate": "csulora.estimation",
    "geometry": "csulora.geometry",
    "identify": "csulora.adapter",
    "sweep": "csulora.sweep",
    "verify": "csulora.verification",
}

__getattr__, __dir__ = later(__name__, _LATER)

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
