"""`csulora verify`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from csulora.batch.sources import PassedOver, folders_with, holds
from csulora.cli.output import progress, say, stdout
from csulora.errors import CsuloraError, UsageError
from csulora.files.peft_config import FILE as CONFIG
from csulora.output import REPORT, WEIGHTS
from csulora.subspace import SafetySubspace
from csulora.text import listed, one_line
from csulora.verification import Verification, verify

FORMAT = "csulora_verify/1"
FILES = (WEIGHTS, CONFIG, REPORT)


def run(arguments: argparse.Namespace) -> int:
    folders = [found for argument in arguments.folders for found in outputs_in(argument)]
    if missing := _without_output(folders, arguments):
        say(f"csulora: warning: no output here of {listed(missing)}")
    subspace = None if arguments.subspace is None else SafetySubspace.load(arguments.subspace)
    found = []
    with progress("verifying") as report:
        for folder, relative in folders:
            found.append(_verified(folder, relative, subspace, arguments))
            for problem in found[-1].problems:
                text = problem if str(folder) in problem else f"{folder}: {problem}"
                report.say(f"csulora: failed: {one_line(text)}")
            report(len(found), len(folders), folder.name)
    good = sum(one.ok for one in found)
    if arguments.json:
        result = {"format": FORMAT, "folders": [one.to_dict() for one in found]}
        print(json.dumps(result))
    else:
        console = stdout()
        for one in found:
            if one.ok:
                console.print(
                    one_line(f"{one.folder}: as written ({', '.join(one.checked)})"), soft_wrap=True
                )
        console.print(f"{good} as written, {len(found) - good} not")
    return 0 if good == len(found) else 1


def _verified(
    folder: Path, relative: str, subspace: SafetySubspace | None, arguments: argparse.Namespace
) -> Verification:
    try:
        return verify(
            folder,
            source=None if arguments.source is None else _source(arguments.source, relative),
            subspace=subspace,
            backend=arguments.backend,
            device=arguments.device,
        )
    except UsageError:
        raise
    except CsuloraError as error:  # of the source, whose output is not known to be right then
        return Verification(folder, (), (str(error),))


def _source(given: str, relative: str) -> str:
    """The adapter that an output was made of: `given` itself, or in it under the output's path."""
    below = os.path.join(given, relative)
    itself = holds(given, [CONFIG]) or not os.path.isdir(given)
    return given if itself else below


def outputs_in(argument: str) -> Iterator[tuple[Path, str]]:
    """Folders that are, or were, outputs: any of their three files marks one; with their path below.

    Raises UsageError where there are none.
    """
    if not os.path.isdir(argument):
        raise UsageError(f"{argument}: no such folder")
    if holds(argument, FILES):
        yield Path(argument), os.path.basename(os.path.abspath(argument))
        return
    passed = PassedOver([], [])
    some = False
    for path in itertools.chain(folders_with(argument, FILES, passed=passed), _linked(passed)):
        some = True
        yield Path(path), os.path.relpath(path, argument)
    if not some:
        raise UsageError(f"{argument}: holds no outputs")


def _linked(passed: PassedOver) -> Iterator[str]:
    """Links to what looks like an output: a server follows them."""
    for path in sorted(passed.links):
        if holds(path, FILES):
            yield path


def _without_output(
    folders: Sequence[tuple[Path, str]], arguments: argparse.Namespace
) -> list[str]:
    """Adapters in the folder of all sources of which no output is among those in folders of all."""
    source = arguments.source
    if source is None or not os.path.isdir(source) or holds(source, [CONFIG]):
        return []
    if any(holds(argument, FILES) for argument in arguments.folders):
        return []
    there = {relative for _, relative in folders}
    adapters = folders_with(source, [CONFIG])
    return [path for path in adapters if os.path.relpath(path, source) not in there]
