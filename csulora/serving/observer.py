"""Mode "observe": what a correction would change of what is served raw."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from csulora.adapter import LoraAdapter
from csulora.correction import decompose
from csulora.serving.audit import Audit
from csulora.serving.config import ServingConfig
from csulora.serving.flights import Flights
from csulora.serving.forms import pick
from csulora.serving.identity import Identity, is_settled, of_adapter
from csulora.serving.recent import Recent
from csulora.serving.record import shortened
from csulora.serving.refused import told
from csulora.serving.sources import Sources
from csulora.subspace import SafetySubspace
from csulora_kernels import Form


class Observer:
    """Looks at adapters and logs what it finds. Nothing here raises: they are served in any case.

    slots: for the adapters that are in memory at a time.
    """

    def __init__(
        self,
        config: ServingConfig,
        subspace: SafetySubspace,
        sources: Sources,
        audit: Audit,
        slots: threading.BoundedSemaphore,
    ) -> None:
        self._config, self._subspace, self._sources = config, subspace, sources
        self._audit, self._slots, self._flights = audit, slots, Flights()
        # By folder: the files that were looked at last, and what a correction would change of them.
        self._seen: Recent[Path, tuple[Identity | None, dict[str, Any] | None]] = Recent()

    def look(self, given: Path, name: str) -> None:
        """Log what a correction would change of a folder."""
        folder = given
        try:
            folder = Path(os.path.realpath(given))
            with self._flights.of(folder), self._slots:
                details = self._of_folder(folder)
            self._audit.line("observed", name, folder=folder, **details)
        except Exception as error:
            self._audit.line("observed", name, folder=folder, **_objection(error))

    def look_again(self, given: Path, name: str) -> None:
        """`look`, if the files of a folder are not those that were looked at, by two stats."""
        with contextlib.suppress(OSError, ValueError):
            folder = Path(os.path.realpath(given))
            before = self._seen.get(folder)
            if before is not None and before[0] != of_adapter(folder):
                self.look(given, name)

    def look_at_tensors(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], name: str
    ) -> None:
        """`look` at an adapter that came without a folder."""
        try:
            with self._slots:
                adapter = LoraAdapter.from_tensors(tensors, values, pass_through=True)
                details = self._change(adapter, self._sources.ranks(adapter))
            self._audit.line("observed", name, **details)
        except Exception as error:
            self._audit.line("observed", name, **_objection(error))

    def _of_folder(self, folder: Path) -> dict[str, Any]:
        """What the log says of a folder, from memory where its files are the same.

        Raises RefusedError for what would be refused.
        """
        now, before = of_adapter(folder), self._seen.get(folder)
        if before is not None and before[0] == now and before[1] is not None:
            return before[1]
        self._seen.set(folder, (now, None))  # looked at, whatever comes out
        self._sources.known(folder)  # raises what was refused a moment ago
        facts, adapter = self._sources.read(folder)
        details: dict[str, Any] = {"source": facts.source.sha256, "corrected_before": True}
        if not facts.made:
            details = {"source": facts.source.sha256, **self._change(adapter, facts.ranks)}
        if now is not None and is_settled(now) and of_adapter(folder) == now:
            self._seen.set(folder, (now, details))
        return details

    def _change(self, adapter: LoraAdapter, ranks: Mapping[Form, int]) -> dict[str, Any]:
        """What a correction would change. Raises RefusedError where none fits."""
        method, rank = pick(ranks, self._config, self._config.max_lora_rank)
        report = decompose(adapter, self._subspace, method, device="cpu")
        total = report.totals
        return {
            "settings": method.to_dict(),
            "rank": rank,
            "form": method.form,
            "relative_change": total.relative_change,
            "relative_energy_before": total.relative_energy_before,
            "relative_energy_after": total.relative_energy_after,
            "warnings": shortened(report.warnings),
        }


def _objection(error: Exception) -> dict[str, str]:
    """What the log says of an adapter that would be refused."""
    details = told(error)
    return {"would_refuse": details.pop("reason"), **details}
