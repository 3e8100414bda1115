"""Where a command prints: results on stdout, progress on stderr, a bar or plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from csulora.text import one_line

# Without a terminal nothing wraps or gets cut: tables in a log are as wide as their content.
LOG_WIDTH = 200
LOG_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """Call it with (done, total, name); `say` prints a line on stderr without spoiling a bar."""

    report: Callable[[int, int, str], None]
    say: Callable[[str], None]

    def __call__(self, done: int, total: int, name: str) -> None:
        self.report(done, total, name)


def stdout() -> Console:
    """The console for results."""
    out = sys.stdout
    width = None if out.isatty() else LOG_WIDTH
    return Console(file=out, width=width, highlight=False, markup=False)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, otherwise a line every few seconds."""
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(what, total=None)
            yield Progress(
                lambda done, total, name: bar.update(
                    task, completed=done, total=total, description=f"{what} {one_line(name)}"
                ),
                lambda line: bar.console.print(line, soft_wrap=True, markup=False, highlight=False),
            )
        return
    last = -LOG_SECONDS

    def write(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LOG_SECONDS:
            last = now
            say(f"csulora: {what} {done}/{total} {one_line(name)}")

    yield Progress(write, say)


def say(line: str) -> None:
    """A line on stderr, there at once."""
    print(line, file=sys.stderr, flush=True)


def _bar() -> Bar:
    return Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # results stay on stdout
    )
