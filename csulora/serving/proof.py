"""What shows that a folder which says that csulora corrected it is what it says.

A report proves nothing: anybody can write one. Looked at is the copy, which nobody else can change.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from csulora.adapter import identify
from csulora.errors import CsuloraError
from csulora.files.folders import inside, whole_folder
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import copy_file, sha256_file
from csulora.output import REPORT, SIGNATURE, WEIGHTS, written_report
from csulora.report import Report
from csulora.serving.config import ServingConfig
from csulora.serving.identity import Identity, is_settled, of_proof, of_signed
from csulora.serving.policy import Policy
from csulora.serving.recent import Recent, Refusals
from csulora.serving.record import FILE_MODE, Record, shortened
from csulora.serving.refused import RefusedError
from csulora.serving.sources import Facts, Sources
from csulora.subspace import SafetySubspace
from csulora.verification import verify

How = Literal["signed", "recomputed"]


@dataclass(frozen=True)
class Proofs:
    """What counts as a proof under one configuration."""

    config: ServingConfig
    subspace: SafetySubspace
    policy: Policy
    sources: Sources
    _signed: Recent[Path, tuple[Identity, str | None]] = field(default_factory=Recent)
    _refused: Refusals[Path, Identity | None] = field(default_factory=Refusals)

    def trusts(self, record: Record) -> bool:
        """Whether an entry of the cache was made, or proven, by what counts now."""
        if record.how == "signed":
            return record.policy in {sha256_file(key) for key in self.config.trusted_keys}
        return record.policy == self.policy.digest

    def signature(self, folder: Path) -> str | None:
        """Digest of the trusted key that signed a folder as it is now, None where there is none.

        Raises CsuloraError where a key or a signature cannot be read.
        """
        now = of_signed(folder)
        if not self.config.trusted_keys or now is None:
            return None
        before = self._signed.get(folder)
        if before is not None and before[0] == now:
            return before[1]
        found = self._signature(folder)
        if is_settled(now) and of_signed(folder) == now:
            self._signed.set(folder, (now, found))
        return found

    def _signature(self, folder: Path) -> str | None:
        from csulora.serving.signature import signer  # needs a package of the extra "serve"

        key = signer(folder, self.config.trusted_keys)
        return None if key is None else sha256_file(Path(key))

    def remembering(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Around the proof of a folder, which costs a copy and a correction: its refusal is remembered.

        Raises RefusedError for a folder that was not proven a moment ago, and is still the same.
        """
        return self._refused.remembering(folder, of_proof(folder), ("unproven", "rank error"))

    def origin(self, facts: Facts) -> Path:
        """The source that a folder, as it is now, can be recomputed from.

        Raises RefusedError where there is none, or none could give it: before anything is copied.
        """
        folder = facts.source.folder
        output = self._report(folder, folder).output
        if (output.get("sha256"), output.get("config_sha256")) != facts.source.digests:
            raise _unproven(folder, "it is not what its report says")
        origin = facts.made.get("source", {})
        source = self.sources.with_digests(
            str(origin.get("name", "")), origin.get("sha256"), origin.get("config_sha256")
        )
        if source is None:
            raise _unproven(folder, "no trusted key signed it, and its source was not found")
        return source

    def copy(self, facts: Facts, how: How, by: str, origin: Path | None, target: Path) -> Record:
        """Copy a corrected folder to `target`, if it is proven. Raises RefusedError if not.

        by: digest of the key that signed it, or of the settings that it is recomputed with. origin: the
            source to recompute it from, None for one that is signed.
        """
        folder = facts.source.folder
        with whole_folder(target, overwrite=False, durable=False) as copied:
            for name in (WEIGHTS, CONFIG, REPORT, SIGNATURE):
                if (folder / name).exists():
                    file = inside(folder, name, folder)
                    copy_file(file, copied / name, mode=FILE_MODE, durable=False)
            found = identify(copied)
            if found.digests != facts.source.digests:
                raise RefusedError("changed", f"{folder}: changed while it was being read")
            if origin is None and self._signature(copied) != by:
                raise RefusedError("changed", f"{folder}: its signature changed meanwhile")
            warnings: list[str] = []
            if origin is not None:
                warnings = self._recompute(folder, copied, origin).warnings
        return Record.of(
            facts.source,
            {"sha256": found.sha256, "config_sha256": found.config_sha256},
            policy=by,
            rank=facts.rank,
            form=str(facts.made.get("settings", {}).get("form", "")),
            how=how,
            warnings=shortened(warnings),
        )

    def _report(self, folder: Path, copied: Path) -> Report:
        """The report of a folder, in its copy. Raises RefusedError for other settings than ours."""
        try:
            report = written_report(copied)
        except CsuloraError as error:
            raise _unproven(folder, str(error).replace(str(copied), str(folder))) from None
        if not self.policy.agrees(report) or report.passed_through:
            raise _unproven(
                folder,
                "it was corrected with other settings, or another subspace, than the server's",
            )
        self.policy.check_fit(report)
        return report

    def _recompute(self, folder: Path, copied: Path, source: Path) -> Report:
        """The report of a copy that is what its source gives with the settings of the server.

        Raises RefusedError for another one.
        """
        report = self._report(folder, copied)
        found = verify(copied, source=source, subspace=self.subspace, backend="torch", device="cpu")
        if not found.ok:
            raise _unproven(folder, found.problems[0])
        return report


def _unproven(folder: Path, reason: str) -> RefusedError:
    return RefusedError(
        "unproven", f"{folder}: says that csulora corrected it, which is not proven: {reason}"
    )
