"""Where a command prints: results on stdout, progress on stderr, a bar or plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from csulora.cli import one_line

# Without a terminal nothing wraps or gets cut: tables in a log are as wide as their content.
LOG_WIDTH = 200
LOG_SECONDS = 5.0

Report = Callable[[int, int, str], None]


def stdout() -> Console:
    """The console for results."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False, markup=False)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Report]:
    """A function to call with (done, total, name): a bar on a terminal, a line every few seconds else."""
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, name: bar.update(
                task, completed=done, total=total, description=f"{what} {one_line(name)}"
            )
        return
    last = -LOG_SECONDS

    def write(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LOG_SECONDS:
            last = now
            line = f"csulora: {what} {done}/{total} {one_line(name)}"
            print(line, file=sys.stderr, flush=True)

    yield write


def _bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
