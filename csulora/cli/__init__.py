"""The command line: arguments in, calls of the library, results on stdout, progress on stderr.

Exit codes: 0 all done; 1 some adapters failed, each named, every other one written; 2 the call itself
is wrong, or what nobody foresaw; 128 and its number for a signal.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from csulora.cli import options
from csulora.cli.signals import Ended, raised
from csulora.cli.streams import standard_streams
from csulora.errors import CsuloraError
from csulora.text import one_line
from csulora.version import VERSION

TRACEBACK = "CSULORA_TRACEBACK"  # environment variable: set, errors come with their traceback
EXAMPLES = """examples:
  csulora demo
  csulora estimate base/ aligned/ --out subspace.safetensors
  csulora inspect my-adapter --subspace subspace.safetensors
  csulora correct my-adapter --subspace subspace.safetensors --out-dir corrected"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with standard_streams() as (results, _):
        try:
            with raised():
                code = _run(argv)
        except KeyboardInterrupt as stop:
            code = _ended(stop)
        results.flush()
        if results.failed is not None:
            _complain(f"standard output: cannot be written ({results.failed})")
            code = code or 2
        return code


def _run(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace()
    try:
        build_parser().parse_args(argv, arguments)
        return arguments.run(arguments)
    except SystemExit as stop:  # argparse: a malformed call, --help, --version
        return int(stop.code or 0)
    except CsuloraError as error:
        _complain(str(error))
    except Exception as error:
        _complain(_unforeseen(error, arguments))
    return 2


def _ended(stop: KeyboardInterrupt) -> int:
    ended = stop if isinstance(stop, Ended) else Ended(signal.SIGINT)
    print(f"csulora: {ended}; finished outputs are complete", file=sys.stderr)
    return 128 + ended.number


def _complain(text: str) -> None:
    """One line on stderr; before it, where TRACEBACK is set, where in the code it came from."""
    if os.environ.get(TRACEBACK) and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"csulora: error: {one_line(text)}", file=sys.stderr)


def _unforeseen(error: Exception, arguments: argparse.Namespace) -> str:
    """What nobody foresaw, with the file it concerns: its own, or those that the command reads."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    inputs = [getattr(arguments, name, None) for name in ("base", "aligned", "adapter", "subspace")]
    inputs += getattr(arguments, "folders", [])
    files = ", ".join(name for name in inputs if name) or "csulora"
    text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return f"{files}: {text} ({TRACEBACK}=1 shows where)"


class _Parser(argparse.ArgumentParser):
    """What is wrong with a call is one line, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"csulora: error: {one_line(message)} ({self.prog} --help tells more)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function from arguments to an exit code."""
    parser = _Parser(
        prog="csulora",
        description="Repair the safety of LoRA adapters after training, in closed form.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"csulora {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    options.add_estimate(commands)
    options.add_correct(commands)
    options.add_inspect(commands)
    options.add_sweep(commands)
    options.add_verify(commands)
    options.add_sign(commands)
    options.add_serve_check(commands)
    options.add_prewarm(commands)
    options.add_demo(commands)
    return parser
