"""Signals that end a command: Ctrl-C, SIGTERM, SIGHUP. One that was ignored at the start stays so."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and others send one signal to a process and to its group: two in a row are one.
TOGETHER = 0.1  # seconds


class Ended(KeyboardInterrupt):
    """The process was told to end, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __str__(self) -> str:
        return _name(self.number)


class Interruption(threading.Event):
    """Set once a first signal has come; `number` is the last one."""

    number: int = signal.SIGINT


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Each signal that ends the process raises Ended in the main thread."""

    def on_signal(number: int) -> None:
        raise Ended(number)

    with _handled(on_signal):
        yield


@contextlib.contextmanager
def gentle(interruption: Interruption, say: Callable[[str], None]) -> Iterator[None]:
    """The first signal only sets the event; the next one raises Ended."""

    def on_signal(number: int) -> None:
        interruption.number = number
        if interruption.is_set():
            raise Ended(number)
        interruption.set()
        say(f"csulora: {_name(number)}: finishing what is in memory; once more to drop it")

    with _handled(on_signal):
        yield


@contextlib.contextmanager
def _handled(on_signal: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last: float | None = None

    def handle(number: int, _frame: object) -> None:
        nonlocal last
        now, before = time.monotonic(), last
        last = now
        if before is None or now - before > TOGETHER:
            on_signal(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    kept = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in kept:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _name(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else signal.Signals(number).name
