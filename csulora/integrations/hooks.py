"""Functions of another program that are put in place of its own, if they are what they are taken for."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csulora.errors import CsuloraError
from csulora.text import one_line

Function = Callable[..., Any]


@dataclass(frozen=True)
class Hook:
    """A function that is to be wrapped.

    module, name: where it is found; the name may go through a class, as in "LLM.generate".
    parameters: its parameters' names, in order, with `self`.
    waits: whether it is a coroutine.
    among: it may have others besides them, which the wrapper hands on as they come.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    waits: bool = False
    among: bool = False

    def wrap(self, wrapper: Callable[[Function], Function]) -> None:
        """Put wrapper(function) in the function's place.

        Raises CsuloraError, one line, if the function is not there or takes other arguments.
        """
        owner, name, function = self._found()
        setattr(owner, name, functools.wraps(function)(wrapper(function)))

    def function(self) -> Function:
        """The function as it is, where it is wrapped by others or only called. Raises as `wrap`."""
        return self._found()[2]

    def _found(self) -> tuple[Any, str, Function]:
        *outer, name = self.name.split(".")
        try:
            owner = functools.reduce(getattr, outer, importlib.import_module(self.module))
            function = getattr(owner, name)
            parameters = tuple(inspect.signature(function).parameters)
        except Exception as error:  # a module of another program may fail in any way
            raise self._unknown(f"cannot be had ({error})") from error
        if not self._fits(parameters):
            raise self._unknown(f"takes ({', '.join(parameters)})")
        if inspect.iscoroutinefunction(function) is not self.waits:
            raise self._unknown(f"is {'no' if self.waits else 'a'} coroutine")
        return owner, name, function

    def _fits(self, parameters: tuple[str, ...]) -> bool:
        if self.among:
            return set(self.parameters) <= set(parameters)
        return parameters == self.parameters

    def _unknown(self, what: str) -> CsuloraError:
        return CsuloraError(
            one_line(
                f"cannot guard this server: {self.module}.{self.name} {what}, "
                f"and not ({', '.join(self.parameters)}) as in the supported versions"
            )
        )
