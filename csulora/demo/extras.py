"""The optional packages of the demo."""

from __future__ import annotations

from importlib import import_module

from csulora.errors import CsuloraError


def require() -> None:
    """Raise one clear line if a package of `csulora[demo]` is missing."""
    for package in ("transformers", "peft", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise CsuloraError(
                f"the demo needs {package}, which is not here ({error}); "
                "install it with: pip install 'csulora[demo]'"
            ) from error
