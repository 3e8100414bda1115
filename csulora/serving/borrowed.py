"""A cache to try things with, which has what another one holds."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from csulora.serving.cache import Cache
from csulora.serving.record import Record


class BorrowedCache(Cache):
    """Entries of another cache, copied when they are asked for.

    other: the folder of that cache, which is only read: nothing in it is made, healed, held or removed.
    """

    def __init__(self, root: Path, other: Path) -> None:
        super().__init__(root, None)
        self._other = other
        self._asked: set[str] = set()

    def find(self, key: str) -> Record | None:
        self._borrow(key)
        return super().find(key)

    def remembered(self, key: str) -> Record | None:
        self._borrow(key)
        return super().remembered(key)

    def _borrow(self, key: str) -> None:
        if key in self._asked:
            return
        self._asked.add(key)
        try:
            shutil.copytree(self._other / key, self.folder(key), symlinks=True)
        except FileNotFoundError:
            return  # a start removes a record without its folder
        except OSError:
            pass  # what was copied of it shows that it is damaged
        with contextlib.suppress(OSError):
            shutil.copy2(self._other / f"{key}.json", self.root)
