"""The entry points: nothing without a configuration, and no start without the guard."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(code, folder, **environment):
    """Python on `code`, where `csulora` is only what lies in `folder`."""
    (folder / "csulora_plugin.py").write_text((ROOT / "csulora_plugin.py").read_text())
    kept = {k: v for k, v in os.environ.items() if k not in ("CSULORA_CONFIG", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def broken(folder, stack, text):
    """A package csulora whose integration of a stack has this text."""
    integration = folder / "csulora" / "integrations" / stack
    integration.mkdir(parents=True)
    (folder / "csulora" / "__init__.py").touch()
    (folder / "csulora" / "integrations" / "__init__.py").touch()
    (integration / "__init__.py").write_text(text)


BROKEN = {
    "on import": "raise RuntimeError('the integration is broken')",
    "no module": "import there_is_no_such_module_of_the_stack",
    "on the call": "def install():\n    raise RuntimeError('the integration is broken')",
}


def test_the_module_itself_needs_the_standard_library_alone():
    tree = ast.parse((ROOT / "csulora_plugin.py").read_text())
    modules = [
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    ]
    assert set(modules) <= sys.stdlib_module_names
    assert not any(isinstance(node, ast.ImportFrom) for node in tree.body)


@pytest.mark.parametrize("stack", ["vllm", "sglang"])
def test_without_a_configuration_nothing_is_imported(stack, tmp_path):
    broken(tmp_path, stack, BROKEN["on import"])
    code = f"import csulora_plugin, sys; csulora_plugin.{stack}(); print('csulora' in sys.modules)"
    done = call(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize("stack", ["vllm", "sglang"])
def test_what_keeps_the_guard_from_standing_ends_the_process(stack, way, tmp_path):
    broken(tmp_path, stack, BROKEN[way])
    # SGLang calls plugins in such a block, vLLM does not.
    after = {"sglang": "except Exception: print('started')", "vllm": "finally: pass"}[stack]
    code = f"import csulora_plugin\ntry: csulora_plugin.{stack}()\n{after}\nprint('started')"
    done = call(code, tmp_path, CSULORA_CONFIG="serving.toml")
    assert done.returncode == 1 and done.stdout == ""
    reason = "there_is_no_such_module_of_the_stack" if way == "no module" else "is broken"
    assert reason in done.stderr.splitlines()[-1]
    if stack == "sglang":
        assert done.stderr.startswith("csulora: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("stack", ["vllm", "sglang"])
def test_an_empty_variable_is_a_configuration_that_is_missing(stack, tmp_path):
    broken(tmp_path, stack, BROKEN["on the call"])
    done = call(f"import csulora_plugin; csulora_plugin.{stack}()", tmp_path, CSULORA_CONFIG="")
    assert done.returncode == 1
