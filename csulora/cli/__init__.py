"""The command line: arguments in, calls of the library, results on stdout, progress on stderr.

Exit codes: 0 all done; 1 some adapters failed, each named, every other one written; 2 the call itself
is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from csulora.cli import options
from csulora.errors import CsuloraError
from csulora.text import one_line

EXAMPLES = """examples:
  csulora demo
  csulora estimate base/ aligned/ --out subspace.safetensors
  csulora inspect my-adapter --subspace subspace.safetensors
  csulora correct my-adapter --subspace subspace.safetensors --out-dir corrected"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except CsuloraError as error:
        print(f"csulora: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("csulora: interrupted; finished outputs are complete", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"csulora: error: {one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function from arguments to an exit code."""
    import csulora

    parser = argparse.ArgumentParser(
        prog="csulora",
        description="Repair the safety of LoRA adapters after training, in closed form.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"csulora {csulora.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    options.add_estimate(commands)
    options.add_correct(commands)
    options.add_inspect(commands)
    options.add_verify(commands)
    options.add_demo(commands)
    return parser
