"""Repair the safety of LoRA adapters after training, in closed form (CSULoRA, arXiv 2605.30640)."""

from csulora.adapter import LoraAdapter, LoraModule
from csulora.batch import Outcome, correct_many
from csulora.correction import correct, decompose
from csulora.errors import CsuloraError, UsageError
from csulora.report import ModuleReport, Report
from csulora.settings import Correction
from csulora.subspace import ModuleSubspace, SafetySubspace

__version__ = "0.1.0"

__all__ = [
    "Correction",
    "CsuloraError",
    "LoraAdapter",
    "LoraModule",
    "ModuleReport",
    "ModuleSubspace",
    "Outcome",
    "Report",
    "SafetySubspace",
    "UsageError",
    "correct",
    "correct_many",
    "decompose",
]
