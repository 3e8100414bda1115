"""Adapter folders as a guard sees them: what was found in their files, kept while these stay the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csulora.adapter import PICKLE, LoraAdapter, Source, identify
from csulora.batch.sources import folders_with
from csulora.errors import CsuloraError
from csulora.files.peft_config import CONFIG_LIMIT
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import sha256_file
from csulora.output import WEIGHTS
from csulora.pipeline.plan import base_copies
from csulora.serving.config import ServingConfig
from csulora.serving.forms import ranks
from csulora.serving.identity import Identity, is_settled, of_adapter
from csulora.serving.recent import Recent, Refusals
from csulora.serving.refused import RefusedError
from csulora.subspace import SafetySubspace
from csulora.text import listed
from csulora_kernels import Form


@dataclass(frozen=True)
class Facts:
    """What was found in an adapter's files.

    source: where, with digests. made: the mark of an adapter that says csulora corrected it, else empty.
    rank: its largest. ranks: of the result in each form, empty for a corrected one.
    """

    source: Source
    made: Mapping[str, Any]
    rank: int
    ranks: Mapping[Form, int]


class Sources:
    """Facts of folders by path, for as long as the files are the same."""

    def __init__(self, config: ServingConfig, subspace: SafetySubspace) -> None:
        self._config, self._subspace = config, subspace
        self._found: Recent[Path, tuple[Identity, Facts]] = Recent()
        self._refused: Refusals[Path, Identity] = Refusals()

    def known(self, folder: Path) -> Facts | None:
        """What is known of a folder, for two stats; None where it has to be read. Raises RefusedError."""
        now = of_adapter(folder)
        if now is None:
            return None
        self._refused.check(folder, now)
        before = self._found.get(folder)
        return before[1] if before is not None and before[0] == now else None

    def read(self, folder: Path) -> tuple[Facts, LoraAdapter]:
        """Read a folder. Raises RefusedError for what cannot be corrected."""
        before = of_adapter(folder)
        refused: RefusedError | None = None
        try:
            adapter = _load(folder, portable=self._config.portable)
            found = self._facts(adapter)
        except RefusedError as error:
            refused = error.plain()  # the error itself holds the adapter, by its traceback
        if before is not None and before == of_adapter(folder) and is_settled(before):
            if refused is not None:
                self._refused.keep(folder, before, refused)
            else:
                self._found.set(folder, (before, found))
        if refused is not None:
            raise refused
        return found, adapter

    def with_digests(self, name: str, sha256: object, config_sha256: object) -> Path | None:
        """The adapter with these digests in the configured folders, first where one has this name.

        Raises CsuloraError where a folder cannot be listed.
        """
        for folder in self._candidates(name):
            try:
                # Configurations are small: weights are hashed only beside the right one.
                if sha256_file(folder / CONFIG, CONFIG_LIMIT) != config_sha256:
                    continue
                if identify(folder).sha256 == sha256:
                    return folder
            except CsuloraError:
                continue
        return None

    def ranks(self, adapter: LoraAdapter) -> dict[Form, int]:
        """The largest rank of the result in each form. Raises RefusedError where none fits the model."""
        try:
            return ranks(adapter, self._subspace, self._config)
        except CsuloraError as error:
            raise RefusedError("subspace", str(error)) from None

    def _candidates(self, name: str) -> Iterator[Path]:
        for root in self._config.folders:
            if name and os.path.basename(name) == name and (root / name / CONFIG).is_file():
                yield root / name
        for root in self._config.folders:
            yield from map(Path, folders_with(os.fspath(root), [CONFIG]))

    def _facts(self, adapter: LoraAdapter) -> Facts:
        assert adapter.source is not None  # it was read from a folder
        rank = max((module.rank for module in adapter.modules.values()), default=0)
        if adapter.source.corrected:
            return Facts(adapter.source, adapter.made, rank, {})
        return Facts(adapter.source, {}, rank, self.ranks(adapter))


def _load(folder: Path, *, portable: bool) -> LoraAdapter:
    """An adapter of which every tensor will be corrected, or left out of what is written."""
    if not folder.is_dir():
        raise RefusedError("missing", f"{folder}: no such adapter folder")
    if (folder / PICKLE).exists() and not os.path.lexists(folder / WEIGHTS):
        raise RefusedError("pickle", f"{folder / PICKLE}: a pickle; only safetensors are read")
    try:
        # Whatever is no update is refused here, in words for a client and not for the command line.
        adapter = LoraAdapter.load(folder, pass_through=True)
    except CsuloraError as error:
        raise RefusedError("source", str(error)) from None
    # What was corrected already is served as it is.
    goes_without = portable and not adapter.made
    left_out: Sequence[str] = base_copies(adapter) if goes_without else ()
    others = adapter.passed_through.keys() - left_out
    if others:
        raise RefusedError(
            "not lora",
            f"{folder / WEIGHTS}: {len(others)} tensor(s) are not a LoRA update on a linear weight "
            f"or embedding: {listed(others)}",
        )
    return adapter
