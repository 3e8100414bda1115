"""Outputs of csulora on disk: the mark in their weights, their report, and whether they are as written.

The mark is metadata of the weights file that says how it was made. A file without one was written by
another program; one whose mark names settings was corrected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from csulora.errors import ChangedError, CsuloraError, ExistsError
from csulora.files import peft_config
from csulora.files.companions import other_weights
from csulora.files.folders import check_folder
from csulora.files.json import parse_json, read_json
from csulora.files.plain import sha256_file
from csulora.files.safetensors import open_safetensors
from csulora.report import FORMAT, Report
from csulora.text import listed
from csulora.version import MADE_BY

WEIGHTS = "adapter_model.safetensors"
REPORT = "csulora_report.json"
SIGNATURE = "csulora_signature.json"  # of weights and configuration, by csulora.serving.signature
KEY = "csulora"  # of the mark
# What report and mark say of how an output was made, in words.
PARTS = {
    "made_by": "version of csulora",
    "settings": "settings",
    "subspace": "subspace",
    "source": "source",
}


class Written(NamedTuple):
    """Digests of what was written, and which files of the source it did not copy."""

    sha256: str  # of adapter_model.safetensors
    config_sha256: str  # of adapter_config.json
    left_out: list[str]

    def in_report(self) -> dict[str, Any]:
        """What a report says of it."""
        output = {"sha256": self.sha256, "config_sha256": self.config_sha256}
        return {"output": output, "left_out": self.left_out}


def metadata_of(made: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a weights file; made: as in LoraAdapter."""
    # Keys as they come: the order of patterns in the settings counts.
    text = json.dumps({"made_by": MADE_BY, **made}, separators=(",", ":"))
    return {"format": "pt", KEY: text}


def mark_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the mark in the metadata of weights says, empty where there is none that can be read."""
    try:
        return parse_json(Path(KEY), metadata.get(KEY, "{}").encode())
    except CsuloraError:
        return {}


def mark_of(weights: Path) -> dict[str, Any]:
    """The mark in a weights file, empty also where it cannot be read."""
    try:
        with open_safetensors(weights) as file:
            return mark_in(file.header.metadata)
    except CsuloraError:
        return {}


def made_of(mark: Mapping[str, Any]) -> dict[str, Any]:
    """How the weights with this mark were corrected; empty where they were not."""
    if "settings" not in mark:
        return {}
    return {k: v for k, v in mark.items() if k != "made_by" and isinstance(v, dict)}


def check_replaceable(folder: Path) -> None:
    """Raise ExistsError for what is there and no output replaces: files, links, folders of others.

    A wrong path must not cost anybody a folder that csulora did not write.
    """
    check_folder(folder)
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    if names and not mark_of(folder / WEIGHTS) and not _reported(folder, names):
        raise ExistsError(f"{folder}: a folder that csulora did not write; remove it yourself")


def _reported(folder: Path, names: set[str]) -> bool:
    """Whether a report of ours stands beside what is left of an output, and not as a copy elsewhere."""
    if REPORT not in names or names.isdisjoint((WEIGHTS, peft_config.FILE)):
        return False
    try:
        found = read_json(folder / REPORT)
    except CsuloraError:
        return False
    if found.get("format") != FORMAT:
        return False
    return WEIGHTS not in names or _is_no_loss(folder / WEIGHTS, found.get("source"))


def _is_no_loss(weights: Path, source: object) -> bool:
    """Whether weights without a mark cannot be read, or are those of the source, which lie there too.

    All others may be an output that somebody trained on and saved in place.
    """
    try:
        with open_safetensors(weights) as file:
            digest = file.hash()
    except CsuloraError:
        return True
    return isinstance(source, dict) and source.get("sha256") == digest


def written_report(folder: Path) -> Report:
    """The report in an output folder.

    Raises ExistsError where none or no weights are there, ChangedError where it cannot be read.
    """
    file = folder / REPORT
    if not file.exists() or not (folder / WEIGHTS).exists():
        raise ExistsError(f"{folder}: not an output of csulora")
    try:
        return Report.from_dict(read_json(file))
    except CsuloraError as error:
        text = str(error)
        raise ChangedError(text if str(file) in text else f"{file}: {text}") from None


def differences(folder: Path, report: Report) -> list[str]:
    """How the weights and the configuration in an output folder differ from what its report says."""
    if not report.output:
        return ["its report is of an earlier version, which recorded no digests"]
    found = []
    for file, key in ((WEIGHTS, "sha256"), (peft_config.FILE, "config_sha256")):
        if not (folder / file).exists():
            found.append(f"{file} is missing")
        elif _digest(folder / file) != report.output.get(key):
            found.append(f"{file} is not what was written")
    return found


def contradictions(folder: Path, report: Report) -> list[str]:
    """Where the mark in the weights of an output folder does not say what its report says."""
    mark = mark_of(folder / WEIGHTS)
    if not made_of(mark):
        return [f"{WEIGHTS} does not say that csulora corrected it"]
    stated = {"made_by": report.made_by, "settings": report.settings}
    stated |= {"subspace": report.subspace, "source": report.source}
    return [f"{WEIGHTS} and the report name different {PARTS[key]}" for key in unlike(mark, stated)]


def stray_weights(folder: Path) -> list[str]:
    """What weights that nobody corrected, and that a server may read, lie beside those of an output."""
    found = other_weights(folder, {WEIGHTS})
    return [f"holds weights that csulora did not write: {listed(found)}"] if found else []


def unlike(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Which parts of a report or mark are not what they should be."""
    return [key for key, value in wanted.items() if not alike(found.get(key), value)]


def alike(found: object, wanted: object) -> bool:
    """Whether a part of a report or mark is what it should be; patterns in their order, too."""
    return found == wanted and not _differing(found, wanted)


def otherwise(key: str, found: object, wanted: object) -> str:
    """In words which part of a report is not what it should be; of settings also each that differs."""
    differing = _differing(found, wanted) if key == "settings" else {}
    if "method" in differing:  # the others of another method say nothing
        differing = {"method": differing["method"]}
    values = [f"{n} {_value(old)}, now {_value(new)}" for n, (old, new) in differing.items()]
    return f"{PARTS[key]} ({'; '.join(values)})" if values else PARTS[key]


def _differing(found: object, wanted: object) -> dict[str, tuple[object, object]]:
    """Both values of each setting that is not the same in two parts; of patterns in their order."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return {}
    pairs = {name: (found.get(name), wanted.get(name)) for name in {**found, **wanted}}
    return {name: pair for name, pair in pairs.items() if _listed(pair[0]) != _listed(pair[1])}


def _listed(setting: object) -> object:
    """A mapping as a list, in which the order counts."""
    return list(setting.items()) if isinstance(setting, Mapping) else setting


def _value(setting: object) -> str:
    if setting is None:
        return "none"
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)


def _digest(file: Path) -> str:
    """Of weights or a configuration, empty for what nobody would have written as such."""
    try:
        if file.name != WEIGHTS:
            return sha256_file(file, peft_config.CONFIG_LIMIT)
        with open_safetensors(file) as opened:  # what is no such file is not worth a reading
            return opened.hash()
    except CsuloraError:
        return ""
