"""Bytes and keys of what csulora writes, and the names it promises."""

import ast
import hashlib
import inspect
import json
import subprocess
import sys

import builders
import pytest
import torch
from safetensors import safe_open

import csulora
import csulora_kernels
from csulora.files.safetensors import write_safetensors
from csulora.subspace import ModuleSubspace, Origin, SafetySubspace


def test_golden_bytes_of_a_subspace_file(tmp_path):
    module = ModuleSubspace(
        U=torch.eye(3)[:, :2], S=torch.tensor([2.0, 1.0]), V=torch.eye(4)[:, :2], energy_share=0.5
    )
    subspace = SafetySubspace({"m": module}, Origin("base", "aligned", "d0", "d1", 7))
    subspace.save(tmp_path / "s.safetensors")
    data = (tmp_path / "s.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8 : 8 + length].rstrip() == (
        b'{"__metadata__":{"aligned":"aligned","aligned_digest":"d1","base":"base",'
        b'"base_digest":"d0","csulora_format":"csulora_subspace/1",'
        b'"energy_share":"{\\"m\\": 0.5}","fan_in_fan_out":"[]","seed":"7"},'
        b'"m.S":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"m.U":{"dtype":"F32","shape":[3,2],"data_offsets":[8,32]},'
        b'"m.V":{"dtype":"F32","shape":[4,2],"data_offsets":[32,64]}}'
    )
    body = torch.frombuffer(bytearray(data[8 + length :]), dtype=torch.float32)
    assert body.tolist() == [2, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert subspace.sha256 == hashlib.sha256(data).hexdigest()


def test_mixed_types_are_aligned_and_read_by_safetensors(tmp_path):
    tensors = {
        "half": torch.arange(3, dtype=torch.bfloat16),
        "single": torch.arange(5, dtype=torch.float32),
        "byte": torch.arange(3, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"z": "1", "a": "é"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"z": "1", "a": "é"}
        assert all(torch.equal(file.get_tensor(name), X) for name, X in tensors.items())


def test_report_holds_what_it_promises(capsys, tmp_path, subspace, adapter):
    arguments = ("correct", adapter, "--subspace", subspace, "--out-dir", tmp_path / "out")
    assert builders.run(capsys, *arguments, "--lambda-off", "inf").code == 0
    text = (tmp_path / "out" / adapter.name / builders.REPORT).read_text()
    report = json.loads(text, parse_constant=lambda name: 1 / 0)  # NaN and Infinity are not JSON
    assert report["settings"]["lambda_off"] == "inf"
    assert report["subspace"]["sha256"] == builders.digest(subspace)
    assert report["source"]["sha256"] == builders.digest(adapter / builders.WEIGHTS)
    assert report["source"]["config_sha256"] == builders.digest(adapter / builders.CONFIG)
    assert set(report["modules"]) == set(builders.LAYERS)
    blocks = {"aligned", "partial_left", "partial_right", "off"}
    for entry in (*report["modules"].values(), report["totals"]):
        assert set(entry["relative_energy_before"]) == blocks
        assert set(entry["relative_energy_after"]) == blocks
        assert abs(sum(entry["relative_energy_before"].values()) - 1) < 1e-9
        assert entry["relative_energy_after"]["off"] == 0 < entry["relative_change"]
    assert all((m["rank_in"], m["rank_out"]) == (4, 8) for m in report["modules"].values())
    copied = tmp_path / "out" / adapter.name / "README.md"
    assert copied.read_bytes() == (adapter / "README.md").read_bytes()


def test_public_names():
    assert csulora.__all__ == [
        "ChangedError",
        "Correction",
        "CsuloraError",
        "DiskFullError",
        "ExistsError",
        "LoraAdapter",
        "LoraModule",
        "ModuleReport",
        "ModuleSubspace",
        "Origin",
        "Outcome",
        "Realignment",
        "Report",
        "SafetySubspace",
        "Source",
        "Totals",
        "UsageError",
        "Verification",
        "baselines",
        "correct",
        "correct_batch",
        "correct_folder",
        "correct_many",
        "decompose",
        "estimate",
        "geometry",
        "identify",
        "sweep",
        "verify",
    ]
    assert all(hasattr(csulora, name) for name in csulora.__all__)
    assert set(csulora.__all__) <= set(dir(csulora))
    with pytest.raises(AttributeError, match="module 'csulora' has no attribute 'estimates'"):
        csulora.estimates  # noqa: B018
    assert str(inspect.signature(csulora.Correction)).startswith(
        "(lambda_aligned: 'float' = 0.0, lambda_left: 'float' = 10.0, "
        "lambda_right: 'float' = 10.0, lambda_off: 'float' = 10.0, granularity: "
    )


@pytest.mark.parametrize("package", [csulora, csulora_kernels])
def test_type_checkers_see_what_is_imported_later(package):
    [block] = [
        node
        for node in ast.parse(inspect.getsource(package)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    name = package.__name__
    seen = {
        alias.name: f"{name}.{alias.name}" if node.module == name else node.module
        for node in block.body
        for alias in node.names
    }
    assert seen == package._LATER
    assert set(seen) <= set(package.__all__) <= set(dir(package))


def test_the_first_parameters_of_correct():
    assert list(inspect.signature(csulora.correct).parameters)[:3] == [
        "adapter",
        "subspace",
        "correction",
    ]


def test_every_option_of_the_contract_parses(tmp_path):
    from csulora.cli import build_parser

    parser = build_parser()
    for line in (
        "estimate B A --out s --rank 64 --modules q_proj,v_proj",
        "estimate B A --out s --energy 0.5 --like L",
        "correct A B --subspace s --out-dir o --lambda-partial 1 --lambda-off 2 --lambda-aligned 3"
        " --granularity component --form same --subspace-rank 8 --dtype bfloat16 --portable"
        " --pass-through --backend torch --device cpu --adapters-from - --jobs 2 --overwrite --json",
        "correct A --subspace s --out-dir o --lambda-left 1 --lambda-right 2 --resume",
        "correct A --subspace s --out-dir o --rank same",
        "correct A --subspace s --out-dir o --method realign --strength 2 --target 0.5 --edge off"
        " --opposed",
        "correct A --subspace s --out-dir o --strength-for q_proj=0 --strength-for mlp.*=drop"
        " --budget change=0.3",
        "correct in/** --subspace s --out-dir o --batch-bytes 2G --probe --page p.html --engine ray"
        " --ray-address auto",
        "inspect A --subspace s --json --plot f.png",
        "sweep A --subspace s --out o --methods realign --forms same --granularities component"
        " --ranks 2,4 --strengths 1,inf --eval c{adapter} --limit complied<=0.1 --maximize utility"
        " --steps 2 --jobs 2 --timeout 9 --without raw --overwrite --pass-through --device cpu --json",
        "sweep A --subspace s --out-dir o --select a{adapter} --report b{adapter}",
        "sign A --key k.pem --json",
        "sign --new-key k",
        "serve-check A --config c.toml --max-lora-rank 64 --stack sglang --json",
        "serve-check --url http://h:1 --api-key-env K --canary-dir d --timeout 9",
        "demo --out-dir d",
    ):
        assert parser.parse_args(line.split()).run


def test_imports_are_light_and_cheap():
    """As is what needs neither tensors nor files: the help, the version, a call that is wrong."""
    code = """
import sys, time
start = time.process_time()
import csulora, csulora_kernels
from csulora.cli import main
csulora.Correction(lambda_off=1), csulora.CsuloraError
codes = [main(["--version"]), main(["correct", "--help"]), main(["correct", "A", "--frm", "exact"])]
seconds = time.process_time() - start
heavy = {"torch", "numpy", "triton", "transformers", "peft", "matplotlib", "huggingface_hub", "ray"}
homes = set(csulora._LATER.values()) | set(csulora_kernels._LATER.values())
found = codes, sorted((heavy | homes) & set(sys.modules))
assert csulora.adapter.LoraAdapter is csulora.LoraAdapter and "csulora.estimation" not in sys.modules
print(repr(found), seconds, sep="\\n")
"""
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    lines = [run.stdout.splitlines()[-2:] for run in runs]
    assert {found for found, _ in lines} == {"([0, 0, 2], [])"}
    assert min(float(seconds) for _, seconds in lines) < 0.3
