"""The errors of a guard."""

from __future__ import annotations

from csulora.errors import CsuloraError


class RefusedError(CsuloraError):
    """An adapter that is not served. Its text says why, without the adapter's name.

    reason: a short code, for counters: "outside" (a name that leaves the folders), "missing", "pickle",
        "not lora" (tensors that are no update which can be corrected), "source" (files that cannot be
        read as an adapter), "subspace" (that of another model), "rank", "rank error" (of form same),
        "not corrected", "unproven" (says that it was corrected), "damaged" (an entry of the cache),
        "changed" (its source, since), "cache" (which cannot take it), "unforeseen".
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def plain(self) -> RefusedError:
        """The same without a traceback: what is kept, and what is raised of it."""
        return RefusedError(self.reason, str(self))


class CacheError(RefusedError):
    """The cache cannot be used, or cannot take an entry: nothing about the adapter is the matter."""

    def __init__(self, text: str) -> None:
        super().__init__("cache", text)


def told(error: Exception) -> dict[str, str]:
    """What the log says of an error."""
    text = str(error) or type(error).__name__
    return {"reason": getattr(error, "reason", "unforeseen"), "text": text}
