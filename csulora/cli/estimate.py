"""`csulora estimate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from csulora.cli.output import progress, stdout
from csulora.errors import UsageError
from csulora.estimation import estimate
from csulora.files.folders import check_new_file
from csulora.subspace import is_subspace_file
from csulora.text import one_line, span


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    _check_out(out)
    modules = None
    if arguments.modules is not None:
        modules = [name.strip() for name in arguments.modules.split(",")]
    with progress("estimating") as report:
        subspace = estimate(
            arguments.base,
            arguments.aligned,
            rank=arguments.rank,
            energy=arguments.energy,
            modules=modules,
            like=arguments.like,
            seed=arguments.seed,
            device=arguments.device,
            backend=arguments.backend,
            progress=report,
            warn=lambda text: report.say(f"csulora: warning: {one_line(text)}"),
        )
    subspace.save(out)
    ranks = sorted(module.rank for module in subspace.modules.values())
    shares = sorted(module.energy_share for module in subspace.modules.values())
    if arguments.json:
        summary = {
            "format": "csulora_estimate/1",
            "subspace": str(out),
            "sha256": subspace.sha256,
            "modules": {
                name: {"rank": m.rank, "energy_share": m.energy_share}
                for name, m in subspace.modules.items()
            },
        }
        print(json.dumps(summary))
        return 0
    console = stdout()
    console.print(
        f"{one_line(out)}: {len(ranks)} modules, rank {span(ranks)}, holding "
        f"{span([f'{100 * share:.1f}' for share in shares])} % of ||W_aligned - W_base||^2"
    )
    unchanged = [name for name, module in subspace.modules.items() if not module.rank]
    if unchanged:
        console.print(
            f"base and aligned are equal on {len(unchanged)} of them: {one_line(unchanged[0])}, ..."
        )
    return 0


def _check_out(out: Path) -> None:
    """Raise UsageError now, not after hours of work, if the result could not be written there."""
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; --out names the file to write")
    check_new_file(out)
    if out.exists() and not is_subspace_file(out):
        raise UsageError(f"{out}: exists and is not a subspace file; remove it or name another")
