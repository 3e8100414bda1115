"""What the demo compares: methods at two subspace sizes, their strengths, and one measured row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from csulora.demo.evaluate import Metrics
from csulora.settings import Correction, Method, Realignment

# An eighth of the width: the default of 64 would span every key and value output of this model.
SUBSPACE_RANK = 16
SMALL_RANK = 2

ALIGNED = "aligned"
RAW = "raw"

SCALED_NORM = "scaled_norm"
SCALED_CHANGE = "scaled_change"
ADDED_BACK = "added_back"
CONTROLS = {
    SCALED_NORM: "Raw adapter scaled to equal norm (control)",
    SCALED_CHANGE: "Raw adapter scaled to equal change (control)",
    ADDED_BACK: "D added back to equal change, RESTA (control)",
}


@dataclass(frozen=True)
class Family:
    """One method with one subspace, at several strengths."""

    key: str
    name: str
    whose: str
    settings: Method
    k: int
    strengths: tuple[float, ...]
    limit: str  # what strength inf amounts to
    random_subspace: bool = False  # random directions in place of those of D: a control itself

    @property
    def title(self) -> str:
        """With whose method it is, for tables and the picture."""
        if self.random_subspace:
            return f"{self.name}, random directions (control)"
        return f"{self.name} ({self.whose}), k {self.k}"


def _csulora(key: str, k: int, random_subspace: bool = False) -> Family:
    limit = "the aligned block alone (the hard two-sided projection)"
    strengths = (3.0, 10.0, 30.0, math.inf)
    return Family(key, "CSULoRA", "the paper's", Correction(), k, strengths, limit, random_subspace)


def _realign(key: str, k: int, random_subspace: bool = False) -> Family:
    limit = "all of each direction above the noise edge"
    strengths = (1.0, 2.0, 3.0, 5.0, math.inf)
    return Family(key, "Realignment", "ours", Realignment(), k, strengths, limit, random_subspace)


FAMILIES = (
    _csulora("csulora_16", SUBSPACE_RANK),
    _csulora("csulora_2", SMALL_RANK),
    _realign("realign_16", SUBSPACE_RANK),
    _realign("realign_2", SMALL_RANK),
    _csulora("csulora_random", SUBSPACE_RANK, random_subspace=True),
    _realign("realign_random", SUBSPACE_RANK, random_subspace=True),
)
METHODS = tuple(family for family in FAMILIES if not family.random_subspace)


@dataclass(frozen=True)
class Row:
    """One measured model: the aligned model, the raw adapter, a corrected one or a control of one.

    `family` is ALIGNED, RAW or a family's key. `control` is None or which of CONTROLS of that family's
    adapter of this strength it is. `norm_kept` is the update's norm over the raw one's, `change` the norm
    of the difference over the raw one's norm.
    """

    family: str
    strength: float | None
    norm_kept: float
    change: float
    metrics: Metrics
    control: str | None = None
