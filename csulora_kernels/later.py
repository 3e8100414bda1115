"""Public names that come when they are first asked for, so that importing a package imports no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def later(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562). homes: of each name the module that it is in, or is.

    These modules are attributes as well, as they are once anything has imported them.
    """
    modules = {home.removeprefix(f"{package}."): home for home in homes.values()}

    def find(name: str) -> Any:
        home = homes.get(name, modules.get(name))
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home)
        if name in modules:
            return module
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next look-up comes without this function
        return value

    return find
