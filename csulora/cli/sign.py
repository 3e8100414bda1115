"""`csulora sign`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from csulora.cli.output import progress, stdout
from csulora.cli.verify import outputs_in
from csulora.errors import CsuloraError, UsageError
from csulora.serving.signature import new_key, sign
from csulora.text import one_line

FORMAT = "csulora_sign/1"


def run(arguments: argparse.Namespace) -> int:
    if arguments.new_key is not None:
        return _new_key(arguments)
    if not arguments.folders:
        raise UsageError("no folders given")
    folders = [folder for argument in arguments.folders for folder, _ in outputs_in(argument)]
    signed: list[Path] = []
    failed: dict[Path, str] = {}
    with progress("signing") as report:
        for folder in folders:
            try:
                signed.append(sign(folder, arguments.key))
            except UsageError:  # of the key, for all folders alike
                raise
            except CsuloraError as error:
                failed[folder] = str(error)
                report.say(f"csulora: failed: {one_line(error)}")
            report(len(signed) + len(failed), len(folders), folder.name)
    if arguments.json:
        entries = [{"folder": str(path.parent), "signed": True} for path in signed]
        entries += [
            {"folder": str(folder), "signed": False, "error": error}
            for folder, error in failed.items()
        ]
        print(json.dumps({"format": FORMAT, "folders": entries}))
    else:
        stdout().print(f"{len(signed)} signed, {len(failed)} not")
    return 1 if failed else 0


def _new_key(arguments: argparse.Namespace) -> int:
    if arguments.folders:
        raise UsageError("--new-key makes keys and signs nothing")
    private, public = new_key(arguments.new_key)
    if arguments.json:
        keys = {"private_key": str(private), "public_key": str(public)}
        print(json.dumps({"format": FORMAT, **keys}))
    else:
        stdout().print(one_line(f"{private}: the private key, keep it"), soft_wrap=True)
        stdout().print(one_line(f"{public}: for trusted_keys"), soft_wrap=True)
    return 0
