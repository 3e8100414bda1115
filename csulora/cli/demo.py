"""`csulora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from csulora.cli.output import stdout


def run(arguments: argparse.Namespace) -> int:
    from csulora.demo.run import run_demo

    run_demo(Path(arguments.out_dir), stdout())
    return 0
