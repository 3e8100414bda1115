"""A place for a guard: subspace, adapters, configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import builders
import pytest

from csulora.serving import config, counters, guard

HERE = Path(__file__).parent


class Place:
    """A configuration and what it names; `guard()` opens one for it."""

    def __init__(self, root):
        self.root, self.cache = root, root / "cache"
        self.file = root / "csulora.toml"
        self.adapters = root / "adapters"
        self.adapters.mkdir()
        builders.write_subspace(root / "subspace.safetensors")
        self.write()

    def write(self, settings=None, **changes):
        """The configuration; None removes a key."""
        values = {
            "mode": "correct",
            "subspace": "subspace.safetensors",
            "folders": ["adapters"],
            "cache": "cache",
            "audit": "audit.jsonl",
        } | changes
        builders.write_guard(self.file, settings, **values)

    def config(self, settings=None, **changes):
        self.write(settings, **changes)
        return config.load(self.file)

    def guard(self, settings=None, **changes):
        found = guard.Guard(self.config(settings, **changes))
        found.open()
        return found

    def adapter(self, name="one", **options):
        folder = builders.write_adapter(self.adapters / name, **options)
        self.age(folder)
        return folder

    @staticmethod
    def age(folder, seconds=10):
        """Set the times of an adapter's files back: what was written just now is not remembered."""
        for path in folder.iterdir():
            if path.is_file() and not path.is_symlink():
                found = path.stat()
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - seconds * 10**9))

    def decisions(self):
        """The audit log."""
        file = self.root / "audit.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def entries(self):
        return sorted(path.name for path in self.cache.iterdir() if len(path.name) == 64)

    def leftovers(self):
        """What is in the cache beside entries, their records and its own folders."""
        known = {"leases", "counters", "lock"}
        names = {path.name for path in self.cache.iterdir()} - known
        keys = {name for name in names if len(name) == 64}
        return sorted(names - keys - {f"{key}.json" for key in keys})

    def process(self, code, *arguments, before="", **options):
        """Python with an opened guard `g` and the builders; stdin and stdout are pipes.

        before: what runs before the guard is opened.
        """
        start = (
            "import os, sys, time, json; from pathlib import Path\n"
            "import builders, torch; torch.set_num_threads(1)\n"
            "from csulora.serving import config, counters, guard\n"
            f"{before}\n"
            f"g = guard.Guard(config.load({str(self.file)!r})); g.open()\n"
        )
        paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-c", start + code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            **options,
        )


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def _own_counters(monkeypatch):
    """Counters from nothing for each test, and no guard of another."""
    monkeypatch.setattr(counters, "_own", counters._Own())
    monkeypatch.setattr(guard, "_guard", None)
    monkeypatch.delenv(config.VARIABLE, raising=False)
