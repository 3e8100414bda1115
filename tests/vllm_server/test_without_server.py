"""What csulora takes vLLM for, held against its own functions; no server is started."""

import itertools
import json
import subprocess
import sys

import pytest
from builders import write_guard
from serving_world import KINDS, LINEAR, build_adapter, corrected
from vllm_process import MARKS, environment

from csulora import LoraAdapter
from csulora.serving.check import of_vllm

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


def found(script, env, cwd, *arguments):
    """What a script prints after FOUND, as JSON."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_vllm_copies_the_configuration_to_workers_that_ray_starts(model, tmp_path):
    """Both of its executors, and the engines of data parallelism; none did without the plugin."""
    config = write_guard(
        tmp_path / "serving.toml",
        mode="correct",
        subspace=str(model / "subspace.safetensors"),
        cache="cache",
    )
    ways, named = found(COPIED, environment(None, CSULORA_CONFIG="serving.toml"), tmp_path)
    assert all("CSULORA_CONFIG" in way for way in ways) and named == str(config)


# Values of every field that vLLM reads, those that it takes first; None: the field is not there.
FIELDS = {
    "r": [4, 64, 65, 1, 0, -3, "4", [4]],
    "lora_alpha": [8, 0.5, 0, "8"],
    "target_modules": [["q_proj"], "all-linear", []],
    "bias": ["none", None, "all", "lora_only"],
    "modules_to_save": [
        *([], None, ["score"], ["classifier", "score"], ["lm_head"], ["score", "lm_head"]),
        *("score", ["scor"], 3, [["score"]]),
    ],
    "use_rslora": [False, True],
    "use_dora": [False, True, None],
    "lora_bias": [False, True],
    "init_lora_weights": [
        *(True, False, None, "gaussian", "GAUSSIAN", "eva", "orthogonal", "mica", "lora_ga"),
        *("pissa", "pissa_niter_4", "olora", "corda", "loftq", "", "x"),
    ],
    "alora_invocation_tokens": [None, [], [1, 2]],
    "layer_replication": [None, [], [[0, 2]]],
    "use_bdlora": [None, {}, {"nblocks": 2}],
    "use_qalora": [False, True],
    "rank_pattern": [
        *({}, {"q_proj": 8}, {"q_proj": 64}, {"q_proj": 65}, {"q_proj": 0}, {"q_proj": 8.0}),
        *({"q_proj": "8"}, {"k_proj": 8, "q_proj": -1}, ["q_proj"]),
    ],
    "alpha_pattern": [{}, {"q_proj": 8}],
}
REFUSALS = """
import json, sys
from pathlib import Path
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

limits = LoRAConfig(max_lora_rank=64)

def refused(config):
    try:
        PEFTHelper.from_dict(config | {"vllm_max_position_embeddings": 256}).validate_legal(limits)
    except Exception:
        return True
    return False

from dataclasses import fields
known = sorted(f.name for f in fields(PEFTHelper) if not f.name.startswith("vllm_"))
print("FOUND", json.dumps([known, [refused(x) for x in json.loads(Path("configs.json").read_text())]]))
"""


def configurations():
    """Every value of each field, and every two values of two fields, beside those that are taken."""
    plain = {name: values[0] for name, values in FIELDS.items()}
    changes = [(name, value) for name, values in FIELDS.items() for value in values]
    for one, other in itertools.combinations(changes, 2):
        yield plain | dict([one]) | dict([other])
    for name in FIELDS:
        yield {other: value for other, value in plain.items() if other != name}


def test_check_refuses_what_vllm_refuses(tmp_path):
    configs = list(configurations())
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    known, refused = found(REFUSALS, environment(None), tmp_path)
    assert known == sorted(FIELDS)  # a field that vLLM began to read would be one to look at
    assert 100 < sum(refused) < len(configs) - 100
    for config, by_vllm in zip(configs, refused, strict=True):
        assert (of_vllm(config, 64) is not None) == by_vllm, config


LOADED = """
import json, sys
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

found = {}
for folder in json.loads(sys.argv[1]):
    helper = PEFTHelper.from_local_dir(folder, 256)
    lora = LoRAModel.from_local_checkpoint(
        folder, set(json.loads(sys.argv[2])), helper, lora_model_id=1, device="cpu"
    )
    found[folder] = {
        name: [list(layer.lora_a.shape), list(layer.lora_b.shape), layer.rank, layer.scaling]
        for name, layer in lora.loras.items()
    }
print("FOUND", json.dumps(found))
"""


def test_vllm_reads_each_corrected_adapter_as_peft_does(model, tmp_path):
    """Its `LoRAModel`, which takes scalings and ranks from the configuration alone."""
    folders = []
    for kind in KINDS:
        raw = build_adapter(model, tmp_path / "raw" / kind, kind)
        for form in ("portable", "kept"):
            target = tmp_path / form / kind
            folders.append(str(corrected(model, raw, target, portable=form == "portable")))
    loaded = found(LOADED, environment(None), tmp_path, json.dumps(folders), json.dumps(LINEAR))
    for folder in folders:
        modules = LoraAdapter.load(folder).modules
        assert loaded[folder].keys() == modules.keys(), folder
        for name, module in modules.items():
            a, b, rank, scaling = loaded[folder][name]
            assert (a, b) == ([*module.A.shape], [*module.B.shape]) and rank == module.rank
            assert scaling == pytest.approx(module.scaling)
