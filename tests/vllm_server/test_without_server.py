"""What csulora takes vLLM for, held against its own functions; no server is started."""

import json
import subprocess
import sys

import pytest
from builders import write_guard
from vllm_process import MARKS, environment

pytestmark = MARKS

COPIED = """
import csulora_plugin, json
csulora_plugin.vllm()
import os
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.v1.executor.ray_env_utils import get_driver_env_vars
driver = get_driver_env_vars(set())
ways = [sorted(get_env_vars_to_copy()), sorted(driver)]
print("FOUND", json.dumps([ways, os.environ["CSULORA_CONFIG"]]))
"""


def found(script, env, cwd):
    """What a script prints after FOUND, as JSON."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("mode", ["correct", "observe"])
def test_vllm_copies_the_configuration_to_workers_that_ray_starts(mode, model, tmp_path):
    """Both of its executors, and the engines of data parallelism; none did without the plugin."""
    config = write_guard(
        tmp_path / "serving.toml",
        mode=mode,
        subspace=str(model / "subspace.safetensors"),
        cache="cache",
    )
    ways, named = found(COPIED, environment(None, CSULORA_CONFIG="serving.toml"), tmp_path)
    assert all("CSULORA_CONFIG" in way for way in ways) and named == str(config)
