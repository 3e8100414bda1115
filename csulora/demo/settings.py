"""What the demo compares: families of corrections and their strengths, and one measured row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from csulora.demo.evaluate import Metrics
from csulora.settings import Correction

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, math.inf)
# An eighth of the width: the default of 64 would span every key and value output of this model.
SUBSPACE_RANK = 16

ALIGNED = "aligned"
RAW = "raw"
SCALED = "scaled"


@dataclass(frozen=True)
class Family:
    """Corrections that attenuate the same blocks of the same subspace with one common strength."""

    key: str
    title: str
    attenuated: tuple[str, ...]
    limit: str  # what strength inf amounts to
    random_subspace: bool = False  # random directions in place of those of D: a control

    def correction(self, strength: float) -> Correction:
        """Per-direction attenuation of this family's blocks; every other block is kept."""
        blocks = ("aligned", "left", "right", "off")
        aligned, left, right, off = (strength if b in self.attenuated else 0.0 for b in blocks)
        return Correction(aligned, left, right, off)


FAMILIES = (
    Family(
        "csulora",
        "CSULoRA: keep aligned, attenuate the rest",
        ("left", "right", "off"),
        "keep only the aligned block (the hard two-sided projection)",
    ),
    Family(
        "input_side",
        "Attenuate aligned + right-partial",
        ("aligned", "right"),
        "drop everything that reads from the subspace",
    ),
    Family(
        "off_only",
        "Attenuate all but off-subspace",
        ("aligned", "left", "right"),
        "keep only the off-subspace block",
    ),
    Family(
        "random",
        "CSULoRA with a random subspace",
        ("left", "right", "off"),
        "keep only what lies in random directions",
        random_subspace=True,
    ),
)


@dataclass(frozen=True)
class Row:
    """One measured model: the aligned model, the raw adapter, a corrected one or its control.

    `family` is ALIGNED, RAW, SCALED or a family's key; `control_of` is the family whose corrected
    adapter a down-scaled one matches in norm. `norm_kept` is the update's norm over the raw one's.
    """

    family: str
    strength: float | None
    norm_kept: float
    metrics: Metrics
    control_of: str | None = None
