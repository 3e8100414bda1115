"""Whether an output is still what was written, and what its source and subspace give."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora.adapter import DTYPES, LoraAdapter, LoraModule, identify
from csulora.correction import correct
from csulora.errors import ChangedError, CsuloraError, ExistsError
from csulora.output import REPORT, contradictions, differences, stray_weights, written_report
from csulora.pipeline.backend import check_backend
from csulora.report import ModuleReport, Report, Totals
from csulora.subspace import SafetySubspace

# Of the update, relative: another device, or another number of threads, rounds otherwise.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_DTYPES = {"keep": None, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}}

FIGURE_TOLERANCE = 1e-3  # of a report's figures, relative to the whole


@dataclass(frozen=True)
class Verification:
    """What was found of one folder.

    checked: what was compared: "files" (weights and configuration with the report), "source",
        "subspace", "result" (computed anew).
    problems: what did not agree, a line each; none where all is well.
    """

    folder: Path
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that was compared agrees."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        lists = {"checked": list(self.checked), "problems": list(self.problems)}
        return {"folder": str(self.folder), "ok": self.ok, **lists}


def verify(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    subspace: SafetySubspace | None = None,
    backend: str = "auto",
    device: str = "auto",
) -> Verification:
    """Compare an output with its own report and, where they are given, its source and subspace.

    With both the correction is computed anew; the update may then differ by rounding, as between two
    devices. An output that has changed, or is none, is a finding; raises CsuloraError only where `source`
    cannot be read, and UsageError for an unknown backend or device.
    """
    check_backend(backend, device)
    target = Path(folder)
    try:
        report = written_report(target)
    except (ExistsError, ChangedError) as error:
        return Verification(target, (), (str(error),))
    checked, problems = ["files"], differences(target, report)
    problems = problems or contradictions(target, report)
    problems += stray_weights(target)
    if source is not None:
        checked.append("source")
        found = identify(source)
        if found.digests != _digests(report.source):
            problems.append(f"was made of another adapter than {os.fspath(source)} is now")
    if subspace is not None:
        checked.append("subspace")
        if subspace.sha256 != report.subspace.get("sha256"):
            problems.append(f"was made with another subspace than {subspace.path or 'the given'}")
    if source is not None and subspace is not None and not problems:
        checked.append("result")
        problems += _recomputed(target, report, source, subspace, backend, device)
    return Verification(target, tuple(checked), tuple(problems))


def _digests(values: dict[str, Any]) -> tuple[Any, Any]:
    return values.get("sha256"), values.get("config_sha256")


def _recomputed(
    folder: Path,
    report: Report,
    source: str | os.PathLike[str],
    subspace: SafetySubspace,
    backend: str,
    device: str,
) -> list[str]:
    """Where the output is not what the correction gives now."""
    portable = bool(report.settings.get("portable"))
    try:
        dtype, correction = _DTYPES[report.settings["dtype"]], report.correction
        rank = report.subspace["rank"]
        used = subspace if rank == subspace.rank else subspace.leading(rank)
    except (CsuloraError, KeyError, TypeError) as misfit:
        return [f"its settings are none that csulora writes ({misfit})"]
    # The portable form leaves out what the source may hold beside updates, or refuses it.
    adapter = LoraAdapter.load(source, pass_through=bool(report.passed_through) or portable)
    wanted, found = correct(
        adapter,
        used,
        correction,
        dtype=dtype,
        portable=portable,
        again=True,
        backend=backend,
        device=device,
    )
    written = LoraAdapter.load(folder, pass_through=bool(report.passed_through))
    if _shapes(written) != _shapes(wanted):
        return ["its modules are not those of the correction"]
    if written.written_config() != wanted.config:
        return ["its configuration is not that of the correction"]
    problems = [
        f"{name} is {distance:.1e} off the correction (relative Frobenius norm)"
        for name, module in written.modules.items()
        if (distance := _distance(module, wanted.modules[name])) > TOLERANCES[module.B.dtype]
    ]
    if not _same_tensors(written.passed_through, wanted.passed_through):
        problems.append("its passed-through tensors are not those of the source")
    if not _same_statement(report, found):
        problems.append(f"{REPORT} does not say what the correction does")
    return problems


def _shapes(adapter: LoraAdapter) -> dict[str, tuple[int, int, bool]]:
    """What is updated, d_out x d_in, and whether as an embedding."""
    return {n: (m.B.shape[0], m.A.shape[1], m.embedding) for n, m in adapter.modules.items()}


def _same_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        X.dtype == wanted[name].dtype and torch.equal(X, wanted[name]) for name, X in found.items()
    )


def _same_statement(found: Report, wanted: Report) -> bool:
    """Whether two reports name the same tensors and, up to rounding, the same figures."""
    if (
        found.passed_through != wanted.passed_through
        or found.modules.keys() != wanted.modules.keys()
        or not _same_strength(found.strength, wanted.strength)
    ):
        return False
    pairs: list[tuple[ModuleReport | Totals, ModuleReport | Totals]]
    pairs = [(module, wanted.modules[name]) for name, module in found.modules.items()]
    pairs.append((found.totals, wanted.totals))
    return all(
        math.isclose(x, y, rel_tol=FIGURE_TOLERANCE, abs_tol=FIGURE_TOLERANCE * scale)
        for one, other in pairs
        for (x, scale), (y, _) in zip(_figures(one), _figures(other), strict=True)
    )


def _same_strength(found: float | None, wanted: float | None) -> bool:
    """Whether two strengths that a budget found are the same, up to rounding."""
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=FIGURE_TOLERANCE)


def _figures(entry: ModuleReport | Totals) -> Iterator[tuple[float, float]]:
    """The figures of a module or of all, each with what is small beside it."""
    for name, value in vars(entry).items():
        scale = entry.energy_before if name.startswith("energy") else 1.0
        for figure in value.values() if isinstance(value, dict) else [value]:
            yield figure, scale


def _distance(found: LoraModule, wanted: LoraModule) -> float:
    """||dW_found - dW_wanted||_F / ||dW_wanted||_F, from r x r products."""
    B = torch.cat([found.scaling * found.B.double(), -wanted.scaling * wanted.B.double()], dim=1)
    A = torch.cat([found.A.double(), wanted.A.double()])
    # The difference is B A of rank 2r; a QR of each side keeps what the Gram matrices would cancel.
    R_B, R_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    r = found.rank
    size = torch.linalg.norm(R_B[:, r:] @ R_A[:, r:].mT)
    return float(torch.linalg.norm(R_B @ R_A.mT) / size.clamp_min(1e-300))
