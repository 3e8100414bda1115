"""Running an evaluation command on an adapter folder: no shell, an end by time, nothing left running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from csulora.errors import UsageError
from csulora.sweep.metrics import MetricsError, read_metrics
from csulora.text import one_line

PLACE = "{adapter}"
TAIL = 1 << 18  # bytes of an output that are looked at, its end
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


class EvaluationError(Exception):
    """A command that did not tell what an adapter is worth; the message is one readable line."""


class StoppedError(Exception):
    """The sweep ends: the command was ended with it, or not started."""


@dataclass(frozen=True)
class Command:
    """A command line in which `{adapter}` stands for an adapter folder.

    Raises UsageError for one that has no such place, or quotes that do not end.
    """

    line: str

    def __post_init__(self) -> None:
        if not any(PLACE in word for word in self.words()):
            raise UsageError(f"the evaluation command has no {PLACE}: {self.line!r}")

    def words(self) -> list[str]:
        """As a shell would split them."""
        try:
            return shlex.split(self.line)
        except ValueError as error:
            raise UsageError(f"the evaluation command cannot be split: {error}") from None

    def on(self, adapter: Path) -> list[str]:
        """The words for one adapter."""
        return [word.replace(PLACE, str(adapter)) for word in self.words()]


class Runner:
    """Runs commands from any number of threads; `stop` ends all of them."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def metrics(
        self, command: Command, adapter: Path, scratch: Path, needed: tuple[str, ...]
    ) -> dict[str, float]:
        """What the command prints of the adapter. Its output goes through files without a name on the
        disk of `scratch`, so that nothing it leaves running can hold a reader back.

        Raises EvaluationError, StoppedError.
        """
        with TemporaryFile(dir=scratch) as out, TemporaryFile(dir=scratch) as err:
            code = self._run(command.on(adapter), out, err)
            said = _last_line(_tail(err))
            if code is None:
                raise EvaluationError(_with(f"no end after {self._timeout:g} seconds", said))
            if code:
                how = f"exit code {code}" if code > 0 else _signal(-code)
                raise EvaluationError(_with(how, said))
            try:
                return read_metrics(_tail(out), needed)
            except MetricsError as error:
                raise EvaluationError(_with(str(error), said)) from None

    def stop(self) -> None:
        """End whatever runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGKILL)

    def _run(self, words: list[str], out: IO[bytes], err: IO[bytes]) -> int | None:
        """The exit code, None where the time was over."""
        process = self._start(words, out, err)
        try:
            return process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            # What it started and left behind, too.
            _signal_group(process, signal.SIGKILL)
            process.wait()
            with self._lock:
                self._running.discard(process)
                stopped = self._stopped
            if stopped:
                raise StoppedError

    def _start(self, words: list[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise StoppedError
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise EvaluationError(f"{words[0]}: cannot be run ({reason})") from None
            self._running.add(process)
            return process


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, number)  # its own session: the group bears its number


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"ended by signal {number}"


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else ""


def _with(what: str, said: str) -> str:
    return f"{what}; it said last: {said}" if said else what
