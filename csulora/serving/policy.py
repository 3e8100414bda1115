"""What an entry of the cache has to have been made with, and its key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from csulora.adapter import Source
from csulora.folder import Recipe
from csulora.output import alike
from csulora.report import Report, rank_warnings
from csulora.serving.config import ServingConfig
from csulora.serving.refused import RefusedError
from csulora.settings import Correction, Method
from csulora.subspace import SafetySubspace
from csulora.version import METHOD


class Policy:
    """The settings of a configuration, without the form where it is chosen for each adapter."""

    def __init__(self, config: ServingConfig, subspace: SafetySubspace) -> None:
        self._config, self._subspace = config, subspace
        made = self.recipe(config.method).provenance(subspace)
        self._settings, self._stated = self._chosen(made["settings"]), made["subspace"]
        self.digest = _digest([METHOD, subspace.sha256, self._settings])

    def recipe(self, method: Method) -> Recipe:
        """How an adapter is corrected. No GPU: a server has none to spare, and none before its engine."""
        return Recipe(
            correction=method,
            dtype=self._config.dtype,
            portable=self._config.portable,
            backend="torch",
            device="cpu",
        )

    def agrees(self, report: Report) -> bool:
        """Whether the settings that an output's report states are these, on the whole subspace."""
        # The digest is that of the file also where only its leading directions were used.
        return alike(self._chosen(report.settings), self._settings) and alike(
            report.subspace, self._stated
        )

    def check_fit(self, report: Report) -> None:
        """Raise RefusedError where the form same is too far from the exact result.

        Not where the settings fix the form, nor for realignment, which has no other of that rank.
        """
        if self._config.fixed_form or not isinstance(self._config.method, Correction):
            return
        warnings = rank_warnings(report.totals, report.modules)
        if warnings:
            raise RefusedError("rank error", warnings[0])

    def key(self, source: Source, method: Method) -> str:
        """Of the correction of an adapter."""
        settings = self.recipe(method).provenance(self._subspace)["settings"]
        # Keys as they come: the order of patterns in the settings counts.
        return _digest([METHOD, *source.digests, self._subspace.sha256, settings])

    def _chosen(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        apart = () if self._config.fixed_form else ("form",)
        return {name: value for name, value in settings.items() if name not in apart}


def key_of_copy(source: Source, how: str, by: str) -> str:
    """Of the copy of a corrected folder, by what proved it."""
    return _digest([how, by, *source.digests])


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
