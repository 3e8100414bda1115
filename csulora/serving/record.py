"""What the cache knows of an entry, in a file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csulora.adapter import Source
from csulora.errors import CsuloraError
from csulora.files.json import json_bytes, read_json

FORMAT = "csulora_cache/1"
WARNING_LENGTH = 500  # of each: it may quote what an adapter's configuration says
FILE_MODE, FOLDER_MODE = 0o600, 0o700  # of entries, whatever those of their sources are


@dataclass(frozen=True)
class Record:
    """What the cache knows of an entry.

    policy: digest of the settings that it was made with, or of the key that signed it.
    source: the folder that it was made of, as it was then, with the digests of its two files.
    sha256, config_sha256: of the entry's own two files.
    how: "corrected", "signed" or "recomputed".
    warnings: of the report of its correction, where that was made or proven.
    """

    policy: str
    source: str
    source_sha256: str
    source_config_sha256: str
    sha256: str
    config_sha256: str
    rank: int
    form: str
    how: str
    warnings: tuple[str, ...] = ()

    @property
    def source_digests(self) -> tuple[str, str]:
        """Of the weights and the configuration that it was made of."""
        return self.source_sha256, self.source_config_sha256

    @property
    def output_digests(self) -> tuple[str, str]:
        """Of its own weights and configuration."""
        return self.sha256, self.config_sha256

    @classmethod
    def of(cls, source: Source, output: dict[str, str], **rest: Any) -> Record:
        return cls(
            source=str(source.folder),
            source_sha256=source.sha256,
            source_config_sha256=source.config_sha256,
            sha256=output["sha256"],
            config_sha256=output["config_sha256"],
            **rest,
        )

    def written(self, key: str) -> bytes:
        """The content of its file."""
        return json_bytes({"format": FORMAT, "key": key, **asdict(self)})


def read_record(file: Path, key: str) -> Record | None:
    """The record of the entry with this key; None where there is none that can be read."""
    try:
        found = read_json(file)
        if (found.pop("format"), found.pop("key")) != (FORMAT, key):
            return None
        return Record(**found | {"warnings": shortened(found.get("warnings", ()))})
    except (CsuloraError, KeyError, TypeError):
        return None


def shortened(warnings: Iterable[str]) -> tuple[str, ...]:
    """Warnings of a report as records, audit log and commands have them."""
    return tuple(str(text)[:WARNING_LENGTH] for text in warnings)
