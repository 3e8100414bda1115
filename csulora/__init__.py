"""Repair the safety of LoRA adapters after training, in closed form (CSULoRA, arXiv 2605.30640)."""

from csulora import baselines, geometry, sweep
from csulora.adapter import LoraAdapter, LoraModule, Source, identify
from csulora.batch import correct_many
from csulora.correction import correct, correct_batch, decompose
from csulora.errors import ChangedError, CsuloraError, DiskFullError, ExistsError, UsageError
from csulora.estimation import estimate
from csulora.folder import correct_folder
from csulora.outcome import Outcome
from csulora.report import ModuleReport, Report, Totals
from csulora.settings import Correction, Realignment
from csulora.subspace import ModuleSubspace, Origin, SafetySubspace
from csulora.verification import Verification, verify
from csulora.version import VERSION

__version__ = VERSION

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
