"""Correct an adapter of a PEFT model in memory: `correct_model`, and `repair` from two checkpoints."""

from csulora.integrations.peft.correct import correct_model, repair

__all__ = ["correct_model", "repair"]
