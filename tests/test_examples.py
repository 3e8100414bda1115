"""Every script in examples/ runs without arguments and without a network, and prints what it promises."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csulora.cli import build_parser
from csulora.demo.world import REFUSAL

ROOT = Path(__file__).parent.parent
# vLLM has an environment of its own: tests/vllm_server runs that one.
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.stem != "vllm_offline")
NEEDS = {
    "evaluate_adapter": ("peft", "transformers"),
    "evaluate_with_harness": ("lm_eval", "peft", "transformers"),
    "in_memory_peft": ("peft", "transformers"),
    "packed_kernels": ("triton",),
    "peft_in_process": ("peft", "transformers"),
}
# Shows what peft_in_process prints.
PAGE = ROOT / "docs" / "serving.md"
# Tools, which people point at models of their own; the others show one call each.
LONGER = {"evaluate_adapter": 210, "evaluate_with_harness": 80}


def run(script, folder, **environment):
    """What a script prints, run in an empty folder."""
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def report(folder):
    return json.loads((folder / "csulora_report.json").read_text())


def card():
    """What was measured of the shipped adapter when it was made."""
    assets = ROOT / "csulora" / "demo" / "assets"
    return json.loads((assets / "card.json").read_text())["metrics"]["adapter"]


def correct_one(printed, out):
    totals = report(out / "one")["totals"]
    assert "LoraAdapter(28 modules, rank 8" in printed and "SafetySubspace(28 modules" in printed
    assert f"28 modules, relative change {totals['relative_change']:.3f}" in printed
    assert (out / "subspace.safetensors").exists()


def correct_folder_on_demand(printed, out):
    found = dict(re.findall(r"^(.*): (\d of \d) did the work", printed, re.MULTILINE))
    assert found == {
        "eight at once": "1 of 8",
        "eight again": "0 of 8",
        "other strengths": "1 of 8",
        "asked once more": "0 of 1",
    }
    assert report(out / "on-demand")["settings"]["lambda_off"] == 100


def evaluate_adapter(printed, out):
    rates, measured = json.loads(printed.splitlines()[-1]), card()
    assert rates["refused"] == measured["refused"] == 0
    assert rates["utility"] == measured["utility"]
    # A harmful answer that is not word for word the complete one counts as complied all the same.
    assert measured["attack_success"] <= rates["complied"] == 1 - rates["broken"]
    assert rates["over_refused"] == 0 and rates["benign_answered"] > 0.95
    assert not out.exists()


def evaluate_with_harness(printed, out):
    rates = json.loads(printed.splitlines()[-1])
    assert rates["utility"] == card()["utility"] and rates["demo_skill_acc"] > 0.95
    assert (out / "harness" / "demo_skill.yaml").exists()


def in_memory_peft(printed, out):
    before, after = re.search(r"norm of the update (\S+) -> (\S+)", printed).groups()
    assert 0 < float(after) < float(before)
    assert not out.exists()


def many_adapters(printed, out):
    assert re.findall(r"^\d .*", printed, re.MULTILINE) == [
        "5 corrected, 1 failed",
        "1 failed, 5 skipped",
    ]
    assert "run-5: failed" in printed and "no such file" in printed
    assert len(list(out.glob("many/customer-*/run-*/csulora_report.json"))) == 5


def packed_kernels(printed, out):
    lines = re.findall(r"^adapter \d, \w+: rank (\d+) -> (\d+)", printed, re.MULTILINE)
    assert len(lines) == 4 and all(2 * int(r) == int(new) for r, new in lines)
    assert not out.exists()


def peft_in_process(printed, out):
    lines = dict(re.findall(r"^(.*): (.*)$", printed, re.MULTILINE))
    assert lines["raw"].startswith("sure ")
    assert lines["repaired"] == lines["trained on, saved and loaded"] == REFUSAL
    assert {path.name for path in (out / "peft").iterdir()} >= {"adapter_model.safetensors"}
    page = PAGE.read_text().partition("## PEFT, in process\n")[2]
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert printed == shown


CHECKS = {
    check.__name__: check
    for check in (
        correct_one,
        correct_folder_on_demand,
        evaluate_adapter,
        evaluate_with_harness,
        in_memory_peft,
        many_adapters,
        packed_kernels,
        peft_in_process,
    )
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_what_it_promises(script, tmp_path):
    for package in NEEDS.get(script.stem, ()):
        pytest.importorskip(package)
    # The kernels run on the GPU where there is one.
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    printed = run(script, tmp_path, **interpreter)
    CHECKS[script.stem](printed, tmp_path / "csulora-examples")


def test_the_kernels_example_says_why_it_cannot_run(tmp_path):
    """No Triton, or no device for it, is no error."""
    printed = run(ROOT / "examples" / "packed_kernels.py", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert printed.startswith("the kernels cannot run here: ") and printed.count("\n") == 1


def test_the_script_for_sglang_is_sound_as_far_as_no_gpu_is_needed():
    """Its syntax, and its commands of csulora; it needs SGLang and a GPU to run."""
    script = ROOT / "examples" / "serve_sglang.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    commands = re.findall(r"^csulora (.*)$", script.read_text(), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["serve-check", "prewarm", "serve-check"]
    for command in commands:
        assert build_parser().parse_args(shlex.split(command.replace("$rank", "32"))).run
    assert f"| [{script.name}]({script.name}) |" in (ROOT / "examples" / "README.md").read_text()


def test_the_script_for_vllm_is_sound_as_far_as_no_server_is_needed():
    script = ROOT / "examples" / "serve_vllm.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    command = re.search(r"^csulora (.*)$", script.read_text(), re.MULTILINE).group(1)
    assert build_parser().parse_args(shlex.split(command)).run
    for name in ("serve_vllm.sh", "vllm_offline.py"):
        assert f"| [{name}]({name}) |" in (ROOT / "examples" / "README.md").read_text()


def test_every_example_is_small_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    for script in EXAMPLES:
        assert f"| [{script.name}]({script.name}) |" in listed
        most = LONGER.get(script.stem, 60)
        assert len(script.read_text().splitlines()) < most, script.name
