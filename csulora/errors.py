"""Errors that csulora raises on purpose. Each message names the file, the tensor and the remedy."""


class CsuloraError(Exception):
    """Something about the input or the request is wrong; the message is one readable line."""


class UsageError(CsuloraError):
    """The call itself is wrong: nothing was started."""


class WriteError(CsuloraError):
    """What should be written could not be, for a reason that lies where it should go."""


class DiskFullError(WriteError):
    """No space, or no quota, is left where an output should go."""


class ExistsError(CsuloraError):
    """Something is already where an output should go."""


class ChangedError(CsuloraError):
    """An output is there, but of another source, subspace or settings than asked for."""
