"""`csulora serve-check`."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

from rich.table import Table

from csulora.cli.output import progress, say, stdout
from csulora.cli.served_adapters import served_adapters
from csulora.errors import UsageError
from csulora.serving.audit import silent
from csulora.serving.canary import ask
from csulora.serving.check import Finding, check_folder, server_config, smallest
from csulora.serving.config import ServingConfig, named
from csulora.serving.forms import MAX_RANKS
from csulora.serving.guard import Guard
from csulora.subspace import SafetySubspace
from csulora.text import one_line

FORMAT = "csulora_serve_check/1"


def run(arguments: argparse.Namespace) -> int:
    return _folders(arguments) if arguments.url is None else _server(arguments)


def _server(arguments: argparse.Namespace) -> int:
    if arguments.folders or arguments.config or arguments.max_lora_rank is not None:
        raise UsageError(
            "--url asks a running server; folders, --config and --max-lora-rank are for the other check"
        )
    if not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise UsageError(f"--timeout must be a number of seconds above 0, not {arguments.timeout}")
    probe = ask(
        arguments.url,
        arguments.stack,
        api_key=_key(arguments.api_key_env),
        folder=arguments.canary_dir,
        timeout=arguments.timeout,
    )
    if arguments.json:
        print(json.dumps({"format": FORMAT, **probe.to_dict()}))
    else:
        stdout().print(one_line(f"{probe.url}: {probe.text}"), soft_wrap=True)
    return 0 if probe.ok else 1


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UsageError(f"--api-key-env: {variable} is not set")
    return key


def _folders(arguments: argparse.Namespace) -> int:
    for option in ("api_key_env", "canary_dir"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for --url")
    given = named(arguments.config)
    config = server_config(given, arguments.stack)
    max_rank = _max_rank(arguments.max_lora_rank, arguments.stack)
    folders = _adapters(arguments.folders, config)
    if given.mode != config.mode:
        say(f"csulora: mode is {given.mode}; this is what {config.mode} would do")
    Guard(config).check_start()
    subspace = SafetySubspace.load(config.subspace)
    findings: list[Finding] = []
    with silent(), progress("checking") as report:
        for folder in folders:
            found = check_folder(folder, subspace, config, stack=arguments.stack, max_rank=max_rank)
            findings.append(found)
            if not found.served:
                report.say(f"csulora: refused: {one_line(_named(found))}")
            for warning in found.warnings:
                report.say(f"csulora: warning: {one_line(f'{folder}: {warning}')}")
            report(len(findings), len(folders), folder.name)
    _show(arguments, findings)
    return 0 if all(one.served for one in findings) else 1


def _max_rank(given: int | None, stack: str) -> int | None:
    if given is None:
        return None
    if stack == "vllm" and given not in MAX_RANKS:
        known = ", ".join(map(str, MAX_RANKS))
        raise UsageError(f"--max-lora-rank of vLLM is one of {known}, not {given}")
    if given < 1:
        raise UsageError(f"--max-lora-rank must be above 0, not {given}")
    return given


def _adapters(given: list[str], config: ServingConfig) -> list[Path]:
    """The adapter folders that are asked about; a server's adapters are folders, never hub ids."""
    folders = served_adapters(given, config)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"{folder}: no such folder")
    return [Path(folder) for folder in folders]


def _named(found: Finding) -> str:
    folder = str(found.folder)
    return found.error if folder in found.error else f"{folder}: {found.error}"


def _show(arguments: argparse.Namespace, findings: list[Finding]) -> None:
    least = smallest(findings)
    if arguments.json:
        result = {
            "format": FORMAT,
            "stack": arguments.stack,
            "adapters": [one.to_dict() for one in findings],
            "smallest_max_lora_rank": least,
        }
        print(json.dumps(result))
        return
    console = stdout()
    table = Table(box=None)
    for heading in ("adapter", "form", "rank", "max_lora_rank", "refused for"):
        table.add_column(heading, no_wrap=True)
    for one in findings:
        table.add_row(
            one_line(one.folder),
            one.form or "-",
            str(one.rank) if one.served else "-",
            "-" if one.needs is None else str(one.needs),
            one.reason or "-",
        )
    console.print(table)
    served = sum(one.served for one in findings)
    console.print(f"{served} would be served, {len(findings) - served} refused")
    if least is not None:
        console.print(f"the smallest max_lora_rank that takes all that any takes: {least}")
