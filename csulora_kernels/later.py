"""Public names that come when they are first asked for, so that importing a package imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def later(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package (PEP 562). homes: of each name the module that it is in, or is.

    Other modules of the package are attributes as well, as they are once anything has imported them.
    """

    def find(name: str) -> Any:
        own = f"{package}.{name}"
        home = homes.get(name, own)
        if home == own and (name.startswith("_") or importlib.util.find_spec(own) is None):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home)
        if home == own:
            return module
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next look-up comes without this function
        return value

    def names() -> list[str]:
        return sorted(vars(sys.modules[package]).keys() | homes.keys())

    return find, names
