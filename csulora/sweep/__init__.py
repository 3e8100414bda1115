"""Many settings beside each other: their energies, and what an evaluation command says of them."""

from csulora.sweep.energies import Energies
from csulora.sweep.grid import STRENGTHS, Family, Setting, families

__all__ = ["STRENGTHS", "Energies", "Family", "Setting", "families"]
