"""A process that asks for one output folder: ask_for_folder.py SOURCE SUBSPACE TARGET [MOMENT].

Prints the outcome's status. With a moment it says "there" when it has come to it, and waits to be killed.
"""

from __future__ import annotations

import os
import sys
import time

import torch

import csulora


def stay(*_: object) -> None:
    print("there", flush=True)
    time.sleep(600)


def main(source: str, subspace: str, target: str, moment: str | None = None) -> None:
    torch.set_num_threads(1)
    existing = "refresh" if moment is None else "overwrite"
    if moment == "in the middle of a write":
        os.fsync = stay  # type: ignore[assignment]
    elif moment == "between two renames":
        rename = os.rename

        def half(old: object, new: object) -> None:
            rename(old, new)  # type: ignore[arg-type]
            if str(new).endswith("/old"):
                stay()

        os.rename = half  # type: ignore[assignment]
    loaded = csulora.SafetySubspace.load(subspace)
    print(csulora.correct_folder(source, loaded, target, existing=existing).status)


if __name__ == "__main__":
    main(*sys.argv[1:])
