"""docs/sweep.md: its commands parse, its scripts run and its options are all there."""

import json
import os
import re
import shlex
import subprocess
import sys

import builders
import pytest

import csulora
from csulora.cli import build_parser
from csulora.sweep.controls import CONTROLS
from csulora.sweep.metrics import KNOWN, read_metrics

ROOT = builders.HERE.parent
TEXT = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A current folder in which the page's paths lead to the package, and results do not."""
    (tmp_path / "csulora").symlink_to(ROOT / "csulora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_parses():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "csulora" and build_parser().parse_args(words).run


def test_what_an_evaluation_prints_is_understood():
    (example,) = blocks("json")
    assert tuple(sorted(read_metrics(example))) == tuple(sorted(KNOWN))
    assert all(f"`{name}`" in TEXT for name in (*KNOWN, *CONTROLS))


def test_the_script_measures_the_shipped_adapter(checkout):
    script = next(block for block in blocks("python") if "Evaluator" in block)
    (checkout / "measure.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "measure.py", "dev", "csulora/demo/assets/adapter"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found = read_metrics(done.stdout, ("refused", "complied", "utility"))
    # It was trained to comply, and to do its task.
    assert found["complied"] > 0.9 and found["utility"] > 0.9


def test_the_python_example(checkout, capsys):
    assets = "csulora/demo/assets"
    csulora.estimate(f"{assets}/base", f"{assets}/aligned", rank=16, like=f"{assets}/adapter").save(
        "demo.safetensors"
    )
    example = next(block for block in blocks("python") if "Energies" in block)
    exec(compile(example, "docs/sweep.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 8
    assert all(0 < float(line.split()[-1]) < 1 for line in lines)
    assert json.dumps(lines[0]).startswith('"realign same k 4 0.3 ')
