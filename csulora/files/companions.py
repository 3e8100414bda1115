"""What lies beside an adapter's weights and configuration, and goes with it: tokenizers, model cards."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from csulora.errors import CsuloraError
from csulora.files.folders import inside, make_folders
from csulora.files.peft_config import FILE as CONFIG
from csulora.files.plain import copy_file, mode_of, reading
from csulora.text import encodable

# Of the files that are copied: bytes, as a number and in multiples of the weights, whichever is more;
# and how many folders deep they may lie.
OTHER_BYTES, OTHER_MULTIPLE = 4 << 30, 64
DEEPEST = 64
# What trainers keep beside an adapter to go on from: optimizer, scheduler, random states, nearly all
# of it pickles, whatever its name.
_TRAINING = re.compile(
    r".*\.(pt|pth|bin|pkl|pickle|ckpt|distcp)|(optimizer|scheduler)\..*|rng_state.*"
    r"|zero_to_fp32\.py|latest",
    re.IGNORECASE | re.DOTALL,
)
# Weights, of this adapter or another, in any format that something loads: as a copy they would be
# uncorrected, and some servers read every file of safetensors in a folder.
_WEIGHTS = re.compile(
    r"adapter_model[._-].*|.*\.(safetensors(\.index\.json)?|gguf|npz|msgpack|h5)",
    re.IGNORECASE | re.DOTALL,
)
# `checkpoint-N` also where a trainer kept no adapter in it: half of it would be of no use.
_TRAINING_FOLDER = re.compile(r"checkpoint-\d+|global_step\d*|(optimizer|pytorch_model_fsdp)_\d+")


def copy_companions(
    source: Path, target: Path, weights: int, apart: Collection[str], *, durable: bool = True
) -> list[str]:
    """Copy the other files of a source with so many bytes of weights; the names of those left out."""
    copied, folders, left_out = _other_files(source, apart)
    limit = left = max(OTHER_BYTES, OTHER_MULTIPLE * weights)
    for relative, path in copied.items():
        with reading(path):
            size = os.stat(path).st_size
        if size > left:
            raise CsuloraError(
                f"{path}: {size} bytes; of the files beside the weights {limit} are copied at most, "
                "move what does not belong to the adapter"
            )
        make_folders((target / relative).parent)
        copy_file(path, target / relative, durable=durable)
        left -= size
    for relative in folders:
        mode = mode_of(source / relative)
        if mode is not None and (target / relative).is_dir():
            (target / relative).chmod(mode | 0o700)  # its owner may remove it
    return left_out


def other_weights(folder: Path, apart: Collection[str]) -> list[str]:
    """Names of files directly in a folder that are weights, but for those of `apart`."""
    with reading(folder):
        names = sorted(os.listdir(folder))
    return [encodable(n) for n in names if n not in apart and _WEIGHTS.fullmatch(n)]


def _other_files(
    source: Path, apart: Collection[str]
) -> tuple[dict[str, Path], list[str], list[str]]:
    """Files of a folder to copy, by relative path; its folders, itself too; and what is left out."""
    copied: dict[str, Path] = {}
    left_out: list[str] = []
    folders = [""]
    for folder in folders:
        if folder.count(os.sep) >= DEEPEST:
            raise CsuloraError(f"{source / folder}: more than {DEEPEST} folders deep")
        with reading(source / folder), os.scandir(source / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            relative = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False) and not _stays(entry):
                folders.append(relative)
            elif entry.is_dir():
                left_out.append(relative)
            elif relative not in apart:
                if _WEIGHTS.fullmatch(entry.name) or _TRAINING.fullmatch(entry.name):
                    left_out.append(relative)
                else:
                    copied[relative] = inside(source, relative, source)
    return copied, folders, sorted(encodable(name) for name in left_out)


def _stays(folder: os.DirEntry[str]) -> bool:
    """Whether a folder within an adapter is not copied: another adapter, or a training state."""
    nested = os.path.lexists(os.path.join(folder.path, CONFIG))
    return nested or _TRAINING_FOLDER.fullmatch(folder.name) is not None
