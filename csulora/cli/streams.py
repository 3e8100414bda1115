"""Standard streams that never raise: a run goes on without a reader, and tells of it by its exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


class Stream(io.TextIOBase):
    """A text stream in place of another. What it cannot write is dropped; `failed` says why.

    Characters that its encoding lacks, lone surrogates among them, are written as `\\udc80`.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failed: str | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        plain = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        if self._stream is None:
            self.failed = "closed"
        self._attempt(lambda stream: stream.write(plain))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self.failed is not None or self._stream is None:
            return
        try:
            action(self._stream)
        except RuntimeError:
            pass  # a signal's message in the middle of another one
        except (OSError, ValueError) as error:
            self.failed = getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Replace stdout and stderr by a `Stream` each.

    Results alone go to stdout: what native code prints there goes to stderr. Descriptors that were
    closed are taken, so that no file gets their number and then what is printed.
    """
    for name, number in _NUMBERS.items():
        if getattr(sys, name) is None:
            _occupy(number)
    before = sys.stdout, sys.stderr
    with _own(sys.stdout, 1) as out, _own(sys.stderr, 2) as err, _turned(out is not before[0]):
        sys.stdout, sys.stderr = results, messages = Stream(out), Stream(err)
        try:
            yield results, messages
        finally:
            for stream in (results, messages):
                stream.flush()
            sys.stdout, sys.stderr = before


def _occupy(number: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextlib.contextmanager
def _own(stream: TextIO | None, number: int) -> Iterator[TextIO | None]:
    """A process's own descriptor as a stream that is closed here, so that the interpreter has nothing
    left to write, and to fail at, when it ends. Any other stream as it is."""
    own = _duplicate(stream, number)
    try:
        yield stream if own is None else own
    finally:
        with contextlib.suppress(OSError):
            if own is not None:
                own.close()


def _duplicate(stream: TextIO | None, number: int) -> TextIO | None:
    with contextlib.suppress(OSError, ValueError):
        if stream is not None and stream.fileno() == number:
            stream.flush()
            buffering = 1 if number == _NUMBERS["stderr"] else -1  # by lines
            return os.fdopen(os.dup(number), "w", buffering, stream.encoding)
    return None


@contextlib.contextmanager
def _turned(turn: bool) -> Iterator[None]:
    """Descriptor 1 leads to stderr."""
    if not turn:
        yield
        return
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
