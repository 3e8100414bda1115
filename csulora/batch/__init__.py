"""Correcting many adapters from folder to folder; one bad adapter never stops the others."""

from csulora.batch.call import Call
from csulora.batch.run import correct_many, pick_engine, stream
from csulora.batch.sources import find

__all__ = ["Call", "correct_many", "find", "pick_engine", "stream"]
